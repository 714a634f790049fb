"""The section that tells what every task did when, as a Gantt chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from d2m_hpc.watch.page import charts
from d2m_hpc.watch.page.charts import HIGH, WIDE, Axis
from d2m_hpc.watch.page.frame import Found, moment, note, section
from d2m_hpc.watch.page.history import Attempt, History, Lane
from d2m_hpc.watch.page.markup import Markup, element, join, table
from d2m_hpc.watch.terminal import duration

ENDINGS = {
    "finished": ("green", "finished"),
    "failed": ("amber", "finished, with failed shards"),
    "requeued": ("violet", "out of time, requeued"),
    "stopped": ("red", "stopped by a signal or an error"),
    "lost": ("grey", "fell silent: killed, or its node was lost"),
    "running": ("blue", "running"),
}


def tasks(found: Found) -> Markup:
    """A lane a task, a bar an attempt."""
    history = found.history
    if not history.lanes:
        return section("Tasks", note("No task has begun."))
    begin, end = history.span
    axis = charts.time_axis(end - begin, moment(begin))
    rows = [_lane(lane, axis, begin) for lane in history.shown]
    ruler = ("", _ruler(axis), "", "", "")
    head = ("task", "", "host", "samples/s", "rows")
    drawn = table(head, [*rows, ruler], figures=2, class_="tasks")
    return section("Tasks", _which(history), _key(history), drawn)


def _which(history: History) -> Markup:
    every = [a for lane in history.lanes for a in lane.attempts]
    counts = {e: sum(a.ending == e for a in every) for e in ENDINGS}
    ended = "; ".join(f"{n:,} {ENDINGS[e][1]}" for e, n in counts.items() if n)
    words = f"{len(history.lanes):,} tasks, {len(every):,} attempts: {ended}. "
    if len(history.shown) < len(history.lanes):
        shown = len(history.shown)
        words += f"Shown are {shown}: those with the most trouble, then the slowest ones. "
    marks = "A thin line in a bar is a shard done, a thick one across it a shard failed."
    return note(words, marks)


def _key(history: History) -> Markup:
    seen = {a.ending for lane in history.shown for a in lane.attempts}
    return charts.legend({c: words for ending, (c, words) in ENDINGS.items() if ending in seen})


def _lane(lane: Lane, axis: Axis, begin: float) -> Sequence[object]:
    """A row of the table."""
    bars = (_attempt(a, axis, begin) for a in lane.attempts)
    ticks = [
        _ticks(lane.done, axis, begin, "tick", 20),
        _ticks(lane.failed, axis, begin, "tick failed", -5),
    ]
    label = f"Attempts of task {lane.name}: " + ", ".join(a.ending for a in lane.attempts)
    hosts = list(dict.fromkeys(a.host for a in lane.attempts))
    return (
        lane.name,
        element("div", charts.canvas(join([*bars, *ticks]), label), class_="lane"),
        ", ".join(hosts[:2]) + (", ..." if len(hosts) > 2 else ""),
        f"{lane.speed:,.1f}",
        f"{sum(a.rows for a in lane.attempts):,}",
    )


def _attempt(attempt: Attempt, axis: Axis, begin: float) -> Markup:
    colour, words = ENDINGS[attempt.ending]
    left = WIDE * axis.share(attempt.started - begin)
    width = WIDE * axis.share(attempt.seconds)
    told = f"{duration(attempt.seconds)} on {attempt.host}, {attempt.done} shards done, "
    told += f"{attempt.failed} failed, {attempt.rows:,} rows; {words}"
    return element(
        "rect",
        element("title", told),
        x=f"{left:.1f}",
        y="5",
        width=f"{max(width, 2):.1f}",
        height="90",
        class_=f"attempt {colour}",
    )


def _ticks(
    times: Iterable[float], axis: Axis, begin: float, class_: str, top: int
) -> Markup | None:
    """A line for each moment, from `top` down; those that would stand at one place are one."""
    places = sorted({round(WIDE * axis.share(t - begin)) for t in times})
    if not places:
        return None
    return element("path", d="".join(f"M{p} {top}V{HIGH - top:.0f}" for p in places), class_=class_)


def _ruler(axis: Axis) -> Markup:
    marks = (
        element("span", words, class_="x", style=f"left:{100 * axis.share(v):.2f}%")
        for v, words in axis.ticks
    )
    title = element("div", axis.title, class_="x-title")
    return element("div", element("div", *marks, class_="x-axis"), title, class_="lane")
