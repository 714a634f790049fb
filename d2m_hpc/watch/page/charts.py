"""Axes, histograms and curves in drawing units; `page.html.j2` draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
BINS = 40
"""The bars of a histogram."""
WIDE, HIGH = 1000.0, 100.0
"""The size of a drawing in its own units."""
SKEWED = 50.0
"""The ratio of a histogram's highest to its middle bar above which the axis has powers of ten."""
CLIPPED = (0.5, 99.5)
"""The percentiles at the ends of a histogram's axis."""
ALIKE = 1e-9
"""Values that differ by less than this share of the largest are not drawn."""


@dataclass(frozen=True)
class Axis:
    """A range of values with labelled ticks and a title.

    Coordinates are texts, as templates print numbers for people: `1,000`.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    title: str

    def share(self, value: float) -> float:
        """The place of a value on the axis, 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def percent(self, value: float) -> str:
        return f"{100 * self.share(value):.2f}%"

    def right(self, value: float) -> str:
        """The place of a value on a horizontal axis."""
        return f"{WIDE * self.share(value):.1f}"

    def down(self, value: float) -> str:
        """The place of a value on a vertical axis, whose 0 is at the bottom."""
        return f"{HIGH * (1 - self.share(value)):.2f}"

    def across(self, length: float) -> str:
        """A length along a horizontal axis, long enough to be seen."""
        return f"{max(WIDE * self.share(self.low + length), 2):.1f}"

    def up(self, value: float) -> str:
        """A length along a vertical axis, whose 0 is at the bottom."""
        return f"{HIGH * self.share(value):.2f}"

    def places(self, values: Iterable[float], origin: float) -> list[str]:
        """The distinct places of values less `origin` on a horizontal axis."""
        return [f"{p}" for p in sorted({round(WIDE * self.share(v - origin)) for v in values})]


@dataclass(frozen=True)
class Curve:
    """A line; `colour` is a class of the style sheet."""

    name: str
    colour: str
    x: Values
    y: Values

    def path(self, x: Axis, y: Axis) -> str:
        return "M" + "L".join(
            f"{x.right(a)} {y.down(b)}" for a, b in zip(self.x, self.y, strict=True)
        )


@dataclass(frozen=True)
class Bar:
    """A bar from `low` to `high`, with a text for the pointer."""

    low: float
    high: float
    height: float
    words: str
    count: int = 0
    style: str = "bar"

    @property
    def is_rest(self) -> bool:
        """Whether the bar counts values beyond the axis."""
        return self.style == "bar rest"

    def width(self, x: Axis) -> str:
        return f"{max(WIDE * (x.share(self.high) - x.share(self.low)) - 2, 1):.2f}"


@dataclass(frozen=True)
class Chart:
    """Bars and curves between two axes; `label` describes them to those who cannot see."""

    x: Axis
    y: Axis
    label: str
    curves: Sequence[Curve] = ()
    bars: Sequence[Bar] = ()


