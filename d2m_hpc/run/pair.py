"""A shard's output pair, its parquet and its npz: no other module opens or checks these files.

Example:
    pair = Pair(OutputDir("s3://bucket/out"), "00000")
    pair.table(["key", "image-brightness"]).to_pandas()
    pair.features()["oai-clip-vit-l14-image"]
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from io import BufferedIOBase
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from d2m_hpc.errors import D2MError, ShardError
from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.outputs import NPZ, PARQUET, OutputDir
from d2m_hpc.run.records import Record
from d2m_hpc.storage.lent import Lend, new
from d2m_hpc.storage.texts import counted

METADATA = b"d2m"
"""The key of the shard's record in the parquet's file metadata."""
TAIL = 64 << 10
"""Bytes at the end of a parquet that hold almost any parquet's metadata."""
BLOCK = 512 << 10
"""Bytes, about, that are read, checked and written before the next: they stay in a core's cache."""
MISSING = "is missing"
AGAIN = "delete {}.parquet to have the shard computed whole by the next submit"


class Contents(NamedTuple):
    """The record, the table and the features of a pair; features are [rows, ...] each."""

    record: Record
    table: pa.Table
    features: dict[str, NDArray[Any]]


class ArrayBlocks(NamedTuple):
    """An array whose values come block by block, in the order of C.

    Attributes:
        blocks: the bytes of whole rows, each block until the next one is asked for. After the last
            one the array's CRC is checked: until then all may be damaged.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Iterator[memoryview]


@dataclass(frozen=True)
class Pair:
    """The two files of one shard in an output folder; they need not exist."""

    output: OutputDir
    stem: str

    def name(self, suffix: str) -> str:
        return self.stem + suffix

    def metadata(self) -> pq.FileMetaData:
        """Read the parquet's types, statistics and record, without its values."""
        return pq.read_metadata(pa.BufferReader(self._footer()))

    def record(self) -> Record | None:
        """Read the record in the parquet's metadata; None without a parquet, or with another's.

        Raises:
            D2MError: the file cannot be read, so the shard's state is not known.
        """
        try:
            footer = self._footer()
        except FileNotFoundError:
            return None
        except Exception as error:  # each store raises errors of its own
            where, advice = self.output.path(self.name(PARQUET)), "see to it and run the same"
            raise D2MError(f"{where} cannot be read: {error}; {advice} command again") from error
        try:
            note = (pq.read_metadata(pa.BufferReader(footer)).metadata or {}).get(METADATA)
            return Record.from_dict(json.loads(note)) if note else None
        except Exception:  # a damaged byte may make Arrow raise any error
            return None

    def restored(self, record: Record) -> Record:
        """Complete a parquet's record, to take the place of the line that a killed task lost."""
        sha256 = self.output.sha256(self.name(PARQUET))
        return replace(record, parquet_sha256=sha256, rebuilt=True)

    def _footer(self) -> bytes:
        """Read the end of the parquet: its metadata, 4 bytes of length, 4 of the format's name.

        Reading is apart from parsing, as Arrow raises an OSError for a damaged file, too.
        """
        tail = self.output.read(self.name(PARQUET), TAIL)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        is_longer = tail[-4:] == b"PAR1" and length > TAIL
        return self.output.read(self.name(PARQUET), length) if is_longer else tail

    def table(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Read the parquet's columns; with `columns`, those of them that the parquet has.

        Raises:
            OSError, pyarrow.ArrowException, or an error of the store's own.
        """
        with self.output.open(self.name(PARQUET)) as file:
            return _table(file, columns)

    def features(
        self,
        names: Iterable[str] | None = None,
        mapped: bool = False,
        lend: Lend = new,
    ) -> dict[str, NDArray[Any]]:
        """Read the arrays of the npz, or those with the given names; [rows, ...] each.

        Args:
            mapped: map stored arrays of a file on a disk, unchecked by their CRCs; read the others.
            lend: lends the memory; by default each array has its own.

        Raises:
            OSError, ValueError, zipfile.BadZipFile, or an error of the store's own.
        """
        with self.output.open(self.name(NPZ)) as file:
            return dict(_arrays(file, names, mapped and self.output.is_local, lend))

    def values(self, names: Iterable[str]) -> Iterator[ArrayBlocks]:
        """Read arrays of the npz one after the other, in little memory.

        Raises:
            as `features` does, also from the blocks.
        """
        with self.output.open(self.name(NPZ)) as file, zipfile.ZipFile(file) as archive:
            for name in names:
                if found := _find(file, archive, name):
                    yield ArrayBlocks(found.dtype, found.shape, _blocks(file, found))
                else:
                    array = np.asarray(dict(_arrays(file, [name]))[name], order="C")
                    yield ArrayBlocks(array.dtype, array.shape, iter([array.data]))

    def lengths(self) -> set[int]:
        """The number of rows of the parquet and of each array; checks the arrays' CRCs."""
        with self.output.open(self.name(NPZ)) as file, np.load(file) as arrays:
            return {self.metadata().num_rows, *(len(arrays[name]) for name in arrays.files)}

    def contents(self, names: Collection[str] | None = None) -> Contents:
        """Read a pair that is to be extended.

        Args:
            names: of the features to read; by default all.

        Raises:
            ShardError: a file cannot be read, or the npz is not the parquet's.
        """
        try:
            table = self.table()
            record = Record.from_dict(json.loads(table.schema.metadata[METADATA]))
            if names is not None and not names:
                return Contents(record, table, {})
            with self.output.open(self.name(NPZ)) as file:
                if (found := _sha256(file)) != record.npz_sha256:
                    raise ShardError(f"the npz has the sha256 {found}, not {record.npz_sha256}")
                return Contents(record, table, dict(_arrays(file, names)))
        except Exception as error:  # a damaged byte may make a library raise any error
            raise ShardError(
                f"{self.output.path(self.stem)}: this finished pair cannot be extended: "
                f"{str(error) or type(error).__name__}; {AGAIN.format(self.stem)}"
            ) from error

    def problems(
        self,
        suffix: str,
        expected: Outcome | Record,
        carried: Collection[str] = (),
        owner: Callable[[str], str | None] = lambda sha256: None,
    ) -> list[str]:
        """Find all faults of one of the two files.

        Args:
            expected: the pair's newest record.
            carried: columns with the samples' own values, which may hold anything.
            owner: finds the name under which a sha256 is on record, or None.
        """
        sha256 = expected.npz_sha256 if suffix == NPZ else expected.parquet_sha256
        found = sha256
        try:
            with self.output.open(self.name(suffix)) as file:
                found = _sha256(file)
                if found != sha256 and (name := owner(found)):
                    return [f"is {name}, under another name; rename it back"]
                is_npz, rows = suffix == NPZ, expected.rows
                problems = _of_npz(file, rows) if is_npz else _of_parquet(file, rows, carried)
        except FileNotFoundError:
            return [MISSING]
        except Exception as error:  # a store, or a damaged byte, may raise any error
            problems = [f"cannot be read: {str(error) or type(error).__name__}"]
        other = f"has another sha256 than its record ({sha256[:12]}...)"
        return problems if found == sha256 else [*problems, other]


def _sha256(file: BufferedIOBase) -> str:
    found = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return found


def _table(file: BufferedIOBase, columns: Iterable[str] | None = None) -> pa.Table:
    # Arrow's threads would keep the file open, and abort a process that ends before they close it.
    with pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as parquet:
        names = None if columns is None else list(columns)
        return parquet.read(names, use_threads=False)


class _Stored(NamedTuple):
    """Where an array lies in an npz that has it uncompressed.

    Attributes:
        start: the place of the npy's own header.
        values: the place of the values.
        size: of the values, in bytes.
    """

    info: zipfile.ZipInfo
    start: int
    values: int
    size: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _arrays(
    file: BufferedIOBase,
    names: Iterable[str] | None = None,
    mapped: bool = False,
    lend: Lend = new,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Read the arrays of an npz, or those with the given names; checks their CRCs unless mapped."""
    with zipfile.ZipFile(file) as archive, np.load(file) as arrays:
        for name in names or arrays.files:
            found = _find(file, archive, name)
            if found is None:
                yield name, arrays[name]
            elif mapped:
                yield name, np.memmap(file, found.dtype, "r", found.values, found.shape)
            else:
                yield name, _stored(file, found, lend)


def _find(file: BufferedIOBase, archive: zipfile.ZipFile, name: str) -> _Stored | None:
    """Find an array that is not compressed, by its headers; None for any other, or for none."""
    info = archive.NameToInfo.get(f"{name}.npy")
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        return None
    with archive.open(info):  # checks the member's own header
        start = file.tell()
    if np.lib.format.read_magic(file) != (1, 0):
        return None
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    end = file.tell()
    size = math.prod(shape) * dtype.itemsize
    if is_fortran or dtype.hasobject or not size or end - start + size != info.file_size:
        return None
    return _Stored(info, start, end, size, shape, dtype)


def _stored(file: BufferedIOBase, found: _Stored, lend: Lend) -> NDArray[Any]:
    """Read an array at once: numpy takes twice as long, piece by piece."""
    values = lend(found.size)
    for _ in _blocks(file, found, values.data):
        pass
    return values.view(found.dtype).reshape(found.shape)


def _blocks(
    file: BufferedIOBase, found: _Stored, memory: memoryview | None = None
) -> Iterator[memoryview]:
    """Read an array into memory, by default into that of one block, again and again.

    Raises:
        zipfile.BadZipFile: the bytes are not those of the array's CRC, or too few.
    """
    bad = zipfile.BadZipFile(f"Bad CRC-32 for file {found.info.filename!r}")
    file.seek(found.start)
    checked = crc32(file.read(found.values - found.start))
    row = found.size // (found.shape[0] if found.shape else 1)
    memory = memory or memoryview(bytearray(min(max(1, BLOCK // row) * row, found.size)))
    left = found.size
    while left:
        block = memory[:left]
        if file.readinto(block) != len(block):
            raise bad
        checked = crc32(block, checked)
        yield block
        left -= len(block)
    if checked != found.info.CRC:
        raise bad


def _of_parquet(file: BufferedIOBase, rows: int, carried: Collection[str]) -> list[str]:
    table = _table(file)
    has = f"has {counted(len(table), 'row')}, its record {rows}"
    problems = [has] if len(table) != rows else []
    for name in table.column_names:
        bad = 0 if name in carried else _non_finite(table[name])
        told = counted(bad, "value that is", "values that are")
        problems += [f"column {name!r} has {told} not finite"] if bad else []
    return problems


def _non_finite(column: pa.ChunkedArray) -> int:
    """Count NaN and infinity in a column of numbers, or of lists of numbers."""
    import pyarrow.compute as pc  # the import takes a tenth of what most commands do

    while pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    if not pa.types.is_floating(column.type):
        return 0
    bad: int = pc.sum(pc.invert(pc.is_finite(column)), min_count=0).as_py()
    return bad


def _of_npz(file: BufferedIOBase, rows: int) -> list[str]:
    with zipfile.ZipFile(file) as archive:
        if broken := archive.testzip():
            return [f"array {broken!r} fails its CRC"]
    file.seek(0)
    problems = []
    for name, array in _arrays(file):
        if len(array) != rows:
            problems.append(f"array {name!r} has {counted(len(array), 'row')}, its record {rows}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            problems.append(f"array {name!r} has values that are not finite")
    return problems
