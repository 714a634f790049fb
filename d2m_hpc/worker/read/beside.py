"""Texts in parquets beside the shards, found by the samples' keys or by a field of their JSON."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2m_hpc.config.texts import STEM, TextSource
from d2m_hpc.errors import Rejected
from d2m_hpc.storage import stores
from d2m_hpc.storage.files import regular
from d2m_hpc.storage.texts import BRIEF, safe
from d2m_hpc.storage.urls import is_local
from d2m_hpc.worker.read import parse, refusal
from d2m_hpc.worker.read.columns import is_text, shown

MOST = 256 << 20
"""Bytes of the texts and keys of a file; Python takes some times as much for them."""
KEPT = 4
"""Files that a task keeps, as all shards may name one."""
_TWICE = -1


class Beside:
    """A column of texts, in memory.

    Attributes:
        version: the size and time of a local file, by path.

    Raises:
        ShardError: there is no such file or column, or it is too large to be kept.
    """

    def __init__(self, path: str, source: TextSource) -> None:
        self.name, self.by = os.path.basename(path), source.by
        self.version: dict[str, list[int]] = {}
        try:
            with _opened(path) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
                _require_fit(parquet, source)
                if is_local(path):
                    there = os.fstat(file.fileno())
                    self.version[path] = [there.st_size, there.st_mtime_ns]
                table = parquet.read([source.by, source.column], use_threads=False)
            self._texts = table[source.column].combine_chunks()
            keys = table[source.by].cast(pa.string()).to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            what = getattr(error, "strerror", None) or str(error)
            raise refusal.unreadable(path, f"no texts can be read: {what}") from None
        self._rows: dict[str, int] = {}
        for row, key in enumerate(keys):
            self._rows[key] = _TWICE if key in self._rows else row

    def text(self, key: str, values: Mapping[str, Any]) -> str:
        """The text of a sample.

        Args:
            values: the sample's JSON, unless rows are found by `key`.

        Raises:
            Rejected: there is none, or more than one.
        """
        if self.by != "key":
            found = parse.field(values, self.by)
            if found is None:
                raise Rejected(f"its JSON has no {self.by!r}, by which {self.name} tells samples")
            key = str(found)
        row = self._rows.get(key)
        if row is None or row == _TWICE:
            many = "no row" if row is None else "several rows"
            raise Rejected(f"{self.name} has {many} with the {self.by} {safe(key, 40)!r}")
        text: str | None = self._texts[row].as_py()
        if text is None:
            raise Rejected(f"{self.name} has a null for the {self.by} {safe(key, 40)!r}")
        return text.removeprefix(parse.MARK)


def of_shard(sources: Mapping[str, TextSource], stem: str) -> dict[str, Beside]:
    """The texts beside a shard, by raw input.

    Raises:
        ShardError: a file cannot be read.
    """
    paths = {raw: source.table.replace(STEM, stem) for raw, source in sources.items()}
    return {
        raw: _kept(path, sources[raw], os.stat(path).st_mtime_ns if os.path.exists(path) else 0)
        for raw, path in paths.items()
        if path
    }


def versions(beside: Mapping[str, Beside]) -> dict[str, list[int]]:
    """The size and time of each local file, by path."""
    return {path: version for one in beside.values() for path, version in one.version.items()}


@lru_cache(KEPT)
def _kept(path: str, source: TextSource, mtime_ns: int) -> Beside:
    return Beside(path, source)


def _opened(path: str) -> Any:
    if is_local(path):
        return open(path, "rb", opener=regular)
    data = io.BytesIO()
    for block in stores.blocks(path):
        if data.tell() + len(block) > MOST:
            raise ValueError(f"it has over {MOST:,} bytes; write a file for each shard")
        data.write(block)
    return data


def _require_fit(parquet: pq.ParquetFile, source: TextSource) -> None:
    """Raise `ValueError` for a file without the columns, or with more than fits into memory."""
    schema, names = parquet.schema_arrow, (source.by, source.column)
    for name in names:
        if name not in schema.names:
            has = shown(schema.names)
            raise ValueError(f"there is no column {safe(name, BRIEF)!r}; it has {has}")
    if not is_text(schema.field(source.column).type):
        kind = safe(str(schema.field(source.column).type), BRIEF)
        raise ValueError(f"the column {safe(source.column, BRIEF)!r} holds {kind} and no texts")
    groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema in names)
    if size > MOST:
        what = f"its keys and texts take {size:,} bytes, over {MOST:,}"
        raise ValueError(f"{what}; write a file for each shard, and put {STEM} in its name")
