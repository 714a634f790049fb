"""The output folder, on a disk or an object store, as a flat set of named files."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.storage import stores
from d2m_hpc.storage.files import durable, make_folder, regular
from d2m_hpc.storage.urls import is_local, scheme

BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")
"""Stores without folders: making one would make a bucket of a misspelt name."""
PROBE = ".d2m-probe"
PARQUET, NPZ = SUFFIXES = (".parquet", ".npz")
"""How the names of a shard's two files end."""
T = TypeVar("T")


class Stored(NamedTuple):
    """An object in a store, as far as it is like an `os.DirEntry`."""

    name: str

    def is_file(self) -> bool:
        return True


@dataclass(frozen=True)
class OutputDir:
    """A flat folder of `{stem}.npz` and `{stem}.parquet`, on a disk or an object store."""

    url: str

    @property
    def is_local(self) -> bool:
        return is_local(self.url)

    @property
    def fs(self) -> Any:
        """The filesystem; not kept, as a forked process needs its own."""
        return stores.filesystem(self._url)[0]

    @cached_property
    def root(self) -> str:
        """The folder's path in its filesystem."""
        return self._url if self.is_local else stores.filesystem(self._url)[1]

    @cached_property
    def _url(self) -> str:
        return str(Path(os.path.expanduser(self.url)).absolute()) if self.is_local else self.url

    def make(self) -> None:
        """Make the folder if it is missing; probe a store.

        Raises:
            ConfigError: the folder cannot be made, or the store takes no objects.
        """
        with self._writing():
            self._make()
        if not self.is_local:
            self.probe()

    def _make(self) -> None:
        if self.is_local:
            make_folder(Path(self.root))
        elif scheme(self.url) not in BUCKETS:
            self.fs.makedirs(self.root, exist_ok=True)

    def probe(self) -> None:
        """Write and remove a file; raise ConfigError if that fails."""
        with self._writing():
            self._ask(lambda: self.fs.pipe_file(self.path(PROBE), b"d2m"))
            self.remove(PROBE)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each store raises errors of its own
            mistake = f"output_metadata_dir: {self.url} cannot be written: {error}"
            raise ConfigError("config", [mistake]) from error

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def address(self, name: str) -> str:
        """A file's path, or its URL on a store, for other programs."""
        path = self.path(name)
        return path if self.is_local else str(self.fs.unstrip_protocol(path))

    def stems(self) -> set[str]:
        """List the stems of all parquets; every finished shard has one."""
        return self.pairs((".parquet",))[".parquet"]

    def pairs(
        self, suffixes: Sequence[str] = (".npz", ".parquet"), odd: set[str] | None = None
    ) -> dict[str, set[str]]:
        """List the stems of all outputs, by suffix, in one look at the folder.

        Args:
            odd: receives the stems of folders, pipes and devices that are named as parquets.
        """
        found: dict[str, set[str]] = {suffix[1:]: set() for suffix in suffixes}
        for entry in self._entries():
            stem, _, suffix = entry.name.rpartition(".")
            if stem and suffix in found:
                if entry.is_file():
                    found[suffix].add(stem)
                elif odd is not None and suffix == "parquet":
                    odd.add(stem)
        return {f".{suffix}": stems for suffix, stems in found.items()}

    def ask_anew(self) -> None:
        """Make a client of NFS forget its listing of the folder, and which names were missing.

        A change of its own has it ask the server. Does nothing where this user may not write.
        """
        if self.is_local:
            for change in (os.mkdir, os.rmdir):
                with suppress(OSError):  # another process may do the same at the moment
                    change(self.path(PROBE))

    def _entries(self) -> Iterator[os.DirEntry[str] | Stored]:
        """List the folder.

        Raises:
            D2MError: the store cannot be listed.
        """
        if self.is_local:  # one at a time: fsspec holds a list of all paths
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root) as entries:
                yield from entries
            return
        try:
            paths = stores.retrying(self._paths)
        except Exception as error:  # each store raises errors of its own
            raise D2MError(f"{self.url} cannot be listed: {error}") from error
        yield from (Stored(path.rsplit("/", 1)[-1]) for path in paths)

    def _paths(self) -> list[str]:
        """List the paths in a store; s3fs would list the parent of a missing folder."""
        fs = self.fs
        return fs.ls(self.root, detail=False) if fs.exists(self.root) else []

    def read(self, name: str, last: int | None = None) -> bytes:
        """Read a file, or its last bytes.

        Raises:
            OSError, or an error of the store's own.
        """
        if self.is_local:
            with self.open(name) as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0 if last is None else max(0, size - last))
                return file.read()
        path, start = self.path(name), None if last is None else -last
        data: bytes = self._ask(lambda: self.fs.cat_file(path, start=start))
        return data

    def open(self, name: str) -> io.BufferedIOBase:
        """Open a file to read, on disk or whole in memory.

        Raises:
            OSError, or an error of the store's own.
        """
        if self.is_local:
            return open(self.path(name), "rb", opener=regular)
        return io.BytesIO(self.read(name))

    def has(self, name: str) -> bool:
        return bool(self._ask(lambda: self.fs.exists(self.path(name))))

    def put(self, file: Path) -> None:
        """Send a file to the store under its own name; an object appears whole or not at all.

        Raises:
            FileExistsError: the object exists, and the store knows conditions.
            OSError: the store refuses the file, or keeps less than it was sent.
        """
        path, size = self.path(file.name), file.stat().st_size
        send = partial(self.fs.put_file, str(file), path)
        try:
            self._ask(partial(send, mode="create") if stores.knows_create(self.fs) else send)
        except Exception as error:
            if isinstance(error, FileExistsError) or "implemented" not in str(error).lower():
                raise
            self._ask(send)  # a store that knows no conditions
        if (kept := self._ask(lambda: self.fs.info(path)["size"])) != size:
            self.remove(file.name)  # a broken parquet looks as if another program had written it
            raise OSError(f"{path} has {kept} bytes in the store, {size} were sent")

    def create(self, name: str, data: bytes) -> None:
        """Make a file unless it exists; a store that knows no conditions overwrites the file.

        Raises:
            ConfigError: the file cannot be written.
        """
        with self._writing(), suppress(FileExistsError):
            self._make()
            if self.is_local:
                with durable(Path(self.path(name)), "xb") as file:
                    file.write(data)
            else:
                put = partial(self.fs.pipe_file, self.path(name), data)
                self._ask(partial(put, mode="create") if stores.knows_create(self.fs) else put)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with suppress(FileNotFoundError):
            self._ask(lambda: self.fs.rm_file(self.path(name)))

    def _ask(self, call: Callable[[], T]) -> T:
        return call() if self.is_local else stores.retrying(call)

    def sha256(self, name: str) -> str:
        with self.fs.open(self.path(name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
