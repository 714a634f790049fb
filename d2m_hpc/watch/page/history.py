"""What happened in a run, by its records and its tasks' progress files, in one pass over each."""

from __future__ import annotations

import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2m_hpc.gc_paused import uncollected
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest, all_values, gist
from d2m_hpc.run.tasks import ACTIVE_SECONDS, attempts

EXAMPLES = 3
"""Samples that are named of each reason for a rejection."""
LANES = 40
"""Tasks that are drawn."""
TROUBLED = ("failed", "requeued", "stopped", "lost")


@dataclass
class Attempt:
    """One start of a task; times are in seconds since the epoch.

    Attributes:
        lane: `submission-index`, the task that its attempts have in common.
        ending: finished, failed (finished, with failed shards), requeued (out of time), stopped,
            lost (fell silent: killed, or its node died), or running.
    """

    lane: str
    host: str
    started: float
    ended: float
    ending: str
    done: int
    failed: int
    rows: int

    @property
    def seconds(self) -> float:
        return max(self.ended - self.started, 1e-9)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Attempt:
        """By what it last said of itself."""
        return cls(
            lane=told["task"].rpartition("-")[0],
            host=told["host"],
            started=told["started"],
            ended=told["updated"],
            ending=_ending(told),
            done=told["done"],
            failed=told["failed"],
            rows=told["rows"],
        )


def _ending(told: Mapping[str, Any]) -> str:
    state = told["state"]
    if state == "running":
        return "running" if time.time() - told["updated"] < ACTIVE_SECONDS else "lost"
    if state == "finished":
        return "failed" if told["failed"] else "finished"
    return "requeued" if state == "out of time" else "stopped"


@dataclass
class Lane:
    """A task: its attempts, oldest first, and when it finished or failed a shard."""

    name: str
    attempts: list[Attempt]
    done: list[float] = field(default_factory=list)
    failed: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Samples a second over all attempts."""
        return sum(a.rows for a in self.attempts) / sum(a.seconds for a in self.attempts)

    @property
    def trouble(self) -> int:
        """Attempts that did not end well, and shards that failed."""
        return sum((a.ending in TROUBLED) + a.failed for a in self.attempts)

    @property
    def order(self) -> tuple[int, int]:
        submission, index = self.name.split("-")
        return int(submission), int(index)


def lanes(told: Iterable[Attempt]) -> list[Lane]:
    """The tasks, in their order; an attempt is over once the next one begins."""
    grouped: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in sorted(told, key=lambda a: a.started):
        grouped[attempt.lane].append(attempt)
    for before in (a for group in grouped.values() for a in group[:-1] if a.ending == "running"):
        before.ending = "lost"
    return sorted((Lane(n, a) for n, a in grouped.items()), key=lambda lane: lane.order)


def notable(tasks: list[Lane], most: int = LANES) -> list[Lane]:
    """All tasks, or those with the most trouble, then the slowest ones; in their order."""
    if len(tasks) <= most:
        return tasks
    return sorted(
        heapq.nsmallest(most, tasks, key=lambda t: (-t.trouble, t.speed)), key=lambda t: t.order
    )


@dataclass
class Work:
    """What was done at one place: seconds by stage, and of how many rows and shards."""

    seconds: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    rows: int = 0

    def add(self, values: Mapping[str, Any]) -> None:
        self.seconds.update({k: float(v) for k, v in values.get("seconds", {}).items()})
        self.shards += 1
        self.rows += values.get("rows", 0)


@dataclass
class History:
    """Everything that the page tells of the records.

    Attributes:
        examples: a few (key, shard) of each reason for a rejection.
        hosts, tasks: by node, and by lane.
    """

    manifest: Manifest = field(default_factory=Manifest)
    lanes: list[Lane] = field(default_factory=list)
    shown: list[Lane] = field(default_factory=list)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    hosts: dict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    tasks: dict[str, Work] = field(default_factory=lambda: defaultdict(Work))

    @classmethod
    @uncollected()
    def read(cls, run: RunDir) -> History:
        tasks = lanes(map(Attempt.of, attempts(run)))
        history = cls(lanes=tasks, shown=notable(tasks))
        drawn = {lane.name: lane for lane in history.shown}
        for values in all_values(run):
            if history._add(values):
                with suppress(LookupError, TypeError, ValueError, AttributeError):  # damaged
                    history._count(values, drawn)
        history.manifest.settle()
        return history

    def _add(self, values: Any) -> bool:
        """Whether it is a record, and one that was not seen before."""
        manifest = self.manifest
        try:
            stem, finished = values["shard"], float(values.get("finished", 0.0))
            before = [o.finished for o in manifest.failures.get(stem, ())]
            before += [manifest.done[stem].finished] if stem in manifest.done else []
        except (LookupError, TypeError, ValueError, AttributeError):
            return False
        manifest.add(values)
        return finished not in before

    def _count(self, values: Mapping[str, Any], drawn: Mapping[str, Lane]) -> None:
        lane = values.get("task", "").rpartition("-")[0]
        for place, name in ((self.hosts, values.get("host", "")), (self.tasks, lane)):
            place[name].add(values)
        if lane in drawn:
            times = drawn[lane].done if values["state"] == "done" else drawn[lane].failed
            times.append(float(values.get("finished", 0.0)))
        if values["state"] == "done":
            self._exemplify(values["shard"], values.get("rejections", ()))

    def _exemplify(self, stem: str, rejections: Iterable[tuple[str, str]]) -> None:
        for key, reason, *_ in rejections:
            known = self.examples.setdefault(gist(reason), [])
            if len(known) < EXAMPLES:
                known.append((key, stem))

    @property
    def span(self) -> tuple[float, float]:
        """From the first start of anything to its last sign of life, in seconds since the epoch."""
        pairs = [(a.started, a.ended) for lane in self.lanes for a in lane.attempts]
        every = [
            *self.manifest.done.values(),
            *(f for g in self.manifest.failures.values() for f in g),
        ]
        pairs += [(o.started, o.finished) for o in every if o.started]
        return (min(s for s, _ in pairs), max(e for _, e in pairs)) if pairs else (0.0, 0.0)


def cumulative(times: Iterable[float], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many of the times are not after each moment."""
    ordered = np.sort(np.fromiter(times, np.float64))
    return np.searchsorted(ordered, at, side="right").astype(np.float64)


def rate(
    started: NDArray[np.float64],
    finished: NDArray[np.float64],
    rows: NDArray[np.float64],
    edges: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Rows a second between each two edges, where each shard's are spread over its time."""
    pace = rows / np.maximum(finished - started, 1e-3)
    until = _ramps(started, pace, edges) - _ramps(np.maximum(finished, started + 1e-3), pace, edges)
    return np.diff(until) / np.diff(edges)


def _ramps(
    begin: NDArray[np.float64], slope: NDArray[np.float64], at: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The sum of slope * max(0, at - begin)."""
    order = np.argsort(begin)
    begin, slope = begin[order], slope[order]
    slopes = np.concatenate([[0.0], np.cumsum(slope)])
    moments = np.concatenate([[0.0], np.cumsum(slope * begin)])
    known = np.searchsorted(begin, at)
    result: NDArray[np.float64] = at * slopes[known] - moments[known]
    return result
