"""The plan on disk: a parquet of all shards of a run."""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2m_hpc.run.damage import undamaged
from d2m_hpc.run.records import Shard
from d2m_hpc.storage.files import atomic_write, is_private

_SCHEMA = pa.schema([("stem", pa.string()), ("url", pa.string()), ("size", pa.int64())])


ADVICE = "remove it and submit again: it is made anew, and what is done stays done"
PART = 1 << 14
"""Shards that are read at once when some are drawn."""


def write_shards(path: Path, shards: Sequence[Shard], private: bool = False) -> None:
    """Write a plan; a plan that is private stays so, as it keeps its earlier URLs.

    Args:
        private: whether new URLs hold secrets.
    """
    stems, urls = _strings(s.stem for s in shards), _strings(s.url for s in shards)
    columns = [stems, urls, _integers([s.size for s in shards])]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=_SCHEMA), sink, write_page_checksum=True)
    atomic_write(path, sink.getvalue().to_pybytes(), private=private or is_private(path))


# These two make Arrow's buffers themselves: `pyarrow.array`, like `read_table`, imports pandas if
# pandas is installed, which takes up to a second.


def _strings(texts: Iterable[str]) -> pa.Array:
    encoded = [text.encode() for text in texts]
    offsets = array("i", accumulate(map(len, encoded), initial=0))
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def _integers(values: Sequence[int | None]) -> pa.Array:
    known = np.packbits(np.array([v is not None for v in values], bool), bitorder="little")
    numbers = array("q", (v or 0 for v in values))
    buffers = [pa.py_buffer(known), pa.py_buffer(numbers)]
    return pa.Array.from_buffers(pa.int64(), len(values), buffers)


def read_shards(path: Path) -> list[Shard]:
    return list(map(Shard, *_read(path, _SCHEMA.names)))


def read_some(path: Path, most: int) -> list[Shard]:
    """Draw at most `most` shards of a plan at random."""
    shards: list[Shard] = []
    with undamaged(path, ADVICE), _opened(path) as file:
        total = file.metadata.num_rows
        drawn, start = sorted(random.sample(range(total), min(most, total))), 0
        for part in file.iter_batches(PART, columns=_SCHEMA.names, use_threads=False):
            rows = drawn[bisect_left(drawn, start) : bisect_left(drawn, start + len(part))]
            shards += (Shard(*(c[row - start].as_py() for c in part.columns)) for row in rows)
            start += len(part)
    return shards


def read_named(path: Path, stems: Sequence[str]) -> list[Shard]:
    """Read the shards of a plan with the given stems."""
    import pyarrow.compute as pc  # the import takes longer than most commands do

    table = _table(path, _SCHEMA.names)
    return list(map(Shard, *_lists(table.filter(pc.is_in(table["stem"], _strings(stems))))))


def read_stems(path: Path) -> list[str]:
    """Read the stems of all shards of a plan, in its order."""
    [stems] = _read(path, ["stem"])
    return stems


def _read(path: Path, columns: Sequence[str]) -> list[list[Any]]:
    """Read the values of columns; empty lists if there is no plan yet."""
    if not path.exists():
        return [[] for _ in columns]
    return _lists(_table(path, columns))


def _table(path: Path, columns: Sequence[str]) -> pa.Table:
    with undamaged(path, ADVICE), pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns)


def _lists(table: pa.Table) -> list[list[Any]]:
    return [column.to_pylist() for column in table.columns]


def _opened(path: Path) -> pq.ParquetFile:
    """Open a plan to read it in parts, without fetching anything in advance."""
    return pq.ParquetFile(
        path, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 16
    )
