"""Where a run's time went: progress over time, stages, and hosts compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np

from d2m_hpc.run.manifest import Outcome
from d2m_hpc.watch.page import charts
from d2m_hpc.watch.page.charts import Axis, Chart, Curve, Values
from d2m_hpc.watch.page.history import History

POINTS = 200
"""Points of a curve."""
INTERVALS = 60
SLOW = 1.5
"""A slow host takes this many times the median host's seconds for a shard."""
STAGES = {
    "stage": ("violet", "bringing the tar to the node"),
    "decode": ("amber", "reading, decoding and resizing, all threads together"),
    "wait": ("red", "waiting for a batch that is not decoded yet"),
    "compute": ("blue", "running the models"),
    "write": ("green", "writing and committing the outputs"),
}
"""A colour and an explanation of each stage in a record's `seconds`."""


def progress(history: History, done: Mapping[str, Outcome], shards: int, axis: Axis) -> list[Chart]:
    """Draw shards done and failed, and samples a second of all tasks, over time."""
    begin, end = history.span
    whole = np.array([0.0, end - begin])
    curves = [
        Curve("planned", "grey", whole, np.full(2, float(shards))),
        _stairs("done", "green", [o.finished for o in done.values()], begin, end),
    ]
    if failures := history.manifest.failures.values():
        last = [failed[-1].finished for failed in failures]
        curves.append(_stairs("failed, and not done since", "red", last, begin, end))
    drawn = [charts.lines(curves, axis, "shards", "Shards done and failed against time")]
    if not done:
        return drawn
    known = np.array(
        [(o.started - begin, o.finished - begin, o.rows) for o in done.values()], np.float64
    )
    edges = np.linspace(0.0, max(end - begin, 1e-3), INTERVALS + 1)
    pace = np.maximum(rate(known[:, 0], known[:, 1], known[:, 2], edges), 0)
    line = Curve("samples a second", "blue", np.repeat(edges, 2)[1:-1], np.repeat(pace, 2))
    title = "samples a second, all tasks together"
    return [*drawn, charts.lines([line], axis, title, "Samples a second against time")]


def _stairs(name: str, colour: str, times: list[float], begin: float, end: float) -> Curve:
    """A curve that counts times as they come, from begin to end."""
    inner = sorted(times) if len(times) < POINTS else np.linspace(begin, end, POINTS)
    at = np.array([begin, *inner, end])
    x, y = np.repeat(at - begin, 2), np.repeat(cumulative(times, at), 2)
    return Curve(name, colour, x[1:], y[:-1])


def cumulative(times: Iterable[float], at: Values) -> Values:
    """The number of times up to each moment."""
    ordered = np.sort(np.fromiter(times, np.float64))
    return np.searchsorted(ordered, at, side="right").astype(np.float64)


def rate(started: Values, finished: Values, rows: Values, edges: Values) -> Values:
    """Rows a second between each two edges; each shard's rows are spread over its time."""
    pace = rows / np.maximum(finished - started, 1e-3)
    until = _ramps(started, pace, edges) - _ramps(np.maximum(finished, started + 1e-3), pace, edges)
    return np.diff(until) / np.diff(edges)


def _ramps(begin: Values, slope: Values, at: Values) -> Values:
    """The sum of slope * max(0, at - begin)."""
    order = np.argsort(begin)
    begin, slope = begin[order], slope[order]
    slopes = np.concatenate([[0.0], np.cumsum(slope)])
    moments = np.concatenate([[0.0], np.cumsum(slope * begin)])
    known = np.searchsorted(begin, at)
    result: Values = at * slopes[known] - moments[known]
    return result


@dataclass
class Host:
    """The work of one host; `seconds` are the mean for a shard."""

    name: str
    shards: int
    rows: int
    seconds: float
    is_slow: bool = False

    @property
    def speed(self) -> float:
        """Rows a second of one task."""
        return self.rows / (self.seconds * self.shards)


def hosts(done: Iterable[Outcome]) -> list[Host]:
    """All hosts, the slowest first."""
    grouped: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in done:
        grouped[outcome.host].append(outcome)
    found = [
        Host(
            name, len(group), sum(o.rows for o in group), sum(o.seconds for o in group) / len(group)
        )
        for name, group in grouped.items()
    ]
    middle = median(h.seconds for h in found) if found else 0.0
    for host in found:
        host.is_slow = len(found) > 2 and host.seconds > SLOW * middle
    return sorted(found, key=lambda h: -h.seconds)
