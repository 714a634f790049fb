"""Bring a tar to this node: from a shared disk, an object store or a command, through gzip."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import fsspec

from d2m_hpc.errors import ShardError
from d2m_hpc.state.manifest import Shard
from d2m_hpc.urls import PIPE, is_local, is_pipe

GZIP_MAGIC = b"\x1f\x8b"
SAID = 2000
"""Bytes of a failed command's last words that go on record."""


@dataclass
class Staged:
    """A local, uncompressed tar; `damage` says what is wrong with the stream that it came from."""

    path: Path
    damage: str = ""


@contextmanager
def stage(shard: Shard, scratch: Path) -> Iterator[Staged]:
    """Bring a shard to this node; a copy in scratch is deleted afterwards.

    Raises:
        ShardError: it cannot be had.
    """
    if is_local(shard.url) and not _is_gzip(shard.url):
        yield Staged(Path(shard.url))
        return
    copy = scratch / f"{shard.stem}.tar"
    try:
        with _source(shard.url) as source:
            damage = _copy(source, copy)
        yield Staged(copy, damage)
    finally:
        copy.unlink(missing_ok=True)


def _is_gzip(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == GZIP_MAGIC
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}") from None


@contextmanager
def _source(url: str) -> Iterator[BinaryIO]:
    if is_pipe(url):
        with _pipe(url.removeprefix(PIPE)) as stream:
            yield stream
        return
    try:
        opened = _opened(url)
    except FileNotFoundError:
        raise ShardError(f"{url}: no such file") from None
    except (OSError, ImportError, ValueError) as error:
        raise ShardError(f"{url}: {type(error).__name__}: {error}") from error
    with opened as stream:
        yield stream


def _opened(url: str) -> BinaryIO:
    if is_local(url):  # fsspec would take `::` in a path for a chain of stores
        return open(url, "rb")
    stream: BinaryIO = fsspec.open(url, "rb").open()
    return stream


@contextmanager
def _pipe(command: str) -> Iterator[BinaryIO]:
    """A command's output. The command is the user's own shell line, as webdataset runs it."""
    shell = ["/bin/bash", "-o", "pipefail", "-c", command]
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            shell, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words
        )
        with process:
            assert process.stdout is not None
            yield process.stdout  # type: ignore[misc]
            # A reader that stops early must not look like a command that fails.
            while process.stdout.read(1 << 20):
                pass
        words.seek(max(0, words.seek(0, os.SEEK_END) - SAID))
        said = words.read().decode(errors="replace").strip()
    if process.returncode:
        raise ShardError(f"pipe:{command} ended with exit code {process.returncode}: {said}")


def _copy(source: BinaryIO, path: Path) -> str:
    """Copy a stream to a file, through gzip where it is compressed; returns what broke it off."""
    head = source.read(2)
    with open(path, "wb") as file:
        if head != GZIP_MAGIC:
            file.write(head)
            shutil.copyfileobj(source, file, 1 << 20)
            return ""
        try:
            with gzip.GzipFile(fileobj=_Rejoined(head, source), mode="rb") as plain:
                shutil.copyfileobj(plain, file, 1 << 16)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            return f"in the gzip stream, after {file.tell()} bytes of tar: {error}"
    return ""


class _Rejoined(io.RawIOBase):
    """A stream with its first bytes, which were looked at, in front again."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """All that is left for a negative size; else up to `size` bytes."""
        cut = len(self._head) if size < 0 else size
        head, self._head = self._head[:cut], self._head[cut:]
        return head or self._rest.read(size)
