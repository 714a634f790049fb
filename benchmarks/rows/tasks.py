"""Rows of whole tasks: from tars to committed files, with models that take no time or a set one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import baseline, data, noop_models, reference, workload
from benchmarks.harness import Row, Setting, Sides, timed
from d2m_hpc.config import Config
from d2m_hpc.models.inputs import Input
from d2m_hpc.worker.compute.resolve import Toolbox

SHARDS = 20
TARS_A_WORKER = 5
"""Of a group in the baseline: enough that its processes seldom idle, few enough that a group is
written while the next is loaded."""
DEVICE_SECONDS = 0.4
"""A batch of the row of memory: so slow that in two shards already all waits that may."""


@contextmanager
def whole_task(setting: Setting) -> Iterator[Sides]:
    """Loading and writing, with a device on which models and normalising take no time.

    What ours takes where the normalising is done by the loader's cores is in the JSON, too.
    """
    paths = data.tars(setting.folder, setting.size(SHARDS, 2), setting.size(500, 6))
    rows = len(paths) * setting.size(500, 6)

    def ours(tars: Sequence[Path]) -> float:
        with workload.made_up_device():
            return workload.run_task(workload.no_op_keys(tars, setting.workers))

    def conventional(tars: Sequence[Path]) -> float:
        keys = workload.no_op_keys(tars, setting.workers)
        if setting.reference:
            grouped = keys | {"tars_per_wds": TARS_A_WORKER * setting.workers}
            return reference.seconds(setting.reference, "task", grouped, rows)
        return timed(partial(_conventional_task, tars, setting, Config(**keys)))

    def warm_up() -> None:
        ours(paths[:2])
        if not setting.reference:
            conventional(paths[:2])

    more: dict[str, Any] = {}
    yield Sides(lambda: ours(paths), lambda: conventional(paths), warm_up, more)
    keys = workload.no_op_keys(paths, setting.workers)
    more["ours_on_cpu"] = [workload.run_task(keys) for _ in range(setting.size(3, 1))]


def _conventional_task(tars: Sequence[Path], setting: Setting, config: Config) -> None:
    size = TARS_A_WORKER * setting.workers
    groups = [tars[i : i + size] for i in range(0, len(tars), size)]
    inputs = list(Toolbox.of(config).inputs)
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        baseline.task(
            groups,
            setting.workers,
            config.batch_size,
            inputs,
            config.additional_fields,
            _no_op_graph(inputs),
            Path(folder),
        )


def _no_op_graph(inputs: Sequence[Input]) -> baseline.Compute:
    """The models of the custom file, run one after the other."""
    models: dict[str, Any] = {k: made("cpu") for k, made in noop_models.model_lookup.items()}
    named = [(raw, baseline.NAMES[form]) for raw, form in inputs]

    def compute(batch: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        given = dict(zip(named, batch, strict=True))
        cache = {}
        for name, model in models.items():
            wanted = zip(model.raw_inputs, model.preprocessors, strict=True)
            cache[name] = model(*(given[pair] for pair in wanted))
        columns = noop_models.postprocess_parquet_lookup
        features = noop_models.postprocess_feature_lookup
        return {k: f(cache) for k, f in columns.items()}, {k: f(cache) for k, f in features.items()}

    return compute


@contextmanager
def overlap(setting: Setting, share: float) -> Iterator[Sides]:
    """A device that takes `share` times as long as the loader for each batch, in our own task.

    Ours is the whole task's time; the baseline, that of the slower of its two parts alone.
    """
    count, size, batch = setting.size(10, 2), setting.size(250, 6), setting.size(50, 3)
    tars = data.tars(setting.folder, count, size)
    keys = workload.no_op_keys(tars, setting.workers, batch_size=batch)
    batches = count * -(-size // batch)
    _with_device(keys, 0)  # whose imports and files no other run will wait for
    loading = _with_device(keys, 0)
    seconds = share * loading / batches

    def slower_alone() -> float:
        return max(seconds * batches, _with_device(keys, 0))

    yield Sides(lambda: _with_device(keys, seconds), slower_alone, warm_up=lambda: None)


def _with_device(keys: dict[str, Any], seconds: float) -> float:
    """A task's time with a device that takes so long for a batch."""
    with workload.made_up_device(seconds):
        return workload.run_task(keys)


@contextmanager
def memory(setting: Setting) -> Iterator[Sides]:
    """The peak of a task's memory over 20 shards, and over 2; each in a process of its own."""
    tars = data.tars(setting.folder, setting.size(SHARDS, 3), setting.size(250, 6))

    def peak(count: int) -> float:
        keys = workload.no_op_keys(tars[:count], setting.workers, batch_size=64)
        seconds = str(setting.size(1, 0) * DEVICE_SECONDS)
        command = [sys.executable, "-m", "benchmarks.peak", seconds, json.dumps(keys)]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return float(ended.stdout.splitlines()[-1])

    yield Sides(lambda: peak(len(tars)), lambda: peak(2), warm_up=lambda: None)


def _overlap_row(name: str, what: str, share: float) -> Row:
    title = f"a task's time over its slower part's alone, {what}"
    return Row(f"overlap-{name}", title, 1.1, partial(overlap, share=share), "at most")


ROWS = (
    Row(
        "task",
        "whole task, 20 shards of 500, models that take no time",
        6,
        whole_task,
        takes_reference=True,
    ),
    _overlap_row("loader", "the loader slower", 0.5),
    _overlap_row("balanced", "both alike", 1.0),
    _overlap_row("device", "the device slower", 2.0),
    Row(
        "memory",
        "peak memory over 20 shards, against 2",
        1.1,
        memory,
        "at most",
        "MB",
    ),
)
