"""Write the finished outputs of a run into a folder, in the layout of another tool.

An export goes part by part: some shards become some files. A part on the folder's log is not
written again, so that the same command goes on after a kill, and adds newly finished shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import IO, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.plan.standing import standings
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import ArrayBlocks, Pair
from d2m_hpc.storage import asked_for, files
from d2m_hpc.storage.lease import Lease, held
from d2m_hpc.storage.lent import Lender
from d2m_hpc.storage.texts import counted
from d2m_hpc.subsets.finished import readable, require_known, schema_of, unreadable

PART_ROWS = 100_000
"""Rows after which a part ends; its last shard is whole."""
THREADS = 4
"""Parts that are written at once: one is read or encoded while another one waits for the disk."""
MARK = ".d2m-export"
"""How the names of an export's own files begin."""
LOG, LOCK = f"{MARK}.jsonl", f"{MARK}.lock"
T = TypeVar("T")


@dataclass(frozen=True)
class ExportPart:
    """Shards, neighbours in the plan, that become files of their own.

    Attributes:
        number: the place among all parts, from 0.
        start: the rows before this part.
        rows: the rows of this part.
        pairs: the shards' pairs, each with its number of rows.
        digest: a hash of all that decides the files.
    """

    number: int
    start: int
    rows: int
    pairs: tuple[tuple[Pair, int], ...]
    digest: str

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


class Vectors:
    """A feature's name in the npz, and what each row of it is.

    Attributes:
        shape: of one row.
    """

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self.name, self.dtype, self.shape = name, array.dtype, array.shape[1:]

    @property
    def file(self) -> str:
        """The name as a file's: those of custom models may hold anything."""
        return quote(self.name, safe=" ()[]+,=@")

    @property
    def bytes(self) -> int:
        """Of one row."""
        return int(self.dtype.itemsize * math.prod(self.shape))

    def require(self, pair: Pair, rows: int, found: NDArray[Any] | ArrayBlocks) -> None:
        """Raise `D2MError` unless a shard's array is of this type and shape."""
        if (found.dtype, found.shape) != (self.dtype, (rows, *self.shape)):
            raise unreadable(pair.stem, f"{self.name!r} is of another shape or type here")


