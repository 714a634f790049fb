"""The output folder: which shards are in it, and what their parquets say of themselves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from d2m_hpc.errors import D2MError
from d2m_hpc.state.manifest import Record
from d2m_hpc.state.rundir import make_folder
from d2m_hpc.urls import is_local

METADATA = b"d2m"
"""Key of the parquet's file metadata that holds the shard's record."""


@dataclass(frozen=True)
class OutputDir:
    """A flat folder of `{stem}.npz` and `{stem}.parquet`, on a disk or an object store."""

    url: str

    @property
    def is_local(self) -> bool:
        return is_local(self.url)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        url = self.url if not self.is_local else str(Path(self.url).expanduser().absolute())
        fs, root = fsspec.core.url_to_fs(url)
        return fs, root

    @property
    def fs(self) -> Any:
        return self._opened[0]

    @property
    def root(self) -> str:
        """The folder's path as its filesystem takes it."""
        return self._opened[1]

    def make(self) -> None:
        """Make the folder where it is missing."""
        if self.is_local:
            make_folder(Path(self.root))
        else:
            self.fs.makedirs(self.root, exist_ok=True)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def stems(self, suffix: str = ".parquet") -> set[str]:
        """The stems of all files with a suffix, by one listing; a finished shard has a parquet."""
        return {n.removesuffix(suffix) for n in self._names() if n.endswith(suffix)}

    def _names(self) -> Iterator[str]:
        """Of everything in the folder."""
        if not self.fs.isdir(self.root):
            return
        if self.is_local:  # one at a time: fsspec holds a list of all paths
            with os.scandir(self.root) as entries:
                yield from (entry.name for entry in entries)
        else:
            self.fs.invalidate_cache()
            yield from (n.rsplit("/", 1)[-1] for n in self.fs.ls(self.root, detail=False))

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self.fs.open(self.path(name), "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def record(self, stem: str) -> Record | None:
        """The record in a parquet's metadata; None where there is no such parquet, or not ours.

        Raises:
            D2MError: it cannot be told, for the file cannot be read.
        """
        path = self.path(f"{stem}.parquet")
        try:
            with self.fs.open(path, "rb") as file:
                footer = _footer(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise D2MError(
                f"{path} cannot be read: {error}; see to it and run the same command again"
            ) from error
        try:
            note = (pq.read_metadata(pa.BufferReader(footer)).metadata or {}).get(METADATA)
            return Record.from_dict(json.loads(note)) if note else None
        except (OSError, pa.ArrowInvalid, ValueError, TypeError):
            return None


def _footer(file: IO[bytes]) -> bytes:
    """A parquet's metadata, the 4 bytes of its length and the 4 of the format's name.

    Apart from its parsing, for arrow raises an OSError at a damaged file too.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little") + 8
    file.seek(max(0, size - length))
    return file.read()
