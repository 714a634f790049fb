"""Account for the time of a run's tasks: what became of it, and what it was spent waiting for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import repeat
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.records import DIED
from d2m_hpc.run.tasks import Progress

Spans = npt.NDArray[np.float64]
STARVED = 0.3
"""A task that waits for samples for a larger share of its time has too few decode threads."""
BUSY, IDLE = 0.7, 0.5
"""A GPU that is busy for a larger share of time is the limit; for a smaller one, it is not."""


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


@dataclass
class Limits:
    """What bounds the speed of the tasks at work; where none is, of all.

    Attributes:
        wait_share: of the time on samples, in which no batch was decoded; None within a minute.
        gpu_busy_share: of that time, in which the GPUs computed; None where no driver told.
        starved: the tasks that wait for samples for more than `STARVED` of that time.
        advice: what makes the run faster, in words; empty where nothing stands out.
    """

    wait_share: float | None = None
    gpu_busy_share: float | None = None
    starved: list[str] = field(default_factory=list)
    advice: str = ""


def limits(tasks: Sequence[Progress]) -> Limits:
    """Tell whether tasks wait for samples, for their GPU, or for neither."""
    tasks = [t for t in tasks if t.is_active] or tasks
    worked, looks = sum(t.worked for t in tasks), sum(t.gpu_looks for t in tasks)
    found = Limits()
    if worked < 60:
        return found
    found.wait_share = share = round(sum(t.waited for t in tasks) / worked, 3)
    busy = round(sum(t.gpu_busy for t in tasks) / looks, 3) if looks else None
    found.gpu_busy_share = busy
    found.starved = [t.task for t in tasks if (t.wait_share or 0.0) > STARVED]
    if found.starved:
        who = f"{len(found.starved):,} of {len(tasks):,} tasks wait for samples over {STARVED:.0%}"
        helps = "more cores for each (slurm.cpus_per_task; nworkers, where it is set) help"
        found.advice = f"{who} of their time: {helps}; `d2m report` tells copying from decoding"
    elif busy is not None and busy > BUSY:
        found.advice = "the GPUs are the limit: more tasks at once (slurm.max_parallel) help"
    elif busy is not None and busy < IDLE and share < STARVED:
        found.advice = "the GPUs wait, and not for samples: a larger batch_size may help"
    return found


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


def at_work(done: Sequence[Outcome]) -> float:
    """The seconds in which at least one of these shards was worked on, whoever did it."""
    times = [np.fromiter(map(attrgetter(n), done), np.float64) for n in ("started", "finished")]
    return float(_union(np.array([np.zeros(len(done)), *times]), 1)[0][0])


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
