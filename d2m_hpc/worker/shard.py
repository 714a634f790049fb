"""A tar on this node: index its headers, hand out its samples' members."""

from __future__ import annotations

import io
import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext

from d2m_hpc.errors import ShardError
from d2m_hpc.state.manifest import Rejection

CUT_OFF = "cut off where the archive ends"
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
