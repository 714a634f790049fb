"""Charts as stretched SVG without text, labelled in HTML so that letters keep their size.

A drawing is `WIDE` by `HIGH` units, whatever its size on the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d2m_hpc.watch.page.markup import Markup, element, join

WIDE, HIGH = 1000.0, 100.0
SKEWED = 50.0
"""A histogram whose highest bar is so many times its middle one counts in powers of ten."""


@dataclass(frozen=True)
class Axis:
    """A range of values, the values that are labelled, and what they are.

    Attributes:
        ticks: value and label.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    title: str

    def share(self, value: float) -> float:
        """How far along the axis a value stands, 0 to 1."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Line:
    """A curve; `colour` is a class of the style sheet."""

    name: str
    colour: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def steps(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round values from low to high: multiples of 1, 2 or 5 times a power of ten."""
    if not high - low > 1e-100:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """As short as it can be told apart: 12,000, 3.5, 0.0012."""
    if value == 0 or abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:.3g}"


def plain_axis(low: float, high: float, title: str) -> Axis:
    low, high = (low, high) if high > low else (low - 0.5, low + 0.5)
    return Axis(low, high, [(v, number(v)) for v in steps(low, high)], title)


def time_axis(seconds: float, since: str) -> Axis:
    """From 0 to so many seconds, in the unit that suits them."""
    units = (("seconds", 1, 120), ("minutes", 60, 7200), ("hours", 3600, 72 * 3600))
    name, unit, _ = next((u for u in units if seconds < u[2]), ("days", 86400, 0))
    high = max(seconds, 1e-3)
    ticks = [(v * unit, number(v)) for v in steps(0, high / unit)]
    return Axis(0.0, high, ticks, f"{name} since {since}")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def plot(drawing: Markup, x: Axis, y: Axis, label: str, height: int = 200) -> Markup:
    """A drawing between its axes.

    Args:
        label: what it shows, for those who do not see it.
        height: in CSS pixels.
    """
    grid = "".join(f"M0 {_high(y, v)}H{WIDE:.0f}" for v, _ in y.ticks)
    svg = canvas(join([element("path", d=grid, class_="grid"), drawing]), label)
    sides = [_label(t, "y", bottom=_percent(y.share(v))) for v, t in y.ticks]
    below = [_label(t, "x", left=_percent(x.share(v))) for v, t in x.ticks]
    return element(
        "div",
        element("div", y.title, class_="y-title"),
        element("div", svg, *sides, class_="plot", style=f"height:{height}px"),
        element("div", *below, class_="x-axis"),
        element("div", x.title, class_="x-title"),
        class_="chart",
    )


def canvas(drawing: Markup, label: str, high: float = HIGH) -> Markup:
    box = f"0 0 {WIDE:.0f} {high:.0f}"
    return element(
        "svg", drawing, viewBox=box, preserveAspectRatio="none", role="img", aria_label=label
    )


def _label(words: str, class_: str, **at: str) -> Markup:
    style = ";".join(f"{key}:{value}" for key, value in at.items())
    return element("span", words, class_=class_, style=style)


def _high(axis: Axis, value: float) -> str:
    return f"{HIGH * (1 - axis.share(value)):.2f}"


def lines(curves: Sequence[Line], x: Axis, y_title: str, label: str) -> Markup:
    """Curves over one x axis, the y axis from 0."""
    most = max((float(c.y.max()) for c in curves if len(c.y)), default=0.0)
    y = plain_axis(0.0, max(most, 1e-9) * 1.05, y_title)
    drawn = join(_curve(c, x, y) for c in curves)
    names = legend({c.colour: c.name for c in curves}) if len(curves) > 1 else ""
    return join([names, plot(drawn, x, y, label)])


def _curve(line: Line, x: Axis, y: Axis) -> Markup:
    points = (f"{WIDE * x.share(a):.1f} {_high(y, b)}" for a, b in zip(line.x, line.y, strict=True))
    return element("path", d="M" + "L".join(points), class_=f"line {line.colour}")


def legend(names: Mapping[str, str]) -> Markup:
    """Colours and what they stand for."""
    keys = (
        element("li", element("i", class_=f"swatch {colour}"), name)
        for colour, name in names.items()
    )
    return element("ul", *keys, class_="legend")


def histogram(values: NDArray[np.float64], unit: str, label: str, bins: int = 40) -> Markup:
    """How many of the values are in each of equal parts of their range; whole numbers, if few, have
    a bar each.

    Args:
        values: finite, at least one.
        unit: what they are.
    """
    counts, edges = np.histogram(values, _edges(values, bins))
    filled = counts[counts > 0]
    skewed = bool(filled.max() > SKEWED * np.median(filled))
    height: Callable[[float], float] = (lambda n: math.log10(1 + n)) if skewed else float
    x = plain_axis(float(edges[0]), float(edges[-1]), unit)
    y = _count_axis(int(filled.max()), height, skewed)
    bars = (
        _bar(x, y, float(a), float(b), int(n), height(n))
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
        if n
    )
    return plot(join(bars), x, y, label, height=130)


def _edges(values: NDArray[np.float64], bins: int) -> NDArray[np.float64]:
    low, high = float(values.min()), float(values.max())
    if high - low < bins and bool((values == np.round(values)).all()):
        return np.arange(low, high + 2) - 0.5
    return np.linspace(low, high, bins + 1)


def _count_axis(most: int, height: Callable[[float], float], skewed: bool) -> Axis:
    if skewed:
        marks = [10.0**i for i in range(int(math.log10(most)) + 1)]
    else:
        marks = [v for v in steps(0, most, 3) if v == int(v)]
    title = "rows, each line ten times the one below" if skewed else "rows"
    return Axis(0.0, height(most) * 1.05, [(height(v), number(v)) for v in marks], title)


def _bar(x: Axis, y: Axis, low: float, high: float, count: int, height: float) -> Markup:
    left, right = WIDE * x.share(low), WIDE * x.share(high)
    top = HIGH * (1 - y.share(height))
    middle = (low + high) / 2
    words = number(middle) if high - low == 1 else f"{number(low)} to {number(high)}"
    return element(
        "rect",
        element("title", f"{words}: {count:,}"),
        x=f"{left:.2f}",
        y=f"{top:.2f}",
        width=f"{max(right - left - 2, 1):.2f}",
        height=f"{HIGH - top:.2f}",
        class_="bar",
    )


def shares(parts: Mapping[str, float], colours: Mapping[str, str], whole: float) -> Markup:
    """A bar of parts, one after the other.

    Args:
        whole: what the full width stands for.
    """
    made = (
        element(
            "span",
            class_=colours[name],
            style=f"width:{_percent(value / whole)}",
            title=f"{name}: {number(value)}, {value / whole:.1%}",
        )
        for name, value in parts.items()
        if value > 0
    )
    return element("div", *made, class_="shares")
