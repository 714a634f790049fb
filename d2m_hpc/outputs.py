"""The output folder: which shards are in it, and what their parquets say of themselves."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

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
        self.fs.invalidate_cache()
        names = self.fs.ls(self.root, detail=False) if self.fs.isdir(self.root) else []
        return {n.rsplit("/", 1)[-1].removesuffix(suffix) for n in names if n.endswith(suffix)}

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self.fs.open(self.path(name), "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def record(self, stem: str) -> Record | None:
        """The record in a parquet's metadata; None where there is no such parquet, or not ours."""
        try:
            with self.fs.open(self.path(f"{stem}.parquet"), "rb") as file:
                note = (pq.read_metadata(file).metadata or {}).get(METADATA)
            return Record.from_dict(json.loads(note)) if note else None
        except (OSError, pa.ArrowInvalid, ValueError, TypeError):
            return None
