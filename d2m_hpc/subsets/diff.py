"""Compare the finished outputs of two runs, one shard of each in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.plan.standing import standings
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.storage.texts import counted
from d2m_hpc.subsets.finished import readable

KEPT = 100_000
"""Shifts of a column that quantiles are taken of; of more rows, so many drawn at random."""
QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
FEW = 5
"""Rows that are named of those that only one run has."""


@dataclass
class Shift:
    """How the values of a column differ: those of the second run less those of the first.

    Attributes:
        rows: rows that both runs have.
        different: rows of other values, beyond the tolerance.
        quantiles: of a column of numbers, by their share: of the shifts of rows with both numbers;
            of a feature, of the largest difference in a row.
    """

    rows: int = 0
    different: int = 0
    quantiles: dict[float, float] = field(default_factory=dict)


@dataclass
class Difference:
    """Two runs' finished outputs, compared.

    Attributes:
        rows: rows that both have.
        only: the number of rows that one run alone has, for each of the two.
        some: a few of these rows, as `SHARD/ROW`.
        missing: names of columns and features that one run alone has, for each of the two.
        shifts: by column and feature that both have.
        unfinished: shards of each run that were not read.
    """

    rows: int = 0
    only: list[int] = field(default_factory=lambda: [0, 0])
    some: list[list[str]] = field(default_factory=lambda: [[], []])
    missing: list[list[str]] = field(default_factory=lambda: [[], []])
    shifts: dict[str, Shift] = field(default_factory=dict)
    unfinished: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def is_equal(self) -> bool:
        same = not any(shift.different for shift in self.shifts.values())
        return same and not any(self.only) and not any(self.missing)


class _Shifts:
    """The shifts of one column, of which a bounded number is kept."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._kept: NDArray[np.float64] = np.empty((2, 0))
        self._ends: list[float] = []

    def add(self, shifts: NDArray[np.float64]) -> None:
        if not shifts.size:
            return
        self._ends = [
            min([*self._ends, float(shifts.min())]),
            max([*self._ends, float(shifts.max())]),
        ]
        lots = self._random.random(shifts.size)
        self._kept = np.concatenate([self._kept, [lots, shifts]], axis=1)
        if self._kept.shape[1] > KEPT:
            self._kept = self._kept[:, np.argpartition(self._kept[0], KEPT)[:KEPT]]

    def quantiles(self) -> dict[float, float]:
        if not self._ends:
            return {}
        found = dict(zip(QUANTILES, np.quantile(self._kept[1], QUANTILES).tolist(), strict=True))
        return found | {0.0: self._ends[0], 1.0: self._ends[-1]}


class _Run:
    def __init__(self, run: RunDir, config: Config) -> None:
        found = standings(run, config)
        self.output = OutputDir(config.output_metadata_dir)
        self.rows = {stem: outcome.rows for stem, outcome in found.done.items()}
        self.unfinished = len(found.stems) - len(found.done)

    def table(self, stem: str) -> pa.Table:
        with readable(self.output.path(stem)):
            return Pair(self.output, stem).table()

    def features(self, stem: str) -> dict[str, NDArray[Any]]:
        with readable(self.output.path(stem)):
            return Pair(self.output, stem).features()


def compare(
    first: tuple[RunDir, Config],
    second: tuple[RunDir, Config],
    by: str = "key",
    tolerance: float = 0.0,
    features: bool = False,
    on_shards: Callable[[int, int], None] = lambda done, total: None,
) -> Difference:
    """Compare runs shard by shard: rows are matched within shards of one name.

    Args:
        by: the column that tells rows: `key`, `uid` or another one of texts.
        tolerance: numbers that differ by no more are equal.
        features: compare the arrays of the npz, too.
        on_shards: called with the number of shards read, and of all.

    Raises:
        ConfigError: a run has no column `by`.
        D2MError: a file cannot be read.
    """
    runs = _Run(*first), _Run(*second)
    found, shifts = Difference(unfinished=[run.unfinished for run in runs]), dict[str, _Shifts]()
    seen: tuple[set[str], set[str]] = (set(), set())
    stems = sorted({*runs[0].rows, *runs[1].rows})
    for number, stem in enumerate(stems):
        there = [stem in run.rows for run in runs]
        if all(there):
            both = [_columns(run, stem, features) for run in runs]
            for names, columns in zip(seen, both, strict=True):
                names.update(columns)
            _compare_shard(stem, both, by, tolerance, found, shifts)
        else:
            side = there.index(True)
            found.only[side] += runs[side].rows[stem]
            found.some[side] += [f"{stem}/*"] * (len(found.some[side]) < FEW)
        on_shards(number + 1, len(stems))
    found.missing = [sorted(seen[0] - seen[1]), sorted(seen[1] - seen[0])]
    for name, shift in found.shifts.items():
        shift.quantiles = shifts[name].quantiles() if name in shifts else {}
    return found


