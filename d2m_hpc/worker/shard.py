"""One shard: bring the tar to this node, index its headers, hand out its samples' members."""

from __future__ import annotations

import gzip
import io
import os
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
        """Bytes of the tar; short only where the file ends."""
        data = os.pread(self._file.fileno(), size, offset)
        while len(data) < size and (
            more := os.pread(self._file.fileno(), size - len(data), offset + len(data))
        ):
            data += more
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
        with fsspec.open(url, "rb") as stream:
            yield stream
    except FileNotFoundError:
        raise ShardError(f"{url}: no such file") from None


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
        words.seek(0)
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
    with tarfile.open(fileobj=io.BytesIO(bytes(tarfile.RECORDSIZE))) as tar:
        tar.fileobj = file  # only now, so that the constructor reads nothing of it
        offset = 0
        while not index.cut:
            file.seek(offset)
            try:
                member = tarfile.TarInfo.fromtarfile(tar)
            except tarfile.HeaderError as error:
                index.cut = _cut_at(error, offset, size)
                break
            offset = tar.offset
            end = member.offset_data + (member.size if member.isreg() else 0)
            if end > size:
                index.cut = f"at byte {size}: {member.name} should reach byte {end}"
                group.cut(member.name)
            else:
                group.add(member)
    group.finish()
    return index


def _cut_at(error: tarfile.HeaderError, offset: int, size: int) -> str:
    """Empty for the end-of-archive mark, a block of zeros."""
    kind = type(error).__name__
    if kind == "EOFHeaderError":
        return ""
    reason = "the end-of-archive mark is missing" if kind == "EmptyHeaderError" else str(error)
    return f"at byte {offset} of {size}: {reason}"


class _Grouping:
    """webdataset's rule: consecutive members of one key form a sample.

    A repeated extension starts the next one.
    """

    def __init__(self, index: Index) -> None:
        self.index = index

    def add(self, member: tarfile.TarInfo) -> None:
        if member.isdir() or _is_meta(member.name):
            return
        key, extension = base_plus_ext(member.name)
        if key is None:
            self._stray(member.name, "a member without an extension")
        elif not member.isreg() or member.issparse():
            self._stray(member.name, "a link or a special file")
        else:
            samples, extension = self.index.samples, extension.lower()
            if not samples or samples[-1].key != key or extension in samples[-1].members:
                samples.append(Sample(key))
            samples[-1].members[extension] = (member.offset_data, member.size)

    def _stray(self, name: str, reason: str) -> None:
        self.index.strays.append(Rejection(name, reason))

    def cut(self, name: str) -> None:
        """The archive ends within this member: its sample is lost."""
        key = base_plus_ext(name)[0] or name
        if self.index.samples and self.index.samples[-1].key == key:
            self.index.samples.pop()
        self._stray(key, CUT_OFF)

    def finish(self) -> None:
        """After a cut between members, the last sample counts if it has all that the first has."""
        samples, strays = self.index.samples, self.index.strays
        if not self.index.cut or not samples or (strays and strays[-1].reason == CUT_OFF):
            return
        if len(samples) == 1 or not samples[0].members.keys() <= samples[-1].members.keys():
            self._stray(samples.pop().key, CUT_OFF)


def _is_meta(name: str) -> bool:
    """webdataset's own notes in a tar."""
    base = name.split("/")[0]
    return base.startswith("__") and base.endswith("__")
