"""Describe one column for the page: a histogram and the rows that a threshold keeps, or counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from d2m_hpc.watch.page import charts
from d2m_hpc.watch.page.charts import Chart, Values, number
from d2m_hpc.watch.page.columns import LARGEST, Column

UNITS = {"number": "value", "list": "items in the list", "text": "characters"}


@dataclass
class Card:
    """A column on the page.

    Attributes:
        told: a sentence about the values.
        charts: a histogram and, for numbers, the share of rows above each value.
        counts: rows by text or truth value, the most frequent first.
    """

    name: str
    told: str = ""
    charts: list[Chart] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def card(column: Column) -> Card:
    """Choose what to show of a column."""
    if column.is_category and column.categories:
        missing = {"(no value)": column.missing} if column.missing else {}
        counts = Counter({**column.categories, **missing})
        return Card(column.name, counts=dict(counts.most_common()))
    values = column.values
    without = f"{column.missing:,} without a value" if column.missing else ""
    if not len(values):
        told = f"{column.rows:,} values of type {column.type}, not drawn"
        return Card(column.name, _listed([told, without]))
    unit = UNITS[column.kind]
    odd = column.rows - len(values)
    rest = [without, f"{odd:,} not finite or over {LARGEST:g}" if odd else ""]
    if charts.are_alike(values):
        return Card(column.name, _listed([_quartiles(values, unit), *rest]))
    histogram = charts.histogram(values, unit, f"Histogram of {column.name}")
    drawn = [histogram]
    if column.kind == "number":
        rows = column.rows + column.missing
        label = f"Share of rows at or above each value of {column.name}"
        drawn.append(charts.survival(values, rows, histogram.x, label))
    told = _listed([_quartiles(values, unit), *rest]) + _beyond(histogram)
    return Card(column.name, told, drawn)


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(filter(None, parts)) + "."


def _beyond(histogram: Chart) -> str:
    ends = [f"{b.count:,} {b.words.partition(':')[0]}" for b in histogram.bars if b.is_rest]
    return f" Beyond the axis, in grey: {' and '.join(ends)}." if ends else ""


def _quartiles(values: Values, unit: str) -> str:
    if values.min() == values.max():
        return f"{unit}: {number(values[0])} in all {len(values):,} rows"
    low, first, middle, third, high = map(number, np.percentile(values, [0, 25, 50, 75, 100]))
    return f"{low} to {high}, median {middle}, middle half {first} to {third}"
