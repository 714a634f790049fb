"""The samples of a run's finished shards as one table, which duckdb reads some shards at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.plan.standing import Standings, standings
from d2m_hpc.run.fingerprints import meets
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.storage.texts import counted, few
from d2m_hpc.subsets.widest import FLOATS, Layout, Widest, is_lossy, listed, literal, quoted, text

if TYPE_CHECKING:
    import pyarrow as pa
    from duckdb import DuckDBPyConnection

GROUP = 256
"""Shards that are read at once; all footers of a large run would fill the memory."""
MEMORY, THREADS = "2GB", 4
"""Limits, as a login node is shared; duckdb spills the rest to a temporary folder."""
MARK = '"in_subset"'
"""The column, true or false, of a subset that the user brings."""
FILE = "d2m_file"
"""The column with the path of a row's parquet, by `read_parquet`'s option `filename`."""
PLACE = "file_row_number"
"""The column with the number of a row in it, by the option of that name."""
OWN = (FILE, PLACE, "d2m_high", "d2m_low")
"""Names that no column of a run may have here."""
OWN_BEFORE_2 = (*OWN, "filename")
"""As `OWN`: before duckdb 2.0, conditions on a column of this name see the file's instead."""
SHARD = f"parse_filename({FILE}, true, 'forward_slash') AS shard"


def _halves(digits: str) -> str:
    high, low = (f"('0x' || ({digits})[{part}])::UBIGINT" for part in (":16", "17:"))
    return f"{high} AS d2m_high, {low} AS d2m_low"  # names that no column has


UID = _halves("CASE WHEN regexp_full_match(uid, '[0-9a-fA-F]{1,32}') THEN lpad(uid, 32, '0') END")
"""A uid's two halves; null where the text is no uid."""
BY_NAME = _halves("md5(shard || '/' || key)")
"""What stands for a uid in a run without uids; no name of a shard has a slash."""


@dataclass
class Pool:
    """The finished shards as a duckdb view `pool`.

    Attributes:
        db: an own database, in which no SQL can read other files than the shards.
        paths: the parquets, the newest with rows first.
        columns: each column's widest type in any shard, in duckdb's words; and `shard`, the stem,
            unless the run has a column of that name.
        has_shard: whether the run has a column of that name.
        layouts: for each group of shards.
        rows: in all finished shards together.
        unfinished: the number of shards without samples here.
        notices: effects of the widest types on conditions.
        rounded: by column, integers that a cast to floats changed in the groups so far.
        beside: columns of the table `beside`, which the user brought.
    """

    db: DuckDBPyConnection
    paths: list[str]
    columns: dict[str, str]
    layouts: list[list[Layout]]
    rows: int
    unfinished: int
    notices: list[str] = field(default_factory=list)
    rounded: dict[str, int] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    has_shard: bool = False

    @property
    def by_name(self) -> bool:
        """Whether samples are told apart by shard and key, as the run has no uids."""
        return "uid" not in self.columns and not self.has_shard

    @property
    def identity(self) -> str:
        """In SQL, `d2m_high` and `d2m_low`, by which a sample is told from others."""
        return BY_NAME if self.by_name else UID

    def path_groups(self) -> list[Sequence[str]]:
        """The paths that are read at once."""
        return _grouped(self.paths)

    def groups(self, on_shards: Callable[[int, int], None] | None = None) -> Iterator[None]:
        """Point the view `pool` at one group of shards after another.

        Args:
            on_shards: called with the number of shards read so far, and of all.
        """
        for number, paths in enumerate(self.path_groups()):
            self._show(self.layouts[number])
            self._count_rounded(self.layouts[number])
            yield
            if on_shards:
                on_shards(number * GROUP + len(paths), len(self.paths))

    def _show(self, layouts: Sequence[Layout]) -> None:
        """Cast each column to its type in `columns`; NaN becomes null, as duckdb's NaN is above all
        numbers."""
        parts = " UNION ALL ".join(map(self._cast, layouts))
        if self.beside:
            more = ", ".join(f"beside.{quoted(name)}" for name in self.beside)
            more = more.replace(f"beside.{MARK}", f"coalesce(beside.{MARK}, false) AS {MARK}")
            halves = f"(SELECT *, {self.identity} FROM ({parts})) AS own"
            parts = f"SELECT own.* EXCLUDE (d2m_high, d2m_low), {more} FROM {halves} LEFT JOIN "
            parts += "beside ON own.d2m_high = beside.d2m_high AND own.d2m_low = beside.d2m_low"
        self.db.execute(f"CREATE OR REPLACE VIEW pool AS {parts}")

    def _cast(self, layout: Layout) -> str:
        """Select from files of one layout: from several, duckdb would make one type first."""
        columns = [
            f"{_value(name, kind) if name in layout.kinds else f'NULL::{kind}'} AS {quoted(name)}"
            for name, kind in self.columns.items()
            if name not in self.beside and (name != "shard" or self.has_shard)
        ]
        named = ", ".join([*columns, *self.shard_column, FILE, PLACE])
        return f"SELECT {named} FROM {files(layout.paths, f', {PLACE} = true')}"

    @property
    def shard_column(self) -> list[str]:
        """The column `shard` of what `files` reads, unless it is there."""
        return [] if self.has_shard else [SHARD]

    def _count_rounded(self, layouts: Sequence[Layout]) -> None:
        for kinds, paths in layouts:
            for name in (n for n, kind in kinds.items() if is_lossy(kind, self.columns[n])):
                beyond = f"count(*) FILTER (abs({quoted(name)}::HUGEINT) > 2**53)"
                found = self.db.execute(f"SELECT {beyond} FROM read_parquet({listed(paths)})")
                (count,) = found.fetchone() or (0,)
                self.rounded[name] = self.rounded.get(name, 0) + count

    def roundings(self) -> list[str]:
        """Rounded integers in the groups so far, a line for each column."""
        return [
            f"{count:,} integers of {name!r} are beyond 2**53 and were rounded: it has fractions "
            "in other shards"
            for name, count in self.rounded.items()
            if count
        ]


