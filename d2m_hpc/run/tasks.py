"""The progress of array tasks, as they write it every few seconds."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.merge import listed
from d2m_hpc.run.records import read_values

ACTIVE_SECONDS = 60.0
"""A task that has been silent for longer does not count as running."""
TASK = re.compile(r"\d+-\d+-\d+")
"""`submission-index-attempt`."""
FAR = 1e11
"""Seconds since the epoch beyond the year 5000, which no clock shows."""


@dataclass
class Progress:
    """The figures of one attempt of one task.

    Attributes:
        task: `submission-index-attempt`.
        device: torch's name, with the GPU's own index if Slurm shows the task only some GPUs.
        gpu: the GPU's model; empty on a CPU, and in files of earlier versions.
        shard: the newest shard that was begun.
        started, updated: seconds since the epoch.
        state: `running`, `finished`, `out of time`, or `stopped` by a signal or an error.
        worked, waited: seconds on samples, and those of them in which no batch was decoded.
        gpu_busy, gpu_looks: the sum of the GPU's busy shares, from 0 to 1, and their number.
    """

    task: str
    host: str = ""
    device: str = ""
    gpu: str = ""
    shards: int = 0
    done: int = 0
    failed: int = 0
    rows: int = 0
    rejected: int = 0
    shard: str = ""
    started: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    state: str = "running"
    worked: float = 0.0
    waited: float = 0.0
    gpu_busy: float = 0.0
    gpu_looks: int = 0

    def after(self, earlier: Progress) -> Progress:
        """Add the figures of an earlier task of the same process."""
        summed = ["shards", "done", "failed", "rows", "rejected"]
        summed += ["worked", "waited", "gpu_busy", "gpu_looks"]
        counts = {name: getattr(self, name) + getattr(earlier, name) for name in summed}
        return replace(self, started=earlier.started, **counts)

    @property
    def seconds(self) -> float:
        return max(self.updated - self.started, 1e-9)

    @property
    def speed(self) -> float:
        """Samples a second."""
        return self.rows / self.seconds

    @property
    def wait_share(self) -> float | None:
        """The share of its working time in which the task waited for samples; None in the first
        minute."""
        return self.waited / self.worked if self.worked >= 60 else None

    @property
    def busy_share(self) -> float | None:
        """The share of time in which the GPU computed; None where the driver does not tell."""
        return self.gpu_busy / self.gpu_looks if self.gpu_looks else None

    @property
    def lane(self) -> str:
        """`submission-index`, the task that its attempts have in common."""
        return self.task.rpartition("-")[0]

    @property
    def is_active(self) -> bool:
        """Whether the attempt is alive, for display: by two clocks, which may be minutes apart."""
        return self.state == "running" and time.time() - self.updated < ACTIVE_SECONDS

    @property
    def has_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def hardware(self) -> str:
        """The GPU's model or `CPU`."""
        return self.gpu or ("GPU" if self.has_gpu else "CPU")

    @property
    def ending(self) -> str:
        """The end of the attempt in one word.

        `finished`, `failed` (finished, with failed shards), `requeued` (out of time), `stopped`,
        `lost` (silent: the task was killed, or its node died), or `running`.
        """
        if self.state == "running":
            return "running" if self.is_active else "lost"
        if self.state == "finished":
            return "failed" if self.failed else "finished"
        return {"out of time": "requeued", "lost": "lost"}.get(self.state, "stopped")


def attempts(run: RunDir) -> list[Progress]:
    """Read the newest progress of every attempt of every task; damaged values are left out."""
    last: dict[str, Progress] = {}
    for values in _all_values(run):
        if not _is_progress(values):
            continue
        if not values.keys() <= _NAMES:  # of another version
            values = {name: values[name] for name in _NAMES & values.keys()}
        told = Progress(**values)
        if told.task not in last or told.updated > last[told.task].updated:
            last[told.task] = told
    return list(last.values())


_NAMES = {f.name for f in fields(Progress)}


def _all_values(run: RunDir) -> Iterator[Any]:
    for path in listed(run.progress):
        with suppress(FileNotFoundError, IsADirectoryError):
            yield from read_values(path)


def _is_progress(told: Any) -> bool:
    """Whether values are those of a task's whole progress file.

    Without a loop in Python, as a run has thousands.
    """
    if not isinstance(told, dict):
        return False
    get: Callable[..., Any] = told.get
    task, began, told_at = get("task"), get("started"), get("updated")
    texts = (task, get("host"), get("shard"), get("state"), get("device", ""), get("gpu", ""))
    counts = (get("rows"), get("done"), get("failed"), get("shards"), get("gpu_looks", 0))
    if {*map(type, texts)} != {str} or {*map(type, counts)} != {int} or min(counts) < 0:
        return False
    sums = (get("worked", 0), get("waited", 0), get("gpu_busy", 0))
    if not {*map(type, (began, told_at, *sums))} <= {int, float}:
        return False
    if not all(0 <= number < FAR for number in (began, told_at, *sums)):  # no NaN either
        return False
    return bool(TASK.fullmatch(task))


def log_file(run: RunDir, task: str) -> Path | None:
    """The log file of a task; None if no task has that name."""
    if not TASK.fullmatch(task):
        return None
    submission, index, _ = task.split("-")
    return run.log_of(submission, int(index))
