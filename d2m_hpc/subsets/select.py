"""Select a run's best samples: by uid as DataComp's tools take them, by key, or as rows."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError, ShardError
from d2m_hpc.run.derived import require_steady
from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage import asked_for
from d2m_hpc.storage.texts import counted, nearest
from d2m_hpc.subsets import exports
from d2m_hpc.subsets.samples import FILE, PLACE, Pool, is_of_file, opened
from d2m_hpc.subsets.widest import INTEGERS, NUMBERS, quoted

WHERE = "select"
SUBSET = np.dtype("u8,u8")
"""The first 16 and the last 16 hex digits of a uid."""


@dataclass(frozen=True)
class Query:
    """The samples to select.

    Attributes:
        where: an SQL expression over the columns.
        by: the column of scores for `top`, or empty.
        top: the best share of the samples that pass, up to 1.0, or a number of samples; 0 for all.
        within: a column; `top` and `sample` are of each of its values, or empty.
        sample: a share or a number of these, drawn at random; 0 for all.
        weight: the column that makes some samples likelier to be drawn, or empty.
        seed: of the draw, by default 0; the same seed draws the same uids.
        join: a parquet with a column `uid`, or, for a run without uids, `shard` and `key`, whose
            other columns a query may use; or a subset as DataComp's tools write one, for the column
            `in_subset`.
    """

    where: str = "true"
    by: str = ""
    top: float = 0.0
    within: str = ""
    sample: float = 0.0
    weight: str = ""
    seed: int | None = None
    join: Path | None = None

    @property
    def mistakes(self) -> list[str]:
        """Mistakes that do not depend on the columns."""
        found = []
        valid = "a share up to 1, such as 0.3, or a whole number of samples"
        for name, number in (("--top", self.top), ("--sample", self.sample)):
            if not (0 <= number <= 1 or (number > 1 and number % 1 == 0)):
                found.append(f"{name}: found {number:g}; valid is {valid}")
            if number == 1 and isinstance(number, int):
                what = "may be one sample or all; valid is 1.0 for all, or from 2 samples on"
                found.append(f"{name}: found 1, which {what}")
        if self.top and not self.by:
            found.append("--top and --by: found --top without --by; valid are both")
        if self.within and not (self.top or self.sample):
            found.append("--within: found neither --top nor --sample; valid is one of them")
        if self.weight and not self.sample:
            found.append("--weight: found no --sample; valid are both")
        return found

    @property
    def choosing(self) -> list[str]:
        """The options by which samples are chosen among those that pass."""
        return ["--top"] * bool(self.top) + ["--sample"] * bool(self.sample)

    @property
    def scores(self) -> dict[str, str]:
        """The columns of numbers that the query names, by their options."""
        named = {"--by": self.by, "--weight": self.weight}
        return {option: name for option, name in named.items() if name}

    @property
    def condition(self) -> str:
        """The condition in SQL: null, and so undecided, where a value that is needed is missing."""
        needed = [quoted(name) for name in (self.by, self.within, self.weight) if name]
        return " AND ".join([f"(\n{self.where}\n)::BOOLEAN", *(f"{n} = {n}" for n in needed)])


@dataclass(frozen=True)
class Selection:
    """Counts of the finished shards' rows.

    Attributes:
        undecided: rows whose condition is null, for want of a value; they are not chosen.
        passed: rows that fulfil the condition.
        without_uid: rows of `passed` without a usable uid.
        repeated: rows of `passed` beyond the first of each uid.
        chosen: uids in the subset; with `survival` none.
        unfinished: shards that were not read.
        notices: remarks on types that differ between shards, and on weights.
        survival: thresholds of `by`, the number of samples that each keeps, and their share.
    """

    rows: int
    undecided: int
    passed: int
    without_uid: int
    repeated: int
    chosen: int
    unfinished: int = 0
    notices: tuple[str, ...] = ()
    survival: tuple[tuple[float, int, float], ...] = ()


def select(
    run: RunDir,
    config: Config,
    query: Query,
    path: Path | None,
    on_shards: Callable[[int, int], None] | None = None,
    columns: Sequence[str] = (),
    look: Callable[[Pool, Query, Selection], None] | None = None,
) -> Selection:
    """Write the chosen uids, sorted, each once, to an npy of dtype `u8,u8`, or to a parquet, or the
    keys of their rows, a line a shard.

    The file is replaced whole, and only where a uid was chosen. Ties of `by` go to the lower uid;
    of several rows with one uid, the best score counts. In a run without uids, shard and key tell
    samples apart.

    Args:
        path: the file; None to write none, for what thresholds of `by` keep or for a look.
        on_shards: called with the number of shards read so far, and of all.
        columns: of a parquet; by default the uid, or shard and key.
        look: called with the pool, which has the table `chosen`, the query, and what was chosen.

    Raises:
        ConfigError: the condition or column cannot be evaluated, or the file cannot be written.
        D2MError: no shard is finished, or a parquet cannot be read.
    """
    if mistakes := query.mistakes + _mistakes(query, path, columns, look is not None):
        raise ConfigError(WHERE, mistakes)
    if path:
        asked_for.require_writable(path)
    with opened(run, config, beside=query.join) as pool:
        columns = columns or (("shard", "key") if pool.by_name else ("uid",))
        _check(pool, query, path, columns)
        with _explained(pool, query):
            _keep(pool, query, on_shards)
        selection = _choose(pool, query)
        if look:
            look(pool, query, selection)
        if path is None:
            if not query.by or query.choosing:
                return selection
            return replace(selection, chosen=0, survival=_survival(pool))
        if selection.chosen:
            _write(pool, query, path, selection.chosen, columns)
    return selection


def _write(pool: Pool, query: Query, path: Path, chosen: int, columns: Sequence[str]) -> None:
    if path.suffix == ".npy":
        asked_for.write(path, _npy(pool, chosen))
        return
    with exports.whole(path) as file:
        if path.suffix == ".parquet":
            _write_rows(pool, query, columns, file)
        else:
            _write_lists(pool, query, file)


def _mistakes(
    query: Query, path: Path | None, columns: Sequence[str], is_looked_at: bool
) -> list[str]:
    if columns and (path is None or path.suffix != ".parquet"):
        return ["--column: found no name in .parquet for --output; valid are both"]
    if query.seed is not None and not (query.sample or is_looked_at):
        return ["--seed: found no --sample, which it is of; valid are both, or a page by --look"]
    if path is None and not is_looked_at:
        if query.choosing:
            named, valid = " and ".join(query.choosing), "valid are both, a page by --look, or --by"
            return [f"{named}: found no --output; {valid} alone to see what is kept"]
        if not query.by:
            return ["--output: found none; valid is a file, or --by COLUMN to see what is kept"]
    if path is not None and path.suffix not in (".npy", ".parquet", ".jsonl"):
        return [f"--output: found {str(path)!r}; valid is a name in .npy, .parquet or .jsonl"]
    if query.by and path is not None and not query.top:
        return ["--top and --by: found --by without --top; valid are both, or no --output"]
    return []


def _check(pool: Pool, query: Query, path: Path | None, columns: Sequence[str]) -> None:
    """Raise a `ConfigError` for a wrong query, before anything is read."""
    if pool.by_name and path and path.suffix == ".npy":
        what = "an .npy is of uids, and the run has no column `uid`; valid are .parquet and .jsonl"
        raise ConfigError(WHERE, [f"--output: {what}"])
    if not pool.by_name and pool.columns.get("uid") != "VARCHAR":
        what = "there is no column of uids; name `uid` in additional_fields"
        if "uid" not in pool.columns:
            [own] = [name for name in pool.columns if name.lower() == "shard"]
            what += f", or leave `{own}` out there, which hides the shards' own names"
        raise ConfigError(WHERE, [what])
    numeric = [name for name, kind in pool.columns.items() if kind in NUMBERS]
    wrong = [
        f"{option}: found {name!r}, no column of numbers{nearest(name, numeric)}"
        for option, name in query.scores.items()
        if name not in numeric
    ]
    named = [("--within", query.within)] if query.within else []
    wrong += [
        f"{option}: found {name!r}, no column{nearest(name, pool.columns)}"
        for option, name in [*named, *(("--column", name) for name in columns)]
        if name not in pool.columns
    ]
    if wrong:
        raise ConfigError(WHERE, wrong)
    with _explained(pool, query):
        pool.db.view("pool").filter(query.where)  # raises for two expressions, or an unknown column
    try:
        require_steady(query.where, [*pool.columns])
    except ShardError as error:
        raise ConfigError(WHERE, [f"--where: {error}; --sample draws, by its --seed"]) from None


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
        if isinstance(error, duckdb.PermissionException):
            reason += "; it reads the run's columns alone, and those of a file by --join"
        if unknown := re.search(r'Referenced column "(.*?)" not found', reason):
            reason = f"unknown column {unknown[1]!r}{nearest(unknown[1], pool.columns)}"
        odd = [name for name in pool.columns if not name.isidentifier()]
        if (odd and "Parser" in reason) or (unknown and any(n.startswith(unknown[1]) for n in odd)):
            reason += f"; a name that is no plain word stands in double quotes: {quoted(odd[0])}"
        raise ConfigError(WHERE, [f"--where: found {query.where!r}: {reason}"]) from error


def _score(pool: Pool, query: Query) -> tuple[str, str]:
    """What samples are ranked by, and its type: a float would round large integers."""
    kind = pool.columns.get(query.by, "")
    return (quoted(query.by) if query.by else "0"), kind if kind in INTEGERS else "DOUBLE"


def _keep(pool: Pool, query: Query, on_shards: Callable[[int, int], None] | None) -> None:
    """Make the table `kept` of rows that pass, and of rows that are undecided."""
    db, told = pool.db, pool.identity
    score, kind = _score(pool, query)
    stratum = f"{quoted(query.within)}::VARCHAR" if query.within else "''"
    weight = quoted(query.weight) if query.weight else "1"
    db.execute(
        f"CREATE TABLE kept (d2m_high UBIGINT, d2m_low UBIGINT, score {kind}, stratum VARCHAR, "
        "weight DOUBLE, passes BOOLEAN)"
    )
    for _ in pool.groups(on_shards):
        rows = f"SELECT {told}, {score}, {stratum}, {weight}, {query.condition} AS passes FROM pool"
        db.execute(f"INSERT INTO kept FROM ({rows}) WHERE passes IS DISTINCT FROM false")


def _choose(pool: Pool, query: Query) -> Selection:
    """Make the table `samples`, and of it the table `chosen`."""
    db = pool.db
    counts = "count(*) FILTER (passes IS NULL), count(*) FILTER (passes)"
    no_uid = "count(*) FILTER (passes AND d2m_high IS NULL)"
    undecided, passed, without_uid = _row(pool, f"SELECT {counts}, {no_uid} FROM kept")
    values = "{'score': score, 'stratum': stratum, 'weight': weight}"
    db.execute(
        f"CREATE TABLE samples AS SELECT d2m_high, d2m_low, unnest(max({values})) FROM kept "
        "WHERE passes AND d2m_high IS NOT NULL GROUP BY d2m_high, d2m_low"
    )
    (samples,) = _row(pool, "SELECT count(*) FROM samples")
    _take(pool, "best", "samples", "score DESC, d2m_high, d2m_low", query.top, query.within)
    # A number between 0 and 1 by md5, as duckdb's own hash may change with its version.
    digits = f"('0x' || md5(concat_ws(' ', d2m_high, d2m_low, {query.seed or 0}))[:13])::UBIGINT"
    # The smallest of these are a weighted sample without replacement (Efraimidis and Spirakis).
    order = f"-ln(({digits} + 0.5) / 2**52) / weight, d2m_high, d2m_low"
    source = "best WHERE weight > 0" if query.weight else "best"
    _take(pool, "chosen", source, order, query.sample, query.within)
    (chosen,) = _row(pool, "SELECT count(*) FROM chosen")
    (light,) = _row(pool, "SELECT count(*) FILTER (weight <= 0) FROM best")
    what = counted(light, "sample has", "samples have")
    what += f" a {query.weight!r} of 0 or less; never drawn"
    notices = [what] * bool(light)
    wanted = int(query.sample or query.top)
    if wanted > max(chosen, 1) and not query.within:
        notices.append(f"fewer than {wanted:,} are chosen, as no more samples are left to choose")
    return Selection(
        rows=pool.rows,
        undecided=undecided,
        passed=passed,
        without_uid=without_uid,
        repeated=passed - without_uid - samples,
        chosen=chosen,
        unfinished=pool.unfinished,
        notices=(*pool.notices, *pool.roundings(), *notices),
    )


def quota(wanted: float, samples: int) -> int:
    """The number of samples to take from this many, for a share up to 1 or a number."""
    # From the typed decimal number: 0.29 * 100 is 28.999... in binary.
    share = Fraction(str(wanted))
    return int(share * samples) if share <= 1 else min(int(share), samples)


def _take(pool: Pool, made: str, source: str, order: str, wanted: float, within: str) -> None:
    """Make a table of the first of some samples: a share or a number of all, or of each stratum.

    Args:
        wanted: 0 for all.
    """
    if not wanted:
        pool.db.execute(f"CREATE TABLE {made} AS FROM {source}")
        return
    if not within:
        (samples,) = _row(pool, f"SELECT count(*) FROM {source}")
        first = f"ORDER BY {order} LIMIT {quota(wanted, samples)}"
        pool.db.execute(f"CREATE TABLE {made} AS FROM {source} {first}")
        return
    share = Fraction(str(wanted))
    part = f"n::HUGEINT * {share.numerator} // {share.denominator}"
    most = part if share <= 1 else str(int(share))
    place = f"row_number() OVER (PARTITION BY stratum ORDER BY {order}) AS place"
    counted = f"SELECT *, {place}, count(*) OVER (PARTITION BY stratum) AS n FROM {source}"
    pool.db.execute(
        f"CREATE TABLE {made} AS SELECT * EXCLUDE (place, n) FROM ({counted}) WHERE place <= {most}"
    )


def _survival(pool: Pool) -> tuple[tuple[float, int, float], ...]:
    """Round thresholds of the score, with the number and the share of samples at or above each."""
    shares = [0.99, 0.95, *(tenth / 10 for tenth in range(9, 0, -1)), 0.05, 0.01]
    found = _row(
        pool, f"SELECT quantile_disc(score, {[round(1 - s, 2) for s in shares]}) FROM samples"
    )
    (samples,) = _row(pool, "SELECT count(*) FROM samples")
    table = []
    for threshold in dict.fromkeys(float(f"{value:.3g}") for value in found[0] or ()):
        (kept,) = _row(pool, f"SELECT count(*) FROM samples WHERE score >= '{threshold}'::DOUBLE")
        if kept:  # rounding may have led above the best
            table.append((threshold, kept, kept / samples))
    return tuple(table)


def _found(pool: Pool, query: Query, columns: str) -> Iterator[None]:
    """Make the table `found` of one group of shards after another: the row of each chosen sample
    that it was chosen by, and these columns. Others may have its uid, and not fulfil the condition.
    """
    score, kind = _score(pool, query)
    told = f"SELECT {pool.identity}, {score}::{kind} AS score, {FILE} AS file, {PLACE} AS place"
    rows = f"FROM ({told}, {{{columns}}} AS values FROM pool WHERE {query.condition}) "
    passed = "FROM kept WHERE passes AND d2m_high IS NOT NULL"
    (again,) = _row(pool, f"SELECT (SELECT count(*) {passed}) > (SELECT count(*) FROM samples)")
    pool.db.execute("CREATE TABLE left_over AS FROM chosen")
    rows += "SEMI JOIN left_over USING (d2m_high, d2m_low, score)"
    for _ in pool.groups():
        if not again:  # rows that need not be told apart need not be held, nor sorted twice
            pool.db.execute(f"CREATE OR REPLACE VIEW found AS {rows}")
            yield
            continue
        pool.db.execute(
            f"CREATE OR REPLACE TABLE found AS {rows} "
            "QUALIFY row_number() OVER (PARTITION BY d2m_high, d2m_low ORDER BY file, place) = 1"
        )
        pool.db.execute(
            "DELETE FROM left_over "
            "WHERE (d2m_high, d2m_low) IN (SELECT (d2m_high, d2m_low) FROM found)"
        )
        yield


def _write_rows(pool: Pool, query: Query, columns: Sequence[str], file: IO[bytes]) -> None:
    """Write the chosen samples' columns, a row for each uid, as a parquet."""
    named = ", ".join(f"{quoted(name)}: {quoted(name)}" for name in dict.fromkeys(columns))
    writer = None
    for _ in _found(pool, query, named):
        rows = pool.db.sql("SELECT unnest(values) FROM found ORDER BY file, place")
        for batch in pa.RecordBatchReader.from_stream(rows):
            writer = writer or pq.ParquetWriter(file, batch.schema, compression="zstd")
            writer.write_batch(batch)
    if writer:
        writer.close()


