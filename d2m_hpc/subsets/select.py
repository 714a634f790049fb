"""Select the uids of a run's best samples, as DataComp's tools take a subset."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage import asked_for
from d2m_hpc.storage.texts import nearest
from d2m_hpc.subsets.samples import UID, Pool, is_of_file, opened
from d2m_hpc.subsets.widest import NUMBERS, quoted

WHERE = "select"
SUBSET = np.dtype("u8,u8")
"""The first 16 and the last 16 hex digits of a uid."""


@dataclass(frozen=True)
class Query:
    """The samples to select.

    Attributes:
        where: an SQL expression over the columns.
        by: the column of scores for `top`, or empty.
        top: the best share of the samples that pass, up to 1, or a number of samples; 0 for all.
    """

    where: str = "true"
    by: str = ""
    top: float = 0.0

    @property
    def mistakes(self) -> list[str]:
        """Mistakes that do not depend on the columns."""
        found = []
        if not (0 <= self.top <= 1 or (self.top > 1 and self.top % 1 == 0)):
            valid = "a share up to 1, such as 0.3, or a whole number of samples"
            found.append(f"--top: found {self.top:g}; valid is {valid}")
        if bool(self.top) != bool(self.by):
            found.append("--top and --by: found one without the other; valid are both or none")
        return found

    @property
    def condition(self) -> str:
        """The condition in SQL: null, and so undecided, where there is no score."""
        where = f"(\n{self.where}\n)::BOOLEAN"
        return f"{where} AND {quoted(self.by)} = {quoted(self.by)}" if self.by else where

    def count(self, samples: int) -> int:
        """The number of samples to take from this many."""
        if not self.top:
            return samples
        # From the typed decimal number: 0.29 * 100 is 28.999... in binary.
        share = Fraction(str(self.top))
        return int(share * samples) if share <= 1 else min(int(share), samples)


@dataclass(frozen=True)
class Selection:
    """Counts of the finished shards' rows.

    Attributes:
        undecided: rows whose condition is null, for want of a value; they are not chosen.
        passed: rows that fulfil the condition.
        without_uid: rows of `passed` without a usable uid.
        repeated: rows of `passed` beyond the first of each uid.
        chosen: uids in the subset.
        unfinished: shards that were not read.
        notices: remarks on types that differ between shards.
    """

    rows: int
    undecided: int
    passed: int
    without_uid: int
    repeated: int
    chosen: int
    unfinished: int = 0
    notices: tuple[str, ...] = ()


def select(
    run: RunDir,
    config: Config,
    query: Query,
    path: Path,
    on_shards: Callable[[int, int], None] | None = None,
) -> Selection:
    """Write the chosen uids to an npy: [chosen] of dtype `u8,u8`, sorted, each once.

    The file is replaced whole, and only where a uid was chosen. Ties of `by` go to the lower uid;
    of several rows with one uid, the best score counts.

    Args:
        on_shards: called with the number of shards read so far, and of all.

    Raises:
        ConfigError: the condition or column cannot be evaluated, or the file cannot be written.
        D2MError: no shard is finished, or a parquet cannot be read.
    """
    if query.mistakes:
        raise ConfigError(WHERE, query.mistakes)
    asked_for.require_writable(path)
    with opened(run, config) as pool:
        _check(pool, query)
        with _explained(pool, query):
            _keep(pool, query, on_shards)
        selection = _choose(pool, query)
        if selection.chosen:
            asked_for.write(path, _npy(pool, selection.chosen))
    return selection


def _check(pool: Pool, query: Query) -> None:
    """Raise a `ConfigError` for a wrong query, before anything is read."""
    if pool.columns.get("uid") != "VARCHAR":
        raise ConfigError(WHERE, ["there is no column of uids; name `uid` in additional_fields"])
    if query.by and pool.columns.get(query.by) not in NUMBERS:
        numeric = [name for name, kind in pool.columns.items() if kind in NUMBERS]
        raise ConfigError(
            WHERE, [f"--by: found {query.by!r}, no column of numbers{nearest(query.by, numeric)}"]
        )
    with _explained(pool, query):
        pool.db.view("pool").filter(query.where)  # raises for two expressions, or an unknown column


@contextmanager
def _explained(pool: Pool, query: Query) -> Iterator[None]:
    """Raise duckdb's objection to the condition as a `ConfigError` of one line."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        if is_of_file(error):
            raise
        reason = str(error).splitlines()[0]
        if unknown := re.search(r'Referenced column "(.*?)" not found', reason):
            reason = f"unknown column {unknown[1]!r}{nearest(unknown[1], pool.columns)}"
        raise ConfigError(WHERE, [f"--where: found {query.where!r}: {reason}"]) from error


def _keep(pool: Pool, query: Query, on_shards: Callable[[int, int], None] | None) -> None:
    """Make the table `kept` of rows that pass, and of rows that are undecided."""
    db, score = pool.db, quoted(query.by) if query.by else "0"
    db.execute("CREATE TABLE kept (high UBIGINT, low UBIGINT, score DOUBLE, passes BOOLEAN)")
    for _ in pool.groups(on_shards):
        rows = f"SELECT {UID}, {score} AS score, {query.condition} AS passes FROM pool"
        db.execute(f"INSERT INTO kept FROM ({rows}) WHERE passes IS DISTINCT FROM false")


def _choose(pool: Pool, query: Query) -> Selection:
    """Make the table `chosen`."""
    db = pool.db
    counts = "count(*) FILTER (passes IS NULL), count(*) FILTER (passes)"
    no_uid = "count(*) FILTER (passes AND high IS NULL)"
    undecided, passed, without_uid = _row(pool, f"SELECT {counts}, {no_uid} FROM kept")
    db.execute(
        "CREATE TABLE samples AS SELECT high, low, max(score) AS score FROM kept "
        "WHERE passes AND high IS NOT NULL GROUP BY high, low"
    )
    (samples,) = _row(pool, "SELECT count(*) FROM samples")
    chosen = query.count(samples)
    db.execute(
        "CREATE TABLE chosen AS SELECT high, low FROM samples "
        f"ORDER BY score DESC, high, low LIMIT {chosen}"
    )
    return Selection(
        rows=pool.rows,
        undecided=undecided,
        passed=passed,
        without_uid=without_uid,
        repeated=passed - without_uid - samples,
        chosen=chosen,
        unfinished=pool.unfinished,
        notices=(*pool.notices, *pool.roundings()),
    )


def _row(pool: Pool, query: str) -> tuple[int, ...]:
    row = pool.db.execute(query).fetchone()
    assert row is not None
    return row


def _npy(pool: Pool, count: int) -> Iterator[bytes]:
    """The file in parts, as `numpy.save` writes it."""
    header = io.BytesIO()
    described = {"descr": SUBSET.descr, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, described)
    yield header.getvalue()
    ordered = pool.db.sql("SELECT high, low FROM chosen ORDER BY high, low")
    for batch in pa.RecordBatchReader.from_stream(ordered):
        uids = np.empty(len(batch), SUBSET)
        uids["f0"], uids["f1"] = batch["high"].to_numpy(), batch["low"].to_numpy()
        yield uids.tobytes()
