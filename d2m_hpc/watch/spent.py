"""Account for the time of a run's tasks: what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import repeat
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.records import DIED
from d2m_hpc.run.tasks import Progress

Spans = npt.NDArray[np.float64]


@dataclass
class Spent:
    """Hours of tasks; of those with a GPU, where some have one.

    Attributes:
        useful: on shards that are done.
        in_hand: on shards that tasks at work have in hand.
        lost: on shards that failed, or that a task had in hand when it was stopped or lost.
        idle: the rest: starts, nets that are loaded, waiting for other tasks.
    """

    useful: float = 0.0
    in_hand: float = 0.0
    lost: float = 0.0
    idle: float = 0.0

    @property
    def hours(self) -> float:
        return self.useful + self.in_hand + self.lost + self.idle

    def __str__(self) -> str:
        parts = {"useful": self.useful, "in hand": self.in_hand, "lost": self.lost}
        parts["idle"] = self.idle
        shown = (f"{name} {hours / self.hours:.0%}" for name, hours in parts.items() if hours)
        return f"{self.hours:,.1f} ({', '.join(shown)})"


def account(tasks: Sequence[Progress], done: Iterable[Outcome], failed: Iterable[Outcome]) -> Spent:
    """Divide the time of all attempts of tasks, as far as records and progress files tell."""
    tasks = [t for t in tasks if t.has_gpu] or tasks
    if not tasks:
        return Spent()
    places = {task.task: i for i, task in enumerate(tasks)}
    good, bad = _spans(places, done), _spans(places, failed)
    useful, _ = _union(good, len(tasks))
    worked, last = _union(np.hstack([good, bad]), len(tasks))
    spent = Spent(float(useful.sum()), 0.0, float((worked - useful).sum()))
    for task, known, end in zip(tasks, worked.tolist(), last.tolist(), strict=True):
        tail = max(task.updated - max(end, task.started), 0.0) if task.shard else 0.0
        kind = {"running": "in_hand", "finished": "idle", "failed": "idle"}.get(task.ending, "lost")
        setattr(spent, kind, getattr(spent, kind) + tail)
        spent.idle += max(task.seconds - known - tail, 0.0)
    return Spent(*(seconds / 3600 for seconds in astuple(spent)))


def _spans(places: Mapping[str, int], outcomes: Iterable[Outcome]) -> Spans:
    """Rows of tasks' places, starts and ends of shards.

    The record of a dead process tells no start, and its end is when the death was found.
    """
    told = [o for o in outcomes if o.kind != DIED]
    rows = [map(places.get, map(attrgetter("task"), told), repeat(-1))]
    rows += [map(attrgetter(name), told) for name in ("started", "finished")]
    spans = np.array([np.fromiter(row, np.float64, len(told)) for row in rows])
    return spans[:, spans[0] >= 0]


def _union(spans: Spans, count: int) -> tuple[Spans, Spans]:
    """The seconds of each task in at least one span, and the last end; 0 for a task without one.

    A task begins a shard before the last one is written.
    """
    if not spans.size:
        return np.zeros(count), np.zeros(count)
    place, start, end = spans[:, np.lexsort((spans[1], spans[0]))]
    # Each task's times lie beyond those of the one before, so that one pass goes over all.
    first, most = start.min(), max(end.max(), start.max()) - start.min() + 1.0
    start, end = start - first + place * most, np.maximum(end, start) - first + place * most
    until = np.maximum.accumulate(end)
    covered = np.maximum(0.0, end - np.maximum(start, np.concatenate([[-1.0], until[:-1]])))
    last = np.zeros(count)
    np.maximum.at(last, place.astype(int), end - place * most + first)
    return np.bincount(place.astype(int), covered, count).astype(np.float64), last
