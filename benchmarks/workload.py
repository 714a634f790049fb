"""Our side: the loader and whole tasks, through the names that the program itself uses."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from d2m_hpc import config as configs
from d2m_hpc.launch.flow import submit
from d2m_hpc.launch.local import ThisProcess
from d2m_hpc.models.preprocessors import PREPROCESSORS
from d2m_hpc.models.registry import builtin
from d2m_hpc.models.transfer import CudaCopies
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run.records import Job, Shard
from d2m_hpc.run.tasks import Progress
from d2m_hpc.worker.batch import Batch
from d2m_hpc.worker.compute.graph import Graph
from d2m_hpc.worker.compute.resolve import Toolbox
from d2m_hpc.worker.read.loader import Loader
from d2m_hpc.worker.read.prepare import Recipe
from d2m_hpc.worker.read.scratch import Scratch
from d2m_hpc.worker.work import Work

DATACOMP = yaml.safe_load((Path(__file__).parents[1] / "configs" / "datacomp.yml").read_text())
MODELS: list[str] = DATACOMP["models"]
CLIP = MODELS[:2]
FIELDS: list[str] = DATACOMP["additional_fields"]
NO_OP = Path(__file__).with_name("noop_models.py")
BATCH = 128


def keys(tars: Sequence[Path], workers: int, models: Sequence[str], **more: Any) -> dict[str, Any]:
    """A config's keys for these models with all that they give, as DataComp has it."""
    known = builtin()
    return {
        "models": list(models),
        "postprocess_columns": [n for n, p in known.columns.items() if p.model in models],
        "postprocess_features": [n for n, p in known.features.items() if p.model in models],
        "additional_fields": FIELDS,
        "nworkers": workers,
        "batch_size": BATCH,
        "device": "cpu",
        "input_tars": [str(tar) for tar in tars],
        "output_metadata_dir": "out",
        **more,
    }


def no_op_keys(tars: Sequence[Path], workers: int, **more: Any) -> dict[str, Any]:
    """The same inputs, columns and features, by models that take no time."""
    custom = {"models": ["no-op", "no-op-text"], "custom_pypath": str(NO_OP)}
    return keys(tars, workers, MODELS, **more) | custom


def batches(config: configs.Config, scratch: Path) -> Iterator[Batch]:
    """What our loader makes of a config's tars: pixels as uint8, which the device normalises."""
    recipe = Recipe.of(config, Toolbox.of(config).inputs)
    works = (Work(Job(Shard(Path(tar).stem, tar))) for tar in config.input_tars)
    with Loader(works, recipe, Scratch(scratch, sys.maxsize)) as loader:
        for reading in loader:
            yield from reading


@contextmanager
def made_up_device(seconds: float = 0.0) -> Iterator[None]:
    """One that takes so long for a batch, and none of the loader's cores.

    As CUDA's, it computes batches one after the other while the host goes on, until that asks for
    their outputs. Normalising and its copies, which are a device's too, are left out.
    """
    bare = {name: replace(made, finish=_as_it_is) for name, made in PREPROCESSORS.items()}
    free = time.monotonic()

    def mark(copies: CudaCopies) -> Callable[[], None]:
        nonlocal free
        free = done = max(free, time.monotonic()) + seconds
        return lambda: time.sleep(max(0.0, done - time.monotonic()))

    early = patch.object(Graph, "returns_early", True)
    with patch.dict(PREPROCESSORS, bare), patch.object(CudaCopies, "mark", mark), early:
        yield


def _as_it_is(batch: Any) -> Any:
    return batch


def run_task(keys: dict[str, Any]) -> float:
    """One task in this process, from a plan to committed files.

    The plan, for which a process of its own reads the custom file, is not in the time.

    Args:
        keys: the config's, but for the output folder, which is a temporary one.

    Returns:
        wall seconds.

    Raises:
        RuntimeError: it did not do every shard; with its log.
    """
    told: list[Progress] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yml"
        path.write_text(yaml.safe_dump({**keys, "output_metadata_dir": f"{folder}/out"}))
        workload = inspect(configs.load(path), str(path))
        started = time.perf_counter()
        submit(workload, ThisProcess(lambda shards: nullcontext(told.append)))
        seconds = time.perf_counter() - started
        if told[-1].done != len(keys["input_tars"]):
            log = "\n".join(path.read_text() for path in workload.run.logs.iterdir())
            raise RuntimeError(f"the task did {told[-1].done} shards; its log:\n{log}")
    return seconds
