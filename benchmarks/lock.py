"""What of the loader's work holds the interpreter's lock: `python -m benchmarks.lock`.

All decode threads of a process, and the thread that launches kernels, share that lock. So its part
of a sample's work bounds the samples a second of a task, however many cores there are.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import simplejpeg
import torch

from benchmarks import data, workload
from d2m_hpc.config import Config
from d2m_hpc.models import preprocessors
from d2m_hpc.models.blocks import Reused
from d2m_hpc.worker.batch import collate
from d2m_hpc.worker.compute.resolve import Toolbox
from d2m_hpc.worker.read.prepare import Ready, Recipe, prepare
from d2m_hpc.worker.read.shard import Archive

UNLOCKED: tuple[tuple[Any, str], ...] = (
    (os, "pread"),
    (simplejpeg, "decode_jpeg"),
    (preprocessors.F, "interpolate"),
    (torch, "stack"),
)
"""Calls that give the lock up for nearly all of their time."""


def seconds(config: Config, rounds: int) -> tuple[float, float]:
    """CPU seconds a sample: in `UNLOCKED` calls, and in all else. The best round of one thread."""
    recipe = Recipe.of(config, Toolbox.of(config).inputs)
    torch.set_num_threads(1)
    found: list[tuple[float, float]] = []
    for _ in range(rounds + 1):  # the first one warms up
        with _timed() as spent:
            began = time.thread_time()
            count = sum(_load(Path(tar), recipe) for tar in config.input_tars)
            all_of_it = time.thread_time() - began
        unlocked = spent.total()
        found.append((unlocked / count, (all_of_it - unlocked) / count))
    return min(found[1:], key=lambda pair: pair[1])


@contextmanager
def _timed() -> Iterator[Counter[str]]:
    spent: Counter[str] = Counter()

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*given: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*given, **named)
            finally:
                spent[name] += time.thread_time() - began  # type: ignore[assignment]

        return timing

    with ExitStack() as stack:
        for owner, name in UNLOCKED:
            stack.enter_context(patch.object(owner, name, timed(name, getattr(owner, name))))
        yield spent


def _load(tar: Path, recipe: Recipe) -> int:
    """The loader's steps from a tar to batches, in this thread; returns the number of samples."""
    allocate, ready, count = Reused(recipe.batch_size), list[Ready](), 0
    with closing(Archive(tar)) as archive:
        for sample in archive.index(recipe.needed):
            made = prepare(sample, archive, recipe)
            assert isinstance(made, Ready)
            ready.append(made)
            count += 1
            if len(ready) == recipe.batch_size:
                _collate(ready, recipe, allocate)
                ready = []
        if ready:
            _collate(ready, recipe, allocate)
    return count


def _collate(ready: Sequence[Ready], recipe: Recipe, allocate: Reused) -> None:
    for wanted in recipe.inputs:
        collate([one.inputs[wanted] for one in ready], allocate)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lock", description=__doc__)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="d2m-bench-") as folder:
        tars = data.tars(Path(folder), 1, options.samples)
        for name, models in (("CLIP", workload.CLIP), ("six models", workload.MODELS)):
            config = Config(**workload.keys(tars, 1, models, output_metadata_dir=folder))
            unlocked, locked = seconds(config, options.rounds)
            print(
                f"{name}: {1e6 * (unlocked + locked):.0f} microseconds of CPU a sample, "
                f"{1e6 * locked:.0f} of them with the lock: at most {1 / locked:,.0f} samples a "
                "second in one process"
            )


if __name__ == "__main__":
    main()