def steps(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values from low to high: multiples of 1, 2 or 5 times a power of ten."""
    if not high - low > 1e-100:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """The shortest text for a value: 12,000, 3.5, 0.0012."""
    if value == 0 or abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    """A share with two digits: 31 %, 0.42 %."""
    return f"{100 * share:.0f} %" if share >= 0.0995 or not share else f"{100 * share:.2g} %"


def plain_axis(low: float, high: float, title: str) -> Axis:
    low, high = (low, high) if high > low else (low - 0.5, low + 0.5)
    return Axis(low, high, [(v, number(v)) for v in steps(low, high)], title)


def time_axis(seconds: float, since: str) -> Axis:
    """An axis from 0 to a number of seconds, in a suitable unit."""
    units = (("seconds", 1, 120), ("minutes", 60, 7200), ("hours", 3600, 72 * 3600))
    name, unit, _ = next((u for u in units if seconds < u[2]), ("days", 86400, 0))
    high = max(seconds, 1e-3)
    ticks = [(v * unit, number(v)) for v in steps(0, high / unit)]
    return Axis(0.0, high, ticks, f"{name} since {since}")


def lines(curves: Sequence[Curve], x: Axis, y_title: str, label: str) -> Chart:
    """Draw curves over one x axis and a y axis from 0; whole numbers get whole ticks."""
    most = max((float(c.y.max()) for c in curves if len(c.y)), default=0.0)
    y = plain_axis(0.0, max(most, 1e-9) * 1.05, y_title)
    if all((c.y == np.round(c.y)).all() for c in curves):
        y = replace(y, ticks=[(v, words) for v, words in y.ticks if v == int(v)])
    return Chart(x, y, label, curves)


def are_alike(values: Values) -> bool:
    return bool(np.ptp(values) <= ALIKE * np.abs(values).max())


def histogram(values: Values, unit: str, label: str) -> Chart:
    """Count values in equal parts of their range; a few whole numbers get a bar each.

    The axis runs between two percentiles; a bar at each end counts the values beyond.

    Args:
        values: finite, at least one.
        unit: their name on the axis.
    """
    inner = _clipped(values)
    counts, edges = np.histogram(inner, _edges(inner))
    below, above = int((values < inner.min()).sum()), int((values > inner.max()).sum())
    skewed = bool(max(counts) > SKEWED * np.median([n for n in (*counts, below, above) if n]))
    first, last, step = float(edges[0]), float(edges[-1]), float(edges[1] - edges[0])
    found = [(first - step, first, below, f"below {number(inner.min())}")]
    inside = zip(pairwise(edges), counts, strict=True)
    found += [(a, b, int(n), _span(a, b)) for (a, b), n in inside]
    found += [(last, last + step, above, f"above {number(inner.max())}")]
    bars = [
        Bar(
            *(float(low), float(high), math.log10(1 + n) if skewed else float(n)),
            *(f"{words}: {n:,}", n, "bar" if first <= low < last else "bar rest"),
        )
        for low, high, n, words in found
        if n
    ]
    plain = plain_axis(first, last, unit)
    x = Axis(min(plain.low, bars[0].low), max(plain.high, bars[-1].high), plain.ticks, unit)
    return Chart(x, _count_axis(max(b.count for b in bars), skewed), label, bars=bars)


def _clipped(values: Values) -> Values:
    """The values between the percentiles; all values where these are alike."""
    low = np.percentile(values, CLIPPED[0], method="lower")
    high = np.percentile(values, CLIPPED[1], method="higher")
    inner: Values = values[(values >= low) & (values <= high)]
    return values if are_alike(inner) else inner


def _edges(values: Values) -> Values:
    low, high = float(values.min()), float(values.max())
    if high - low < BINS and bool((values == np.round(values)).all()):
        return np.arange(low, high + 2) - 0.5
    return np.linspace(low, high, BINS + 1)


def _span(low: float, high: float) -> str:
    middle = (low + high) / 2
    return number(middle) if high - low == 1 else f"{number(low)} to {number(high)}"


def _count_axis(most: int, skewed: bool) -> Axis:
    marks = [v for v in steps(0, most, 3) if v == int(v)]
    if not skewed:
        return Axis(0.0, most * 1.05, [(v, number(v)) for v in marks], "rows")
    marks = [10.0**i for i in range(int(math.log10(most)) + 1)]
    ticks = [(math.log10(1 + v), number(v)) for v in marks]
    title = "rows, each line ten times the one below"
    return Axis(0.0, math.log10(1 + most) * 1.05, ticks, title)


def survival(values: Values, rows: int, x: Axis, label: str) -> Chart:
    """The share of rows that each threshold keeps: rows at or above it.

    Args:
        values: of the rows that have one.
        rows: all rows, as a threshold drops rows without a value.
        x: the axis of the histogram above.
    """
    ordered = np.sort(values)

    def kept(at: float) -> float:
        return float(len(ordered) - np.searchsorted(ordered, at)) / max(rows, 1)

    def words(at: float) -> str:
        return f"{number(at)} keeps {percent(kept(at))}"

    at = np.linspace(x.low, x.high, 101)
    curve = Curve("kept", "green", at, np.array([kept(v) for v in at]))
    spots = np.linspace(x.low, x.high, 51)
    bars = [Bar(a, b, 1.0, words((a + b) / 2), style="spot") for a, b in pairwise(spots)]
    example = min((v for v, _ in x.ticks), key=lambda v: abs(kept(v) - 0.3))
    below = Axis(x.low, x.high, [(v, percent(kept(v))) for v, _ in x.ticks], "")
    title = f"rows at or above: {words(example)}"
    shares = Axis(0.0, 1.05, [(0.0, "0 %"), (1.0, "100 %")], title)
    return Chart(below, shares, label, [curve], bars)