def _columns(run: _Run, stem: str, features: bool) -> dict[str, Any]:
    """The columns of a shard, and the arrays, by name."""
    table = run.table(stem)
    arrays = run.features(stem) if features else {}
    return {name: table[name].combine_chunks() for name in table.column_names} | arrays


def _compare_shard(
    stem: str,
    both: list[dict[str, Any]],
    by: str,
    tolerance: float,
    found: Difference,
    shifts: dict[str, _Shifts],
) -> None:
    places = [_places(columns, by, stem) for columns in both]
    shared = [row for row in places[0] if row in places[1]]
    found.rows += len(shared)
    for side, other in ((0, 1), (1, 0)):
        alone = [row for row in places[side] if row not in places[other]]
        found.only[side] += len(alone)
        found.some[side] += [f"{stem}/{key}" for key, _ in alone[: FEW - len(found.some[side])]]
    rows = [np.array([place[row] for row in shared], np.int64) for place in places]
    for name in both[0].keys() & both[1].keys() - {by}:
        values = [
            columns[name].take(pa.array(at))
            if isinstance(columns[name], pa.Array)
            else columns[name][at]
            for columns, at in zip(both, rows, strict=True)
        ]
        differ, numbers = _differ(values[0], values[1], tolerance)
        shift = found.shifts.setdefault(name, Shift())
        shift.rows += len(shared)
        shift.different += int(differ.sum())
        if numbers is not None:
            shifts.setdefault(name, _Shifts(len(shifts))).add(numbers)


def _places(columns: Mapping[str, Any], by: str, stem: str) -> dict[tuple[str, int], int]:
    """The place of each row by its name, and the number of earlier rows of that name."""
    if by not in columns:
        raise ConfigError("diff", [f"--by: {stem}.parquet has no column {by!r}"])
    seen: dict[str, int] = {}
    found = {}
    for place, key in enumerate(columns[by].to_pylist()):
        found[str(key), seen.get(key, 0)] = place
        seen[key] = seen.get(key, 0) + 1
    return found


def _differ(
    first: Any, second: Any, tolerance: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64] | None]:
    """The rows that differ, and of numbers, by how much."""
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return _differ_arrays(first, second, tolerance)
    if all(map(_is_number, (first.type, second.type))):
        a, b = (values.cast(pa.float64(), safe=False) for values in (first, second))
        exact = _unequal(first, second) if first.type == second.type else _unequal(a, b)
        shift = pc.subtract(b, a).drop_null().to_numpy(zero_copy_only=False)
        if tolerance:
            far = pc.fill_null(pc.greater(pc.abs(pc.subtract(b, a)), tolerance), True)
            exact &= far.to_numpy(zero_copy_only=False)
        return exact, shift[np.isfinite(shift)]
    return _unequal(first, second), None


def _unequal(first: pa.Array, second: pa.Array) -> NDArray[np.bool_]:
    """The rows of other values; two nulls are equal, and so are two NaN."""
    if first.equals(second):
        return np.zeros(len(first), bool)
    pairs = zip(first.to_pylist(), second.to_pylist(), strict=True)
    return np.array([a != b and not (a != a and b != b) for a, b in pairs], bool)


def _differ_arrays(
    first: Any, second: Any, tolerance: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64] | None]:
    if not all(isinstance(a, np.ndarray) for a in (first, second)) or first.shape != second.shape:
        return np.ones(len(first), bool), None
    rows = (a.reshape(len(a), -1).astype(np.float64) for a in (first, second))
    far = np.abs(next(rows) - next(rows)).max(axis=1, initial=0.0)
    return far > tolerance, far


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def lines(found: Difference, names: tuple[str, str]) -> Iterator[str]:
    """The comparison as lines for people."""
    yield f"{counted(found.rows, 'row is', 'rows are')} in both"
    for side, name in enumerate(names):
        if found.unfinished[side]:
            yield f"left out: {counted(found.unfinished[side], 'shard')} of {name}, not finished"
        if found.only[side]:
            few = ", ".join(found.some[side])
            yield f"{counted(found.only[side], 'row is', 'rows are')} in {name} alone: {few}"
        if found.missing[side]:
            yield f"columns of {name} alone: {', '.join(found.missing[side])}"
    for name, shift in sorted(found.shifts.items()):
        if not shift.different:
            continue
        share = shift.different / shift.rows
        told = f"{name}: {counted(shift.different, 'row differs', 'rows differ')} ({share:.1%})"
        parts = [f"{q:.0%} {value:+.3g}" for q, value in shift.quantiles.items()]
        yield f"{told}; shifts by quantile: {', '.join(parts)}" if parts else told
    equal = sum(not shift.different for shift in found.shifts.values())
    yield f"{equal} of {len(found.shifts)} columns are equal"
