"""The plan on disk: a parquet of all shards."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2m_hpc.state.damage import undamaged
from d2m_hpc.state.manifest import Shard
from d2m_hpc.state.private import is_private
from d2m_hpc.state.rundir import atomic_write

_SCHEMA = pa.schema([("stem", pa.string()), ("url", pa.string()), ("size", pa.int64())])


def write_shards(path: Path, shards: Sequence[Shard], private: bool = False) -> None:
    """Write a plan; it stays private where it was, as it keeps what was planned before.

    Args:
        private: new URLs hold secrets.
    """
    stems, urls = _strings(s.stem for s in shards), _strings(s.url for s in shards)
    columns = [stems, urls, _integers([s.size for s in shards])]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=_SCHEMA), sink, write_page_checksum=True)
    atomic_write(path, sink.getvalue().to_pybytes(), private=private or is_private(path))


# By their buffers (Arrow's columnar format): `pyarrow.array`, like `read_table`, imports pandas
# where it is installed, and that takes up to a second.


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


def read_stems(path: Path) -> list[str]:
    """Of all shards of a plan, in its order."""
    [stems] = _read(path, ["stem"])
    return stems


def _read(path: Path, columns: Sequence[str]) -> list[list[Any]]:
    """Each column's values; none where there is no plan yet."""
    if not path.exists():
        return [[] for _ in columns]
    advice = "remove it and submit again: it is made anew, and what is done stays done"
    with undamaged(path, advice), pq.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read(columns)
        return [table[name].to_pylist() for name in columns]
