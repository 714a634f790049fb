"""The sections that tell where the time went: progress, stages, shards and hosts."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from d2m_hpc.run.manifest import Outcome
from d2m_hpc.watch.page import charts
from d2m_hpc.watch.page.charts import Axis, Line
from d2m_hpc.watch.page.frame import Found, moment, note, section
from d2m_hpc.watch.page.history import Work, cumulative, rate
from d2m_hpc.watch.page.markup import Markup, element, join, table

POINTS = 200
"""Of a curve."""
INTERVALS = 60
SLOWEST = 10
HOSTS = 20
STAGES = {
    "stage": ("violet", "bringing the tar to the node"),
    "decode": ("amber", "reading, decoding and resizing, all threads together"),
    "wait": ("red", "waiting for a batch that is not decoded yet"),
    "compute": ("blue", "running the models"),
    "write": ("green", "writing and committing the outputs"),
}
"""What a record's `seconds` are of."""


def progress(found: Found) -> Markup:
    """Shards and samples against time."""
    begin, end = found.history.span
    if not end:
        return section("Progress", note("No task has begun."))
    manifest = found.history.manifest
    axis = charts.time_axis(end - begin, moment(begin))
    whole = np.array([0.0, end - begin])
    curves = [
        Line("planned", "grey", whole, np.full(2, float(found.summary.shards))),
        _count("done", "green", [o.finished for o in found.done.values()], begin, end),
    ]
    if manifest.failures:
        last = [r[-1].finished for r in manifest.failures.values()]
        curves.append(_count("failed, and not done since", "red", last, begin, end))
    told = charts.lines(curves, axis, "shards", "Shards done and failed against time")
    return section("Progress", told, _pace(list(found.done.values()), begin, end, axis))


def _count(name: str, colour: str, times: list[float], begin: float, end: float) -> Line:
    """How many of the times have come, from begin to end, as stairs."""
    inner = sorted(times) if len(times) < POINTS else np.linspace(begin, end, POINTS)
    at = np.array([begin, *inner, end])
    return Line(
        name, colour, np.repeat(at - begin, 2)[1:], np.repeat(cumulative(times, at), 2)[:-1]
    )


def _pace(done: list[Outcome], begin: float, end: float, axis: Axis) -> Markup | None:
    """Samples a second of all tasks together; each shard's are spread over its time."""
    if not done:
        return None
    known = np.array([(o.started - begin, o.finished - begin, o.rows) for o in done], np.float64)
    edges = np.linspace(0.0, max(end - begin, 1e-3), INTERVALS + 1)
    pace = rate(known[:, 0], known[:, 1], known[:, 2], edges)
    line = Line(
        "samples a second, all tasks together",
        "blue",
        np.repeat(edges, 2)[1:-1],
        np.repeat(np.maximum(pace, 0), 2),
    )
    return charts.lines([line], axis, "samples a second", "Samples a second against time")


def stages(found: Found) -> Markup:
    """Where the time went, overall, by host and by task."""
    history = found.history
    whole = _total(history.hosts.values())
    if not whole.seconds:
        told = note("No record tells of the stages' times; runs of older versions have none.")
        return section("Where the time went", told)
    by_task = heapq.nlargest(SLOWEST, history.tasks.items(), key=lambda p: _waiting(p[1]))
    rows = [("all", whole), *_busiest(history.hosts)]
    legend = charts.legend({colour: f"{s}: {words}" for s, (colour, words) in STAGES.items()})
    parts = [note(_verdict(whole)), legend, element("h3", "By host"), _stage_table("host", rows)]
    if len(history.tasks) > 1:
        shown = f"The {len(by_task)} tasks that waited most"
        parts += [element("h3", shown), _stage_table("task", by_task)]
    return section("Where the time went", *parts)


def _total(works: Iterable[Work]) -> Work:
    total = Work()
    for work in works:
        total.seconds.update(work.seconds)
        total.rows += work.rows
        total.shards += work.shards
    return total


def _busiest(hosts: Mapping[str, Work]) -> list[tuple[str, Work]]:
    return heapq.nlargest(HOSTS, hosts.items(), key=lambda pair: pair[1].shards)


def _waiting(work: Work) -> float:
    return work.seconds["wait"]


def _verdict(work: Work) -> str:
    """What the device did, in words."""
    wait, compute = work.seconds["wait"], work.seconds["compute"]
    share = wait / max(wait + compute, 1e-9)
    why = "more decode threads would help" if share > 0.3 else "decoding keeps up"
    return (
        f"The models waited for samples {share:.0%} of the time: {why}. Stages overlap: these are "
        "seconds of work, that of all decode threads together, and not parts of the clock's time."
    )


def _stage_table(head: str, works: Iterable[tuple[str, Work]]) -> Markup:
    rows = [
        (_name(name), _bar(work), f"{work.rows:,}", *(f"{work.seconds[s]:,.1f}" for s in STAGES))
        for name, work in works
    ]
    names = [f"{s}, s" for s in STAGES]
    return table((head, "", "rows", *names), rows, figures=1 + len(STAGES))


def _name(words: str) -> Markup:
    return element("span", words or "(not recorded)", class_="name")


def _bar(work: Work) -> Markup:
    parts = {s: work.seconds[s] for s in STAGES}
    colours = {s: colour for s, (colour, _) in STAGES.items()}
    return charts.shares(parts, colours, max(sum(parts.values()), 1e-9))


def slowest(found: Found) -> Markup:
    """The slowest shards, and hosts compared."""
    done = found.history.manifest.done
    if not done:
        return section("Shards and hosts", note("No shard is done yet."))
    longest = heapq.nlargest(SLOWEST, done.items(), key=lambda pair: _seconds(pair[1]))
    rows = (
        (
            element("code", stem),
            _name(o.host),
            _name(o.task),
            f"{_seconds(o):,.1f}",
            f"{o.rows:,}",
            f"{o.rows / _seconds(o):,.1f}",
        )
        for stem, o in longest
    )
    head = ("shard", "host", "task", "seconds", "rows", "rows/s")
    return section(
        "Shards and hosts",
        element("h3", f"The {len(longest)} slowest shards"),
        table(head, rows, figures=3),
        element("h3", "Hosts"),
        _hosts(done.values()),
    )


def _seconds(outcome: Outcome) -> float:
    return max(outcome.finished - outcome.started, 1e-3)


def _hosts(done: Iterable[Outcome]) -> Markup:
    grouped: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in done:
        grouped[outcome.host].append(outcome)
    shown = heapq.nlargest(HOSTS, grouped.items(), key=lambda pair: _mean(pair[1]))
    rows = (
        (
            _name(host),
            f"{len(group):,}",
            f"{sum(o.rows for o in group):,}",
            f"{_mean(group):,.1f}",
            f"{sum(o.rows for o in group) / sum(map(_seconds, group)):,.1f}",
        )
        for host, group in shown
    )
    told = table(("host", "shards done", "rows", "seconds a shard", "rows/s"), rows, figures=4)
    more = len(grouped) - len(shown)
    return join([told, note(f"And {more:,} faster hosts.") if more else ""])


def _mean(group: list[Outcome]) -> float:
    return sum(map(_seconds, group)) / len(group)
