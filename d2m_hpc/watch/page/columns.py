"""The values of the outputs' columns, from a sample of the finished shards, and their charts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.storage.texts import counted
from d2m_hpc.watch.page import charts
from d2m_hpc.watch.page.charts import Chart, Values, number

SHARDS = 64
"""Shards that are read; ten thousand rows each show any distribution."""
LARGEST = 1e100
"""The largest number on an axis; samples' JSON may hold larger ones."""
CATEGORIES = 12
"""Distinct texts up to which a column is counted by text, not by length."""

UNITS = {"number": "value", "list": "items in the list", "text": "characters"}


@dataclass
class Column:
    """The values of one type of one column.

    Attributes:
        kind: number, list (by length), text (by characters), truth, or other (rows only).
        type: the parquet's name of the type.
        parts: float64 values, an array for each shard, without NaN and numbers too large to draw.
        categories: rows by text or truth value; None for too many different ones.
        rows: rows with a value.
        missing: rows without a value.
    """

    name: str
    kind: str
    type: str
    parts: list[Values] = field(default_factory=list)
    categories: Counter[str] | None = field(default_factory=Counter)
    rows: int = 0
    missing: int = 0

    @property
    def values(self) -> Values:
        return np.concatenate(self.parts) if self.parts else np.zeros(0)

    @property
    def is_category(self) -> bool:
        """Whether a few texts, or truth values, come again and again."""
        few = self.categories is not None and 0 < len(self.categories) <= self.rows / 3
        return few and self.kind in ("text", "truth")

    def add(self, array: pa.ChunkedArray) -> None:
        self.missing += array.null_count
        array = array.drop_null()
        self.rows += len(array)
        if self.kind in ("text", "truth") and self.categories is not None:
            self._categorise(array)
        if (values := numbers(array, self.kind)) is not None:
            self.parts.append(values[np.abs(values) < LARGEST])

    def _categorise(self, array: pa.ChunkedArray) -> None:
        assert self.categories is not None
        for pair in pc.value_counts(array)[: CATEGORIES + 1]:
            self.categories[str(pair["values"].as_py())] += pair["counts"].as_py()
        if len(self.categories) > CATEGORIES:
            self.categories = None


def kind_of(type_: pa.DataType) -> str:
    """The kind of a type's values; 64 bits without a sign are a hash, not a quantity."""
    if pa.types.is_boolean(type_):
        return "truth"
    if pa.types.is_floating(type_) or (pa.types.is_integer(type_) and type_ != pa.uint64()):
        return "number"
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return "list"
    return "text" if pa.types.is_string(type_) or pa.types.is_large_string(type_) else "other"


def numbers(array: pa.ChunkedArray, kind: str) -> Values | None:
    """Float64 [rows]: values or lengths; None for a kind that has neither."""
    if kind == "list":
        array = pc.list_value_length(array)
    elif kind == "text":
        array = pc.utf8_length(array)
    elif kind != "number":
        return None
    values: Values = array.cast(pa.float64(), safe=False).to_numpy()
    return values


@dataclass
class Sampled:
    """The columns of some finished shards.

    Attributes:
        shards: stems of the shards that were read, in the order of the draw.
        of: the number of finished shards.
        unreadable: errors of drawn shards that could not be read, by stem.
    """

    columns: list[Column]
    shards: list[str]
    of: int
    unreadable: dict[str, str]

    @property
    def rows(self) -> int:
        return max((c.rows + c.missing for c in self.columns), default=0)


def sample(output: OutputDir, done: Collection[str], most: int = SHARDS) -> Sampled:
    """Read the parquets of some finished shards, drawn at random.

    Args:
        most: the number of shards to draw, by the same seed each time.
    """
    stems = sorted(done)
    drawn = random.Random(0).sample(stems, min(most, len(stems)))
    columns: dict[tuple[str, str], Column] = {}
    shards, unreadable = [], {}
    for stem in drawn:
        try:
            table = Pair(output, stem).table()
        except Exception as error:  # each store raises errors of its own
            unreadable[stem] = f"{type(error).__name__}: {error}"
            continue
        shards.append(stem)
        _add(table, columns)
    return Sampled(_settled(list(columns.values())), shards, len(stems), unreadable)


def _settled(columns: Sequence[Column]) -> list[Column]:
    """Leave out a type that a column has only where no row has a value."""
    filled = {c.name: c for c in reversed(columns) if c.rows}
    idle = [c for c in columns if not c.rows and c.name in filled]
    for column in idle:
        filled[column.name].missing += column.missing
    return [c for c in columns if c.rows or c.name not in filled]


def _add(table: pa.Table, columns: dict[tuple[str, str], Column]) -> None:
    for name in table.column_names:
        if name == "key":
            continue
        type_ = table.schema.field(name).type
        if pa.types.is_null(type_):
            continue
        kind = kind_of(type_)
        column = columns.setdefault((name, kind), Column(name, kind, str(type_)))
        column.add(table[name])


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
        told = f"{counted(column.rows, 'value')} of type {column.type}, not drawn"
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
        return f"{unit}: {number(values[0])} in all {counted(len(values), 'row')}"
    low, first, middle, third, high = map(number, np.percentile(values, [0, 25, 50, 75, 100]))
    return f"{low} to {high}, median {middle}, middle half {first} to {third}"