def files(paths: Sequence[str], more: str = "") -> str:
    """Parquets in SQL, with the column `FILE`."""
    return f"read_parquet({listed(paths)}, filename = '{FILE}'{more})"


def _grouped(paths: Sequence[str]) -> list[Sequence[str]]:
    return [paths[start : start + GROUP] for start in range(0, len(paths), GROUP)]


def _value(name: str, kind: str) -> str:
    value = f"TRY_CAST({quoted(name)} AS {kind})"
    return f"CASE WHEN NOT isnan({value}) THEN {value} END" if kind in FLOATS else value


@contextmanager
def opened(
    run: RunDir, config: Config, known: Standings | None = None, beside: Path | None = None
) -> Iterator[Pool]:
    """Open the finished shards of a run as a pool.

    Args:
        known: where the run's shards stand, if known already.
        beside: a parquet with a column `uid`, whose other columns the pool gets; or a subset.

    Raises:
        ConfigError: `beside` cannot be used.
        D2MError: no shard is finished, or a parquet cannot be read.
    """
    import duckdb

    found = known or standings(run, config)
    done = found.done
    found.require_rows(run)
    output = OutputDir(config.output_metadata_dir)
    newest = sorted(done, key=lambda s: (bool(done[s].rows), done[s].finished), reverse=True)
    if lost := sorted(s for s, o in found.removed.items() if meets(o.fingerprint, found.asked)):
        what = f"outputs of {counted(len(lost), 'finished shard')} are missing ({few(lost)})"
        raise D2MError(f"{output.url}: {what}; see `d2m verify`")
    paths = [output.address(f"{stem}.parquet") for stem in newest]
    with (
        tempfile.TemporaryDirectory(prefix="d2m-") as spill,
        duckdb.connect() as db,
        _read_errors(output),
    ):
        _confine(db, output, [*paths, *([str(beside)] if beside else [])], spill)
        groups, widest = _grouped(paths), Widest(db)
        with _read_errors(output, only_files=True):
            layouts = [widest.add(group) for group in groups]
            columns, notices = widest.columns(), widest.notices()
        rows = sum(outcome.rows for outcome in done.values())
        pool = Pool(db, paths, columns, layouts, rows, len(found.stems) - len(done), notices)
        _require_free(columns)
        pool.has_shard = any(name.lower() == "shard" for name in columns)
        columns |= {} if pool.has_shard else {"shard": "VARCHAR"}
        if beside:
            pool.beside = tuple(more := _beside(pool, beside))
            pool.columns |= more
        pool._show(layouts[0])
        yield pool


def _require_free(columns: Iterable[str]) -> None:
    """Raise ConfigError for columns with a name of `OWN`."""
    import duckdb

    own = OWN_BEFORE_2 if duckdb.__version__.startswith("1.") else OWN
    if taken := [name for name in columns if name.lower() in own]:
        what = "is a name that duckdb reads files by; d2m.open(CONFIG).table() has it in Python"
        if not {name.lower() for name in taken} & {*OWN}:
            what += ", and duckdb 2.0 here"
        raise ConfigError("select", [f"the run's column {name!r} {what}" for name in taken])


