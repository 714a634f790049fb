"""One shard: bring the tar to this node, index its headers, hand out its samples' members."""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import fsspec
from webdataset.tariterators import base_plus_ext

from d2m_hpc.errors import ShardError
from d2m_hpc.state.manifest import Rejection, Shard

PIPE = "pipe:"
CUT_OFF = "cut off where the archive ends"
GZIP_MAGIC = b"\x1f\x8b"
SAID = 2000
"""Bytes of a failed command's last words that go on record."""
_META = re.compile("__[^/]*__($|/)")
_UNREADABLE = (
    *(tarfile.HeaderError, ValueError, ArithmeticError, LookupError),
    *(MemoryError, RecursionError),
)
"""What the standard library raises at headers that are broken, or made to break it."""


@dataclass
class Sample:
    """A key and where its members lie in the tar: lower-case extension to (offset, size)."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Index:
    """The samples of a tar in its order, and the members that belong to none.

    `cut` says how the archive ends too early; it is empty for a whole one.
    """

    samples: list[Sample] = field(default_factory=list)
    strays: list[Rejection] = field(default_factory=list)
    cut: str = ""


class Archive:
    """A plain tar on this node, read from many threads at once."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of a member.

        Raises:
            ShardError: the file has become shorter than it was when it was indexed.
        """
        data = os.pread(self._file.fileno(), size, offset)
        while len(data) < size and (
            more := os.pread(self._file.fileno(), size - len(data), offset + len(data))
        ):
            data += more
        if len(data) < size:
            raise ShardError(f"{self._file.name}: the file changed while it was read")
        return data

    def index(self) -> Index:
        return index_tar(self._file, self.size)

    def close(self) -> None:
        self._file.close()


# --- staging ---


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
    if _is_local(shard.url) and not _is_gzip(shard.url):
        yield Staged(Path(shard.url))
        return
    copy = scratch / f"{shard.stem}.tar"
    try:
        with _source(shard.url) as source:
            damage = _copy(source, copy)
        yield Staged(copy, damage)
    finally:
        copy.unlink(missing_ok=True)


def _is_local(url: str) -> bool:
    return "://" not in url and not url.startswith(PIPE)


def _is_gzip(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == GZIP_MAGIC
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}") from None


@contextmanager
def _source(url: str) -> Iterator[BinaryIO]:
    if url.startswith(PIPE):
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
    if _is_local(url):  # fsspec would take `::` in a path for a chain of stores
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


# --- indexing ---


def index_tar(file: BinaryIO, size: int) -> Index:
    """Read a tar's headers (ustar, PAX, GNU long names) and group its members by key.

    The standard library's own loop takes a broken header, or an archive that stops between two
    members, for the end; here both are a cut.

    Args:
        file: a plain tar, seekable.
        size: its size in bytes.
    """
    index = Index()
    group = _Grouping(index)
    with tarfile.open(fileobj=io.BytesIO(bytes(tarfile.RECORDSIZE)), mode="r:") as tar:
        tar.fileobj = file  # only now, so that the constructor reads nothing of it
        offset = 0
        while not index.cut:
            try:
                file.seek(offset)
                member = tarfile.TarInfo.fromtarfile(tar)
                if member.size < 0 or tar.offset <= offset:
                    raise ValueError("a negative size")
            except _UNREADABLE as error:
                index.cut = _cut_at(error, file, offset, size)
                break
            offset = tar.offset
            end = _end(member, offset)
            if end > size:
                index.cut = f"at byte {size}: {member.name} should reach byte {end}"
                group.cut(member.name)
            else:
                group.add(member)
    group.finish()
    return index


def _end(member: tarfile.TarInfo, following: int) -> int:
    """Where a member's data ends; the size of a sparse one counts its holes."""
    if member.issparse():
        return following
    return member.offset_data + (member.size if member.isreg() else 0)


def _cut_at(error: Exception, file: BinaryIO, offset: int, size: int) -> str:
    """Empty for the end-of-archive mark, zeros to the end."""
    kind = type(error).__name__
    reason = str(error) or kind
    if kind == "EmptyHeaderError":
        reason = "the end-of-archive mark is missing"
    elif kind == "EOFHeaderError":
        if _only_zeros(file, offset):
            return ""
        reason = "zeros, and more data after them"  # what a lost write leaves
    return f"at byte {offset} of {size}: {reason}"


def _only_zeros(file: BinaryIO, offset: int) -> bool:
    file.seek(offset)
    while block := file.read(1 << 20):
        if block.count(0) < len(block):
            return False
    return True


class _Grouping:
    """webdataset's rule: consecutive members of one key form a sample.

    A repeated extension starts the next one.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._closed = False

    def add(self, member: tarfile.TarInfo) -> None:
        if member.isdir() or _is_meta(member.name):
            return
        key, extension = base_plus_ext(member.name)
        if key is None:
            self._stray(member.name, "a member without an extension")
        elif not member.isreg() or member.issparse():
            self._stray(member.name, "a link or a special file")
        else:
            if not self._continues(key, extension):
                self.index.samples.append(Sample(key))
            span = (member.offset_data, member.size)
            self.index.samples[-1].members[extension.lower()] = span

    def _continues(self, key: str, extension: str) -> bool:
        """A member of this name belongs to the last sample."""
        last = self.index.samples[-1] if self.index.samples else None
        return last is not None and last.key == key and extension.lower() not in last.members

    def _stray(self, name: str, reason: str) -> None:
        self.index.strays.append(Rejection(name, reason))

    def cut(self, name: str) -> None:
        """The archive ends within this member: its sample is lost."""
        key, extension = base_plus_ext(name)
        if key is not None and not _is_meta(name):
            self._closed = True
            if self._continues(key, extension):
                self.index.samples.pop()
        self._stray(key or name, CUT_OFF)

    def finish(self) -> None:
        """After a cut between samples, the last one counts if it has all that the first has."""
        samples = self.index.samples
        if not self.index.cut or not samples or self._closed:
            return
        if len(samples) == 1 or not samples[0].members.keys() <= samples[-1].members.keys():
            self._stray(samples.pop().key, CUT_OFF)


def _is_meta(name: str) -> bool:
    """webdataset's own notes in a tar, as it tells them."""
    if "/" not in name and name.startswith("__") and name.endswith("__"):
        return True
    return _META.match(name) is not None