@dataclass(frozen=True)
class ExportSource:
    """The finished shards with rows of a run.

    Attributes:
        schema: one type for each column, over all shards.
        vectors: the features to export.
        unfinished: the number of shards that are left out.
        stopped: no further shard is read.
        lend: lends the memory in which features are read.
    """

    config: Config
    pairs: list[tuple[Pair, int]]
    hashes: list[str]
    schema: pa.Schema
    vectors: list[Vectors]
    unfinished: int
    stopped: Event = field(default_factory=Event)
    lend: Lender = field(default_factory=Lender)

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.pairs)

    def parts(self, kind: str) -> list[ExportPart]:
        """Group the shards into parts."""
        about = [kind, str(self.rows), str(self.schema), *(v.name for v in self.vectors)]
        found: list[ExportPart] = []
        start = first = rows = 0
        for last, (_, more) in enumerate(self.pairs, 1):
            rows += more
            if rows >= PART_ROWS or last == len(self.pairs):
                own = [str(len(found)), *self.hashes[first:last]]
                digest = digest_of([*about, *own])
                found.append(
                    ExportPart(len(found), start, rows, tuple(self.pairs[first:last]), digest)
                )
                start, first, rows = start + rows, last, 0
        return found

    def read(
        self, part: ExportPart, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[pa.Table, dict[str, NDArray[Any]]]]:
        """Read the shards of a part one after the other: columns of one type, and features.

        Raises:
            D2MError: a file cannot be read, or is not as the run has recorded, or the export was
                stopped.
        """
        for pair, rows in part.pairs:
            table = self.table(pair, rows, columns)
            with readable(pair.output.path(pair.stem)):
                names = [v.name for v in self.vectors]
                arrays = pair.features(names, lend=self.lend) if names else {}
            for v in self.vectors:
                v.require(pair, rows, arrays[v.name])
            yield table, arrays

    def copy(self, part: ExportPart, into: Sequence[tuple[Vectors, Sink]]) -> Iterator[pa.Table]:
        """Read the columns of the shards of a part one after the other, and copy the features.

        Args:
            into: features, and a file for the values of each.

        Raises:
            as `read` does; what was copied of the part is not to be used then.
        """
        for pair, rows in part.pairs:
            yield self.table(pair, rows)
            self.copy_values(pair, rows, into)

    def copy_values(self, pair: Pair, rows: int, into: Sequence[tuple[Vectors, Sink]]) -> None:
        """Copy the features of a shard, whole rows by whole rows."""
        if not into:
            return
        where = pair.output.path(pair.stem)
        with closing(_each(where, pair.values([v.name for v, _ in into]))) as found:
            for (v, file), values in zip(into, found, strict=True):
                v.require(pair, rows, values)
                file.writelines(_each(where, values.blocks))

    def table(self, pair: Pair, rows: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the columns of a shard, of one type; all errors are those of `read`."""
        if self.stopped.is_set():
            raise D2MError("the export was stopped")
        names = self.schema.names if columns is None else columns
        with readable(pair.output.path(pair.stem)):
            return self._cast(pair.table(names), rows, names)

    def _cast(self, table: pa.Table, rows: int, names: Sequence[str]) -> pa.Table:
        if len(table) != rows:
            raise ValueError(f"it has {counted(len(table), 'row')}, its record {rows}")
        kinds = [self.schema.field(name) for name in names]
        there = set(table.column_names)
        values = [
            table[kind.name].cast(kind.type) if kind.name in there else pa.nulls(rows, kind.type)
            for kind in kinds
        ]
        return pa.table(values, pa.schema(kinds))


def _each(where: str, found: Iterator[T]) -> Generator[T, None, None]:
    """Raise errors in reading an output as a D2MError, but none of whoever takes the values."""
    with readable(where):
        yield from found


class Sink(Protocol):
    """A file, or what writes rows into one."""

    def writelines(self, lines: Iterable[memoryview], /) -> None: ...


class ExportLayout(ABC):
    """Writes the parts of an export into the files of one tool.

    Attributes:
        threads: parts that are written at once.
    """

    kind: str
    threads = THREADS

    def __init__(self, source: ExportSource, folder: Path) -> None:
        self.source, self.root = source, _local(folder)
        self.parts = source.parts(self.kind)

    @abstractmethod
    def files(self, part: ExportPart) -> list[Path]:
        """The files of a part."""

    @abstractmethod
    def write(self, part: ExportPart) -> None:
        """Write the files of a part, while others are written."""

    def growing(self) -> Iterable[Path]:
        """Files that are written and not synced while they are."""
        return ()

    def commit(self, part: ExportPart) -> list[Path]:
        """Make what was written count, one part after the other in their order.

        Returns:
            the files of the part.
        """
        return self.files(part)

    def last(self) -> list[Path]:
        """The files that `finish` writes."""
        return []

    def there(self, known: Collection[str], complete: bool) -> set[str]:
        """The digests of parts that are there, of those on the log.

        Args:
            complete: whether the export had come to its end.
        """
        return {
            part.digest
            for part in self.parts
            if part.digest in known and all(path.exists() for path in self.files(part))
        }

    @abstractmethod
    def finish(self) -> None:
        """Write what waits for all parts."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        written: the parts that this call wrote; others were there.
        unfinished: shards of the run that are left out.
    """

    folder: str
    rows: int
    shards: int
    parts: int
    written: int
    unfinished: int = 0


def source(
    run: RunDir, config: Config, features: Sequence[str] | None = None, allow_missing: bool = False
) -> ExportSource:
    """Find what is to be exported.

    Args:
        features: names in the config or in the npz; by default all.

    Raises:
        ConfigError: there is no such feature.
        D2MError: no shard has rows, or shards are not finished.
    """
    found = standings(run, config)
    found.require_finished(allow_missing)
    found.require_rows(run)
    names = {n: config.renamed(n) for n in config.postprocess_features}
    for name in features or ():
        require_known("feature", name, {*names, *names.values()})
    asked = [*dict.fromkeys(names.get(n, n) for n in (names if features is None else features))]
    output = OutputDir(config.output_metadata_dir)
    done = {stem: outcome for stem, outcome in found.done.items() if outcome.rows}
    pairs = [(Pair(output, stem), outcome.rows) for stem, outcome in done.items()]
    with readable(output.url):
        schema = schema_of([(pair, done[pair.stem]) for pair, _ in pairs])
        arrays = pairs[0][0].features(asked, mapped=True) if asked else {}
    hashes = [f"{stem} {o.parquet_sha256} {o.npz_sha256}" for stem, o in done.items()]
    vectors = [Vectors(name, arrays[name]) for name in asked]
    return ExportSource(config, pairs, hashes, schema, vectors, len(found.stems) - len(found.done))


class TaskParts(NamedTuple):
    """What one of `of` tasks writes of an export: every `of`-th part, from the `number`-th on."""

    number: int
    of: int

    def parts(self, layout: ExportLayout) -> list[ExportPart]:
        return layout.parts[self.number - 1 :: self.of]

    def __str__(self) -> str:
        return f".{self.number}-{self.of}"


def part_of(given: Sequence[int]) -> TaskParts | None:
    """The parts of a task by its number and the number of tasks; None where none are given.

    Raises:
        ConfigError: there is no such task.
    """
    try:
        numbers = [*map(operator.index, given)]
    except TypeError:
        raise ConfigError("export", [f"--part: found {given!r}; valid are two numbers"]) from None
    number, of = numbers if len(numbers) == 2 else (0, 0)
    if numbers and not 1 <= number <= of:
        what = f"--part: found {number} of {counted(of, 'task')}; valid is 1 to {of}"
        raise ConfigError("export", [what])
    return TaskParts(number, of) if numbers else None


def export(
    run: RunDir,
    layout: ExportLayout,
    on_rows: Callable[[int, int], None] = lambda done, of: None,
    share: TaskParts | None = None,
) -> Exported:
    """Write all parts that are not there yet.

    Args:
        on_rows: called with the number of rows that are written or were there, and of all rows.
        share: writes these parts alone, while other tasks write theirs.

    Raises:
        ConfigError: the folder has other files, or cannot be written.
        D2MError: another export works in the folder, or an output cannot be read.
    """
    made, parts = layout.source, share.parts(layout) if share else layout.parts
    made.stopped.clear()
    with claimed(run, layout, share) as log, files.synced_along(layout.growing):
        there = _join(log, layout, share) if share else _begin(log, layout)
        with ThreadPoolExecutor(layout.threads) as pool:
            waiting = {
                p.digest: pool.submit(layout.write, p) for p in parts if p.digest not in there
            }
            try:
                for part in parts:
                    if part.digest in waiting:
                        waiting[part.digest].result()
                        log.add(part.digest, layout.commit(part))
                    on_rows(part.start + part.rows, made.rows)
            except BaseException:
                made.stopped.set()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
        if share is None:
            layout.finish()
            log.add(_whole_id(layout), layout.last())
    rows, shards = sum(p.rows for p in parts), sum(len(p.pairs) for p in parts)
    return Exported(str(layout.root), rows, shards, len(parts), len(waiting), made.unfinished)


@contextmanager
def divided(
    run: RunDir, layout: ExportLayout, tasks: int, live: Callable[[], Collection[int]]
) -> Iterator[tuple[set[int], set[int]]]:
    """Take the folder while tasks are started.

    Args:
        tasks: the number of shares.
        live: tells the shares of tasks that wait or run.

    Yields:
        The numbers of the shares that have parts left, and of those whose tasks wait or run.

    Raises:
        D2MError: tasks with other parts wait or run.
    """
    with claimed(run, layout) as log:
        at_work, tasked = {*live()}, f"{_whole_id(layout)}/{tasks}"
        if log.tasked == tasked:
            there = layout.there(log.parts, False)
        elif at_work:
            what = "tasks of an earlier command, with other lists or another --tasks, wait or run"
            raise D2MError(f"{layout.root}: {what}; wait for their end, or cancel them")
        else:
            there = _begin(log, layout, tasked)
        left = {p.number % tasks + 1 for p in layout.parts if p.digest not in there}
        yield left, at_work


def _whole_id(layout: ExportLayout) -> str:
    return digest_of(part.digest for part in layout.parts)


def _begin(log: Log, layout: ExportLayout, tasked: str = "") -> set[str]:
    """Clear the folder of what is not wanted any more; returns the parts that are there."""
    if busy := held(log.root.glob(f"{MARK}.*-*.lock")):
        what = counted(len(busy), "task of an export is", "tasks of an export are")
        raise D2MError(f"{log.root}: {what} writing there; wait for their end, or cancel them")
    there = layout.there(log.parts, _whole_id(layout) in log.parts)
    log.tidy([*layout.last(), *(path for part in layout.parts for path in layout.files(part))])
    log.tasked = tasked
    log.keep(there)
    return there


def _join(log: Log, layout: ExportLayout, share: TaskParts) -> set[str]:
    """Begin a share; returns its parts that are there."""
    tasked = f"{_whole_id(layout)}/{share.of}"
    if log.tasked != tasked:
        what = f"is not, or no longer, of these lists and --tasks {share.of}"
        raise D2MError(f"{log.root} {what}; the command without --part makes it so")
    own = share.parts(layout)
    there = layout.there(log.parts, False) & {part.digest for part in own}
    names = {f".{path.name}" for part in own for path in layout.files(part)}
    for left in log.root.rglob(".*.tmp"):
        if left.name.rsplit(".", 2)[0] in names:
            left.unlink(missing_ok=True)
    log.keep(there)
    return there


def link(run: RunDir, config: Config, folder: Path, allow_missing: bool = False) -> Exported:
    """Make a folder of links to the finished parquets, which readers of folders take as a table.

    The npz beside the parquets keep most readers from the output folder itself.

    Raises:
        ConfigError: the outputs are on a store, or the folder has something else than such links.
        D2MError: no shard has rows, or shards are not finished.
    """
    output, folder = OutputDir(config.output_metadata_dir), _local(folder)
    if not output.is_local:
        what = f"{output.url} is on a store, which has no links; export `hf` copies the columns"
        raise ConfigError("export", [what])
    found = standings(run, config)
    found.require_finished(allow_missing)
    found.require_rows(run)
    asked_for.make_folder(folder)
    root, there = os.path.realpath(output.root), {path.name: path for path in folder.iterdir()}
    for path in there.values():
        if not path.is_symlink() or os.path.dirname(os.path.realpath(path)) != root:
            what = f"{path} is no link to an output of this run; name a new or empty folder"
            raise ConfigError("export", [f"--output: {what}"])
    done = {f"{stem}.parquet": o.rows for stem, o in found.done.items() if o.rows}
    back = os.path.relpath(root, os.path.realpath(folder))
    for name in there.keys() - done.keys():
        there[name].unlink()
    new = done.keys() - there.keys()
    for name in new:
        (folder / name).symlink_to(f"{back}/{name}")
    left = len(found.stems) - len(found.done)
    return Exported(str(folder), sum(done.values()), len(done), len(done), len(new), left)


def _local(folder: Path) -> Path:
    if re.match(r"\w+:/", str(folder)):  # a path has one slash of a URL's two
        raise ConfigError("export", [f"--output: found {folder}; valid is a local folder"])
    return folder.absolute()


def digest_of(texts: Iterable[str]) -> str:
    """A hash of texts, in their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


@dataclass
class Log:
    """The log of an export's folder: JSON lines, the first of what it is an export.

    Each task of an export has a log of its own beside it, so that no two write into one file.

    Attributes:
        tasked: the parts and the number of tasks, where tasks write the folder; else empty.
        parts: the files of each part that is written, by the part's digest; also of the whole.
    """

    root: Path
    about: str
    name: str = LOG
    tasked: str = ""
    parts: dict[str, list[str]] = field(default_factory=dict)

    def read(self) -> None:
        """Read what is there: by this log, and, if it is not a task's, by those of all tasks."""
        own = [self.root / self.name] if self.name != LOG else self._of_tasks()
        first = next(iter(_lines(self.root / LOG)), {})
        self.tasked = first.get("tasks", "")
        for path in (self.root / LOG, *own):
            # A log of other parts tells nothing of the files, as names are the same.
            if (lines := _lines(path)) and lines[0] == first:
                self.parts |= {line["part"]: line["files"] for line in lines[1:]}

    def keep(self, there: Collection[str]) -> None:
        """Forget all parts but these."""
        self.parts = {digest: names for digest, names in self.parts.items() if digest in there}
        about = {"export": self.about} | ({"tasks": self.tasked} if self.tasked else {})
        lines = [about, *({"part": d, "files": n} for d, n in self.parts.items())]
        encoded = (json.dumps(line).encode() + b"\n" for line in lines)
        files.atomic_write(self.root / self.name, encoded)
        for path in self._of_tasks() if self.name == LOG else ():
            path.unlink()

    def tidy(self, wanted: Iterable[Path]) -> None:
        """Remove the files of parts that are not wanted any more, and what kills left."""
        stay = {self._name(path) for path in wanted}
        gone = {name for names in self.parts.values() for name in names} - stay
        for path in (self.root / name for name in gone):
            if path.resolve().is_relative_to(self.root.resolve()):
                path.unlink(missing_ok=True)
        for left in self.root.rglob(".*.tmp"):
            left.unlink()

    def add(self, digest: str, paths: Sequence[Path]) -> None:
        line = {"part": digest, "files": [*map(self._name, paths)]}
        with open(self.root / self.name, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _of_tasks(self) -> list[Path]:
        return [*self.root.glob(f"{MARK}.*-*.jsonl")]

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))


