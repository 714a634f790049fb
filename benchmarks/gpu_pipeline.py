"""A whole task, and who waited for whom in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.workload import run_task
from d2m_hpc.models.transfer import CudaCopies
from d2m_hpc.worker.batch import Batch
from d2m_hpc.worker.compute.graph import Graph
from d2m_hpc.worker.compute.in_flight import InFlight
from d2m_hpc.worker.read.loader import Reading
from d2m_hpc.worker.task import Task
from d2m_hpc.worker.write.thread import Settler

WARM = 4
"""Shards that do not count."""


class Stopwatch:
    """Seconds that the compute thread waited, and that the device was busy, after the first shards,
    in which kernels are chosen and launches recorded."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shards = 0
        self._busy: list[Callable[[], float]] = []
        self.reset()

    def reset(self) -> None:
        self.started = time.perf_counter()
        self.waits = {"loader": 0.0, "device": 0.0, "writer": 0.0}
        self._busy.clear()
        self.launches: list[float] = []
        self.rows = self.recomputed = 0

    def shard(self, original: Any, *given: Any) -> Any:
        self._shards += 1
        if self._shards == WARM + 1:
            self.reset()
        result = original(*given)
        self.rows += result.record.rows
        self.recomputed += result.record.recomputed
        return result

    def waiting(self, who: str, original: Any, *given: Any) -> Any:
        """Call, and put the time down to somebody."""
        started = time.perf_counter()
        try:
            return original(*given)
        finally:
            self.waits[who] += time.perf_counter() - started

    def loaded(self, original: Any, reading: Reading) -> Iterator[Batch]:
        batches = original(reading)
        while (batch := self.waiting("loader", next, batches, None)) is not None:
            yield batch

    def launched(self, original: Any, graph: Graph, batch: Batch) -> InFlight:
        """The device is busy from the first kernel's turn to the last one's end."""
        started = time.perf_counter()
        try:
            return self._launched(original, graph, batch)
        finally:
            self.launches.append(time.perf_counter() - started)

    def _launched(self, original: Any, graph: Graph, batch: Batch) -> InFlight:
        if self._device.type != "cuda":
            before = self.waits["device"]
            made: InFlight = self.waiting("device", original, graph, batch)
            seconds = self.waits["device"] - before
            self._busy.append(lambda: seconds)
            return made
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in "be")
        began.record()
        made = original(graph, batch)
        ended.record()
        self._busy.append(lambda: began.elapsed_time(ended) / 1e3)
        return made

    def marked(self, original: Any, copies: CudaCopies) -> Callable[[], None]:
        wait = original(copies)
        return lambda: self.waiting("device", wait)

    @property
    def busy(self) -> float:
        return sum(seconds() for seconds in self._busy)


def tar_to_files(keys: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """One task over the tars of a config: speed, the device's idle share, and what limits it.

    What limits is whoever the compute thread waited for most; `host` is its own work, such as to
    launch kernels.
    """
    watch = Stopwatch(device)
    with ExitStack() as stack:
        for owner, name, wrapper in (
            (Task, "_compute", watch.shard),
            (Reading, "__iter__", watch.loaded),
            (Graph, "launch", watch.launched),
            (CudaCopies, "mark", watch.marked),
            (Settler, "put", lambda original, *given: watch.waiting("writer", original, *given)),
        ):
            stack.enter_context(patch.object(owner, name, _wrapped(getattr(owner, name), wrapper)))
        run_task(keys)
    seconds = time.perf_counter() - watch.started
    waits = {**watch.waits, "host": seconds - sum(watch.waits.values())}
    return {
        "part": "tar to files",
        "name": f"{keys['nworkers']} decode threads",
        "threads": keys["nworkers"],
        "samples_per_second": watch.rows / seconds,
        "seconds": seconds,
        "rows": watch.rows,
        "recomputed": watch.recomputed,
        "idle": min(1.0, max(0.0, 1 - watch.busy / seconds)),
        "launch_ms": median(watch.launches) * 1e3,
        "limit": max(waits, key=lambda who: waits[who]),
        "waits": waits,
    }


def _wrapped(original: Any, wrapper: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: wrapper(original, *given)
