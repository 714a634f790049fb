"""Predict when a run ends: by what its tasks took so far, play those that are left through."""

from __future__ import annotations

import heapq
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.tasks import ACTIVE_SECONDS, Progress

GAP = 8.0
"""Seconds from a task's end to the start of the next, before any was seen: Slurm's turn, and the
imports."""
AHEAD = 2
"""Shards that a task holds beyond the one in hand: one that is read, and the next."""
AT_ONCE = 300
"""Moments at which tasks at work are counted."""
PLAYED = 10_000
"""Shards that are played one by one."""
TASKS = 3000
"""Tasks, the newest ones, by which the others are predicted."""


@dataclass(frozen=True)
class Speeds:
    """What tasks took so far, in seconds.

    Attributes:
        shard: a shard on each host, once its task has begun.
        mean: a shard on a host of which nothing is known.
        start: from a task's start to its first shard, beyond what the shard takes by itself.
        gap: from a task's end to the start of the next one in its place.
    """

    shard: Mapping[str, float]
    mean: float
    start: float
    gap: float

    def of(self, task: Progress) -> float:
        return self.shard.get(task.host, self.mean)


def seconds_left(
    now: float,
    tasks: Sequence[Progress],
    done: Iterable[Outcome],
    left: int,
    *,
    steal: bool,
    running: int,
    pending: int,
) -> float | None:
    """The seconds until the last shard is done; None where no shard of these tasks is done yet.

    Args:
        now: in seconds since the epoch.
        tasks: the attempts that are at work or were.
        left: the shards that are not done.
        running, pending: the tasks that Slurm has; those that run may not have begun.
    """
    tasks = sorted(tasks, key=lambda t: t.started)[-TASKS:]
    ends = _ends(tasks, done)
    active = [t for t in tasks if t.state == "running" and now - t.updated < ACTIVE_SECONDS]
    speeds = _speeds(tasks, ends)
    if speeds is None:
        return None
    # Between two waves, none may be at work for a moment.
    at_once = max(running, len(active), _at_once(tasks, now, speeds) if pending else 0)
    if not at_once:
        return None
    places = []
    for task in active:
        into = now - max([task.started + speeds.start, *ends.get(task.task, ())])
        shard = max(speeds.of(task), into)  # the one in hand may take longer than those before
        own = max(task.shards - task.done - task.failed, 1)
        places.append(Seat(max(shard - into, 0.0), shard, own))
    fresh = max(running - len(active), 0)
    each = max(left - sum(place.own for place in places), 0) / max(pending + fresh, 1)
    coming = at_once - len(active)
    places += _coming(tasks, now, speeds, coming, each)
    if steal:
        return _shared(places, left)
    return _in_turn(places, speeds, each, max(pending - (coming - fresh), 0))


@dataclass(frozen=True)
class Seat:
    """Where a task is at work, or will soon be.

    Attributes:
        until: the seconds until its shard in hand is done.
        shard: the seconds that a shard takes there.
        own: shards of its chunk that are left.
    """

    until: float
    shard: float
    own: float


def _coming(
    tasks: Sequence[Progress], now: float, speeds: Speeds, count: int, each: float
) -> list[Seat]:
    """The tasks that will soon be at work, in the places of those that ended last."""
    over = sorted((t for t in tasks if t.state != "running"), key=lambda t: -t.updated)[:count]
    soon = [(max(speeds.gap - (now - t.updated), 0.0), speeds.of(t)) for t in over]
    soon += [(speeds.gap, speeds.mean)] * (count - len(over))
    return [Seat(rest + speeds.start + shard, shard, each) for rest, shard in soon]


def _at_once(tasks: Sequence[Progress], now: float, speeds: Speeds) -> int:
    """The most tasks that were at work together since a little before the last ones ended."""
    since = now - 2 * speeds.gap - speeds.mean
    lately = [t for t in tasks if t.state == "running" or t.updated > since]
    moments = [t.started for t in lately] + [since]
    return max(
        sum(t.started <= at and (t.state == "running" or t.updated >= at) for t in lately)
        for at in moments[-AT_ONCE:]
    )