def _write_lists(pool: Pool, query: Query, file: IO[bytes]) -> None:
    """Write the keys of the chosen samples: a line of JSON for each shard that has any."""
    for _ in _found(pool, query, "key: key"):
        keys = "SELECT file, list(values.key ORDER BY place) FROM found GROUP BY ALL ORDER BY file"
        for name, some in pool.db.execute(keys).fetchall():
            stem = name.rpartition("/")[2].removesuffix(".parquet")
            file.write(json.dumps({"shard": stem, "keys": some}).encode() + b"\n")


def _row(pool: Pool, query: str) -> tuple[Any, ...]:
    row: tuple[Any, ...]
    (row,) = pool.db.execute(query).fetchall()  # all, which leaves the connection free
    return row


def _npy(pool: Pool, count: int) -> Iterator[bytes]:
    """The file in parts, as `numpy.save` writes it."""
    header = io.BytesIO()
    exports.begin_npy(header, SUBSET, (count,))
    yield header.getvalue()
    ordered = pool.db.sql("SELECT d2m_high, d2m_low FROM chosen ORDER BY d2m_high, d2m_low")
    for batch in pa.RecordBatchReader.from_stream(ordered):
        uids = np.empty(len(batch), SUBSET)
        uids["f0"], uids["f1"] = batch["d2m_high"].to_numpy(), batch["d2m_low"].to_numpy()
        yield uids.tobytes()