@contextmanager
def claimed(run: RunDir, layout: ExportLayout, share: TaskParts | None = None) -> Iterator[Log]:
    """Take the folder for one export: a new or empty one, or one that had the same export before.

    Args:
        share: takes this share of the export alone.

    Raises:
        ConfigError: it has other files, or another export.
        D2MError: another process exports into it, or writes this share.
    """
    folder, about = layout.root, f"{layout.kind} of {run.root.absolute()}"
    asked_for.make_folder(folder)
    names = {path.name for path in folder.iterdir()}
    own = (f"{MARK}.", f".{MARK}.")  # also of a task, or half written
    if names := {name for name in names if name == LOG or not name.startswith(own)}:
        lines = _lines(folder / LOG)
        if not lines or lines[0].get("export") != about:
            had = f"the export {lines[0].get('export')}" if lines else f"{min(names)} and the like"
            advice = "name a new or empty folder, or remove this one"
            raise ConfigError("export", [f"--output: {folder} has {had}; {advice}"])
    asked_for.require_writable(folder / LOG)
    lock = folder / (f"{MARK}{share}.lock" if share else LOCK)
    lease = Lease(lock)
    if not lease.claim() and (held([lock]) or not lease.claim()):
        raise D2MError(f"{folder}: another export is writing there; wait for its end")
    try:
        log = Log(folder, about, f"{MARK}{share}.jsonl" if share else LOG)
        log.read()
        yield log
    finally:
        lease.release()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; none without one."""
    try:
        text = path.read_text()
        return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    except (FileNotFoundError, ValueError):
        return []


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file, which is in its place, and on disk, once the block ends without an error."""
    files.make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with files.durable(temporary) as file, files.synced_along(lambda: [temporary]):
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    files.sync_path(path.parent)


def begin_npy(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Write the header of an npy."""
    described = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(file, described)


def repeats(column: pa.ChunkedArray) -> bool:
    """Whether its values come again, as far as the first ones tell; a dictionary of others costs
    more than all else of a column, and makes the file larger."""
    some = column.slice(0, 1000)
    return not pa.types.is_nested(some.type) and 2 * len({*some.to_pylist()}) < len(some)
