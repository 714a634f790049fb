"""Parquets of columns and vectors, with the vectors' values as they lie in the npz.

Arrow writes the columns. For vectors it would work out the place of each number in its list, which
takes several times as long as a copy, though the lists of a feature are all alike. So the pages of
vectors are made here, and added to Arrow's footer, after the format's specification
(parquet.apache.org/docs/file-format) and that of Thrift's compact protocol.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2m_hpc.run.pair import BLOCK
from d2m_hpc.subsets import exports
from d2m_hpc.subsets.exports import Sink, Vectors

GROUP_ROWS = 10_000
"""The most rows of a row group, which are of one shard."""
RAW = ("<f2", "<f4", "<f8", "<i4", "<i8", "<u4", "<u8")
"""Numbers that a parquet has as numpy has them; smaller integers take 4 bytes there."""
TYPES = {"INT32": 1, "INT64": 2, "FLOAT": 4, "DOUBLE": 5, "FIXED_LEN_BYTE_ARRAY": 7}
PLACES = {9, 10, 11}
"""The fields of a column's first pages: of data, of an index and of a dictionary."""
PLAIN, RLE, UNCOMPRESSED = 0, 3, 0
TRUE, FALSE, BYTE, INT16, INT32, INT64, DOUBLE, BINARY, LIST = range(1, 10)
STRUCT = 12
"""Thrift's types. Here a struct is `{number of a field: (type, value)}`, and a list
`(type, values)`."""
Struct = dict[int, tuple[int, Any]]


def is_raw(vectors: Vectors) -> bool:
    """Whether the values of a feature can be copied."""
    return vectors.dtype.str in RAW and vectors.bytes > 0