def _ends(tasks: Iterable[Progress], done: Iterable[Outcome]) -> dict[str, list[float]]:
    """When the shards of each task were finished, in order."""
    ends: dict[str, list[float]] = {task.task: [] for task in tasks}
    for task, finished in map(attrgetter("task", "finished"), done):
        if task in ends:
            ends[task].append(finished)
    return {task: sorted(times) for task, times in ends.items() if times}


def _speeds(tasks: Sequence[Progress], ends: Mapping[str, list[float]]) -> Speeds | None:
    known = [t for t in tasks if t.task in ends]
    if not known:
        return None
    spans: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    firsts: dict[str, list[float]] = defaultdict(list)
    for task in known:
        first, *later = ends[task.task]
        firsts[task.host].append(first - task.started)
        if later:
            spans[task.host][0] += later[-1] - first
            spans[task.host][1] += len(later)
    if not spans:  # each task has done one shard
        shard = {host: max(statistics.mean(times), 1e-3) for host, times in firsts.items()}
        return Speeds(shard, statistics.mean(shard.values()), 0.0, _gap(tasks))
    shard = {host: max(span / n, 1e-3) for host, (span, n) in spans.items()}
    starts = [first - shard[host] for host in shard for first in firsts[host]]
    start = max(statistics.median(starts), 0.0)
    for host in firsts.keys() - shard.keys():
        shard[host] = max(statistics.mean(firsts[host]) - start, 1e-3)
    return Speeds(shard, statistics.mean(shard.values()), start, _gap(tasks))


def _place(task: Progress) -> tuple[str, str]:
    return task.host, task.task.partition("-")[0]


def _gap(tasks: Sequence[Progress]) -> float:
    """The median time in which another task of the same submission takes an ended one's place on
    its host; between submissions, the time is the user's."""
    later, free = (defaultdict[tuple[str, str], list[float]](list) for _ in range(2))
    for task in sorted(tasks, key=lambda t: -t.updated):
        if task.state != "running":
            later[_place(task)].append(task.updated)
    gaps = list[float]()
    for task in sorted(tasks, key=lambda t: t.started):
        ends, places = later[_place(task)], free[_place(task)]
        while ends and ends[-1] <= task.started:
            places.append(ends.pop())
        if places:
            gaps.append(task.started - places.pop())  # the place that was free last
    return statistics.median(gaps) if gaps else GAP


def _shared(places: Sequence[Seat], left: int) -> float:
    """Where tasks take what others have not begun, and keep the shards that they hold."""
    # Many shards are left: all but the last ones take their time together.
    many = max(left - PLAYED, 0)
    free = left - many - len(places)
    ahead = [0] * len(places)
    slowest = sorted(range(len(places)), key=lambda i: -places[i].shard)
    for i in (slowest * AHEAD)[: max(free, 0)]:
        ahead[i], free = ahead[i] + 1, free - 1
    ends = [(place.until, i) for i, place in enumerate(places)]
    heapq.heapify(ends)
    end = 0.0
    while ends:
        end, i = heapq.heappop(ends)
        if ahead[i]:
            heapq.heappush(ends, (end + places[i].shard, i))
            if free > 0:
                free -= 1
            else:
                ahead[i] -= 1
    return many / sum(1 / place.shard for place in places) + end


def _in_turn(places: Sequence[Seat], speeds: Speeds, each: float, pending: int) -> float:
    """Where each task does its own shards: pending tasks begin as others end."""
    ends = [(p.until + (p.own - 1) * p.shard, p.shard) for p in places]
    heapq.heapify(ends)
    for _ in range(pending):
        free, shard = ends[0]
        heapq.heapreplace(ends, (free + speeds.gap + speeds.start + each * shard, shard))
    return max(free for free, _ in ends)
