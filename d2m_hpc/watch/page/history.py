"""The history of a run: its records and progress files, each read once."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest, Outcome, all_values, gist
from d2m_hpc.run.tasks import Progress, attempts

EXAMPLES = 3
"""Samples that are named for each reason of a rejection."""
LANES = 40
"""Tasks that are drawn."""
SLOWEST = 10
TROUBLED = ("failed", "requeued", "stopped", "lost")


@dataclass
class Lane:
    """A task's attempts, oldest first, and the times at which shards were done or failed."""

    name: str
    attempts: list[Progress]
    done: list[float] = field(default_factory=list)
    failed: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Samples a second over all attempts."""
        return self.rows / sum(a.seconds for a in self.attempts)

    @property
    def rows(self) -> int:
        return sum(a.rows for a in self.attempts)

    @property
    def trouble(self) -> int:
        """Attempts that ended badly, and failed shards."""
        return sum((a.ending in TROUBLED) + a.failed for a in self.attempts)

    @property
    def order(self) -> tuple[int, int]:
        submission, index = self.name.split("-")
        return int(submission), int(index)


def lanes(told: Iterable[Progress]) -> list[Lane]:
    """Group attempts by task, in the tasks' order; an attempt ends when the next one begins."""
    grouped: dict[str, list[Progress]] = defaultdict(list)
    for attempt in sorted(told, key=lambda a: a.started):
        grouped[attempt.lane].append(attempt)
    for before in (a for group in grouped.values() for a in group[:-1] if a.ending == "running"):
        before.state = "lost"
    return sorted((Lane(n, a) for n, a in grouped.items()), key=lambda lane: lane.order)


def notable(tasks: list[Lane]) -> list[Lane]:
    """All tasks, or those with the most trouble, then the slowest, in their order."""
    if len(tasks) <= LANES:
        return tasks
    return sorted(
        heapq.nsmallest(LANES, tasks, key=lambda t: (-t.trouble, t.speed)), key=lambda t: t.order
    )


@dataclass
class Effort:
    """Work at one place: seconds by stage, shards and rows."""

    seconds: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    rows: int = 0

    def add(self, values: Mapping[str, Any]) -> None:
        self.seconds.update({k: float(v) for k, v in values.get("seconds", {}).items()})
        self.shards += 1
        self.rows += values.get("rows", 0)


@dataclass
class History:
    """A run's records and attempts, counted for the page.

    Attributes:
        shown: the tasks to draw.
        examples: a few keys and shards for each reason of a rejection.
        hosts, tasks: the work by host, and by task.
    """

    manifest: Manifest = field(default_factory=Manifest)
    lanes: list[Lane] = field(default_factory=list)
    shown: list[Lane] = field(default_factory=list)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    hosts: dict[str, Effort] = field(default_factory=lambda: defaultdict(Effort))
    tasks: dict[str, Effort] = field(default_factory=lambda: defaultdict(Effort))

    @classmethod
    @gc_paused()
    def read(cls, run: RunDir) -> History:
        tasks = lanes(attempts(run))
        history = cls(lanes=tasks, shown=notable(tasks))
        drawn = {lane.name: lane for lane in history.shown}
        for values in all_values(run):
            if history._add(values):
                with suppress(LookupError, TypeError, ValueError, AttributeError):  # damaged
                    history._count(values, drawn)
        history.manifest.settle()
        return history

    def _add(self, values: Any) -> bool:
        """Take a record; return whether it is new."""
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

    @cached_property
    def endings(self) -> Counter[str]:
        """Attempts by their ending."""
        return Counter(a.ending for lane in self.lanes for a in lane.attempts)

    @cached_property
    def slow(self) -> float:
        """Half of the tasks' median speed; 0 for too few tasks."""
        speeds = [lane.speed for lane in self.lanes]
        return median(speeds) / 2 if len(speeds) > 2 else 0.0

    @cached_property
    def hardware(self) -> dict[str, str]:
        """A host's hardware, by its attempts."""
        return {a.host: a.hardware for lane in self.lanes for a in lane.attempts}

    @cached_property
    def total(self) -> Effort:
        whole = Effort()
        for work in self.hosts.values():
            whole.seconds.update(work.seconds)
            whole.rows += work.rows
        return whole

    @cached_property
    def slowest(self) -> list[tuple[str, Outcome]]:
        done = self.manifest.computed(self.manifest.done)
        return heapq.nlargest(SLOWEST, done.items(), key=lambda p: p[1].seconds)

    @property
    def span(self) -> tuple[float, float]:
        """The first start and the last sign of life, in seconds since the epoch."""
        pairs = [(a.started, a.updated) for lane in self.lanes for a in lane.attempts]
        every = [
            *self.manifest.done.values(),
            *self.manifest.underived.values(),
            *(f for g in self.manifest.failures.values() for f in g),
        ]
        pairs += [(o.started, o.finished) for o in every if o.started]
        return (min(s for s, _ in pairs), max(e for _, e in pairs)) if pairs else (0.0, 0.0)