class VectorParquet:
    """Writes a parquet shard by shard: first the columns, then each feature as it is read.

    It is a context; at its end the parquet is whole.

    Args:
        file: a new one, which is not closed.
        schema: of the columns and, behind them, the features.
        vectors: the features, all of which can be copied.
        first: columns that tell which of them have values that come again.
    """

    def __init__(
        self, file: IO[bytes], schema: pa.Schema, vectors: Sequence[Vectors], first: pa.Table
    ) -> None:
        self._file, self._arrows = file, _ArrowsFile(file)
        again = [name for name in first.column_names if exports.repeats(first[name])]
        options: dict[str, Any] = {"compression": "zstd", "use_dictionary": again}
        self._columns = pq.ParquetWriter(self._arrows, first.schema, **options)
        empty = io.BytesIO()
        pq.ParquetWriter(empty, schema).close()
        self._about, leaves = _footer(empty.getvalue()), pq.read_metadata(empty).schema
        start = len(leaves) - len(vectors)
        self._leaves = [_Leaf(v, leaves.column(i)) for i, v in enumerate(vectors, start)]
        self._places: list[list[int]] = []
        self._moved: list[int] = []
        self._end = file.tell()

    def write(self, table: pa.Table) -> list[tuple[Vectors, Sink]]:
        """Write the columns of a shard, with room for its features.

        Returns:
            The features, each with what takes its values: all of them, before the next shard.
        """
        first = len(self._places)
        for start in range(0, len(table), GROUP_ROWS):
            group = table.slice(start, GROUP_ROWS)
            self._file.seek(self._end)
            self._moved.append(self._end - self._arrows.count)
            self._columns.write_table(group)
            sizes = [self._file.tell(), *(leaf.size(len(group)) for leaf in self._leaves)]
            *places, self._end = np.cumsum(sizes).tolist()
            self._places.append(places)
        own = [*zip(*self._places[first:], strict=True)]
        return [
            (leaf.vectors, _Values(self._file, leaf, places, len(table)))
            for leaf, places in zip(self._leaves, own, strict=False)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the footer, if there was no error."""
        self._arrows.held = io.BytesIO()
        self._columns.close()
        if kind is None:
            self._file.seek(self._end)
            self._finish(_footer(self._arrows.held.getvalue()))

    def _finish(self, told: Struct) -> None:
        """Add the features to Arrow's footer, and write it."""
        for group, moved, places in zip(told[4][1][1], self._moved, self._places, strict=True):
            rows = group[3][1]
            for _, column in (chunk[3] for chunk in group[1][1][1]):
                _move(column, PLACES, moved)
            _move(group, {5}, moved)
            for leaf, place in zip(self._leaves, places, strict=True):
                group[1][1][1].append(leaf.chunk(place, rows))
                for total in (2, 6):
                    group[total] = (INT64, group[total][1] + leaf.size(rows))
        footer = _encoded(STRUCT, self._about | {number: told[number] for number in (3, 4)})
        self._file.write(footer + len(footer).to_bytes(4, "little") + b"PAR1")


def _move(struct: Struct, places: set[int], by: int) -> None:
    for place in places & struct.keys():
        struct[place] = (INT64, struct[place][1] + by)


class _ArrowsFile(io.RawIOBase):
    """The file as Arrow sees it, with no gaps; and its footer apart, once that is to be written.

    Attributes:
        count: bytes that Arrow wrote, which are the places that it tells.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.count = file, 0
        self.held: io.BytesIO | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.count += len(data)
        return (self.held or self._file).write(data)


class _Leaf:
    """The numbers of a feature, as a parquet has them.

    Attributes:
        page: rows of a page; the last one of a row group has fewer.
    """

    def __init__(self, vectors: Vectors, kind: pq.ColumnSchema) -> None:
        self.vectors, self._type = vectors, TYPES[kind.physical_type]
        self.page = max(1, min(BLOCK // vectors.bytes, GROUP_ROWS))
        inner = kind.path[len(vectors.name) + 1 :]  # the feature's name may have dots
        self._path = [name.encode() for name in (vectors.name, *inner.split(".")) if name]
        self._depth, self._repeated = kind.max_definition_level, _repeated(vectors.shape)
        self._heads: dict[int, bytes] = {}

    def head(self, rows: int) -> bytes:
        """What comes before the values of a page."""
        if rows not in self._heads:
            count, size = rows * math.prod(self.vectors.shape), rows * self.vectors.bytes
            levels = [self._repeated * rows] if self.vectors.shape else []
            levels.append(_varint(count << 1) + bytes([self._depth]))
            told = b"".join(len(level).to_bytes(4, "little") + level for level in levels)
            size += len(told)
            data = {1: count, 2: PLAIN, 3: RLE, 4: RLE}
            page: Struct = {1: (INT32, 0), 2: (INT32, size), 3: (INT32, size)}
            page[5] = (STRUCT, {number: (INT32, value) for number, value in data.items()})
            self._heads[rows] = _encoded(STRUCT, page) + told
        return self._heads[rows]

    def size(self, rows: int) -> int:
        """Bytes of so many rows in a row group."""
        pages, rest = divmod(rows, self.page)
        heads = pages * len(self.head(self.page)) + (len(self.head(rest)) if rest else 0)
        return heads + rows * self.vectors.bytes

    def chunk(self, place: int, rows: int) -> Struct:
        """What the footer tells of them."""
        size = (INT64, self.size(rows))
        about: Struct = {
            1: (INT32, self._type),
            2: (LIST, (INT32, [PLAIN, RLE])),
            3: (LIST, (BINARY, self._path)),
            4: (INT32, UNCOMPRESSED),
            5: (INT64, rows * math.prod(self.vectors.shape)),
            6: size,
            7: size,
            9: (INT64, place),
        }
        return {2: (INT64, 0), 3: (STRUCT, about)}


class _Values:
    """Writes a shard's values of a feature into their places in the row groups."""

    def __init__(self, file: IO[bytes], leaf: _Leaf, places: Sequence[int], rows: int) -> None:
        self._file, self._leaf, self._places, self._rows = file, leaf, places, rows
        self._done = 0

    def writelines(self, blocks: Iterable[memoryview]) -> None:
        for block in blocks:
            left = np.frombuffer(block, np.uint8).reshape(-1, self._leaf.vectors.bytes)
            while len(left):
                group, row = divmod(self._done, GROUP_ROWS)
                within = row % self._leaf.page
                rows = min(GROUP_ROWS, self._rows - group * GROUP_ROWS)
                page = min(self._leaf.page, rows - row + within)
                if not row:
                    self._file.seek(self._places[group])
                if not within:
                    self._file.write(self._leaf.head(page))
                own, left = left[: page - within], left[page - within :]
                self._file.write(own.data)
                self._done += len(own)


def _repeated(shape: tuple[int, ...]) -> bytes:
    """The repetition levels of a row's numbers: at which depth each one begins a new list."""
    levels = np.full(shape, len(shape)).reshape(-1)
    for depth in reversed(range(len(shape))):
        levels[:: math.prod(shape[depth:])] = depth
    starts = np.flatnonzero(np.diff(levels, prepend=-1))
    lengths = np.diff(starts, append=len(levels)).tolist()
    runs = zip(lengths, levels[starts].tolist(), strict=True)
    return b"".join(_varint(length << 1) + bytes([level]) for length, level in runs)


def _footer(parquet: bytes) -> Struct:
    """What a parquet's end tells of it."""
    size = int.from_bytes(parquet[-8:-4], "little")
    struct: Struct = _decoded(STRUCT, io.BytesIO(parquet[-8 - size : -8]))
    return struct


def _decoded(kind: int, data: io.BytesIO) -> Any:
    if kind in (TRUE, FALSE):
        return kind == TRUE
    if kind in (INT16, INT32, INT64):
        number = _number(data)
        return number >> 1 ^ -(number & 1)
    if kind in (BYTE, DOUBLE, BINARY):
        return data.read({BYTE: 1, DOUBLE: 8}.get(kind) or _number(data))
    if kind == LIST:
        [first] = data.read(1)
        count = first >> 4 if first >> 4 < 15 else _number(data)
        return first & 15, [_decoded(first & 15, data) for _ in range(count)]
    if kind != STRUCT:
        raise ValueError(f"Arrow's footer has Thrift's type {kind}, which is not known here")
    struct: Struct = {}
    number = 0
    while (first := data.read(1)[0]) != 0:
        number = number + (first >> 4) if first >> 4 else _decoded(INT16, data)
        struct[number] = (first & 15, _decoded(first & 15, data))
    return struct


def _encoded(kind: int, value: Any) -> bytes:
    if kind in (INT16, INT32, INT64):
        return _varint(value << 1 if value >= 0 else ~(value << 1))
    if kind == BINARY:
        return _varint(len(value)) + bytes(value)
    if kind == LIST:
        inner, values = value
        count, more = (len(values), b"") if len(values) < 15 else (15, _varint(len(values)))
        parts = [bytes([count << 4 | inner]), more, *(_encoded(inner, one) for one in values)]
    elif kind == STRUCT:
        parts, last = [], 0
        for number, (inner, one) in sorted(value.items()):
            parts += [bytes([number - last << 4 | inner]), _encoded(inner, one)]
            last = number
        parts.append(b"\0")
    else:  # a truth value has a type for each value
        parts = [] if kind in (TRUE, FALSE) else [value]
    return b"".join(parts)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _number(data: io.BytesIO) -> int:
    number = shift = 0
    while (byte := data.read(1)[0]) > 127:
        number |= (byte & 127) << shift
        shift += 7
    return number | byte << shift