def _beside(pool: Pool, path: Path) -> dict[str, str]:
    """Make the table `beside` of a user's parquet, or of a subset, which becomes `in_subset`.

    Returns its columns' types but those that tell samples apart.

    Raises:
        ConfigError: it cannot be read, names no samples, or has a column that the run has, too.
    """
    import duckdb

    def wrong(what: str) -> ConfigError:
        return ConfigError("select", [f"--join: {path} {what}"])

    db, names = pool.db, ("shard", "key") if pool.by_name else ("uid",)
    if not path.is_file():
        raise wrong("is no file" if path.exists() else "is not there; check the path")
    try:
        if path.suffix == ".npy":
            if pool.by_name:
                raise wrong("names uids, and the run has none; join a parquet of `shard` and `key`")
            db.register("theirs", _subset(path))
            db.execute(f"CREATE TABLE beside AS SELECT DISTINCT *, true AS {MARK} FROM theirs")
            return {"in_subset": "BOOLEAN"}
        described = db.execute(f"DESCRIBE FROM read_parquet({listed([str(path)])})").fetchall()
        columns = {row[0]: row[1] for row in described}
        if [columns.pop(name, "") for name in names] != ["VARCHAR"] * len(names):
            wanted = " and ".join(f"`{name}`" for name in names)
            raise wrong(f"has no column{'s' if pool.by_name else ''} {wanted} of texts")
        own = {name.lower() for name in pool.columns}
        if both := [name for name in columns if name.lower() in own]:
            raise wrong(f"has columns that the run has, too: {', '.join(both)}; rename them there")
        values = [f"{_value(name, kind)} AS {quoted(name)}" for name, kind in columns.items()]
        rows = f"SELECT {', '.join([*values, pool.identity])} FROM "
        rows += f"read_parquet({listed([str(path)])})"
        db.execute(f"CREATE TABLE beside AS FROM ({rows}) WHERE d2m_high IS NOT NULL")
    except (duckdb.Error, OSError, ValueError) as error:
        raise wrong(f"cannot be read: {str(error).splitlines()[0]}") from error
    repeated = "SELECT count(*) - count(DISTINCT (d2m_high, d2m_low)) FROM beside"
    ((again,),) = db.execute(repeated).fetchall()
    if again:
        what = "shard and key" if pool.by_name else "uid"
        raise wrong(f"has {counted(again, 'row')} with the {what} of another row; keep one of each")
    return columns


def _subset(path: Path) -> pa.Table:
    """The uids of a subset for DataComp's tools."""
    import numpy as np
    import pyarrow as pa

    uids = np.load(path, mmap_mode="r")
    if uids.dtype != np.dtype("u8,u8"):
        raise ValueError(f"found {uids.dtype}, valid is u8,u8")
    return pa.table({"d2m_high": uids["f0"], "d2m_low": uids["f1"]})


def _confine(db: DuckDBPyConnection, output: OutputDir, paths: Sequence[str], spill: str) -> None:
    """Bound duckdb's use of this machine, and the files that an expression may read or write."""
    if not output.is_local:
        db.register_filesystem(output.fs)
    threads = min(THREADS, len(os.sched_getaffinity(0)))
    db.execute(f"SET memory_limit = '{MEMORY}'; SET threads = {threads}")
    db.execute("SET preserve_insertion_order = false")
    # duckdb would conclude that there is no NaN, as a parquet's statistics leave NaN out.
    db.execute("SET disabled_optimizers = 'statistics_propagation'")
    db.execute(f"SET temp_directory = {text(spill)}")
    db.execute("SET allowed_paths = ?", [list({*paths, *map(literal, paths)})])
    db.execute("SET enable_external_access = false; SET lock_configuration = true")


def is_of_file(error: Exception) -> bool:
    """Whether duckdb failed to read a shard, rather than to evaluate an expression."""
    import duckdb

    if isinstance(error, duckdb.PermissionException):  # an expression asks for files
        return False
    return isinstance(error, duckdb.IOException | OSError) or ".parquet" in str(error)


@contextmanager
def _read_errors(output: OutputDir, only_files: bool = False) -> Iterator[None]:
    """Raise duckdb's errors about files as a `D2MError`.

    Args:
        only_files: the block evaluates no expression, so that every error is about a file.
    """
    import duckdb

    try:
        yield
    except (duckdb.Error, OSError) as error:
        if not (only_files or is_of_file(error)):
            raise
        first = str(error).split("LINE 1:")[0].strip().splitlines()[0]
        raise D2MError(f"{output.url} cannot be read: {first}; see `d2m verify`") from error
