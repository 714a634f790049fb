"""A tar on this node: its samples, and their members' bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext

from d2m_hpc.errors import ShardError
from d2m_hpc.state.manifest import Rejection
from d2m_hpc.worker.nature import HEAD, nature
from d2m_hpc.worker.tar import BLOCK, Member, TarCut, members

CUT_OFF = "cut off where the archive ends"
_META = re.compile("__[^/]*__($|/)")


@dataclass
class Sample:
    """A key and where its members lie in the tar: lower-case extension to (offset, size)."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


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

    def nature(self) -> str:
        """What the file is if it is no tar."""
        fd = self._file.fileno()
        begins_well = not nature(os.pread(fd, BLOCK, 0), self.size)
        return "" if begins_well else nature(os.pread(fd, HEAD, 0), self.size)

    def ends_in_zeros(self) -> bool:
        """As every whole tar does; the last block of one that was cut off seldom happens to."""
        return not any(os.pread(self._file.fileno(), BLOCK, max(0, self.size - BLOCK)))

    def index(self) -> Index:
        return Index(self._file, self.size)

    def close(self) -> None:
        self._file.close()


class Index:
    """Iterate, once, for the samples of a tar in its order, while its headers are read.

    webdataset's rule: consecutive members of one key form a sample, and a repeated extension starts
    the next one.

    Attributes:
        count: samples so far.
        strays: members that belong to none, so far.
        cut: how the archive ends too early; empty for a whole one, and until the iteration ends.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        """
        Args:
            file: a plain tar, seekable; only the iteration moves its position.
            size: its size in bytes.
        """
        self.count = 0
        self.strays: list[Rejection] = []
        self.cut = ""
        self._members = members(file, size)
        self._open: Sample | None = None
        self._first: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[Sample]:
        try:
            for member in self._members:
                if closed := self._add(member):
                    yield self._closed(closed)
        except TarCut as cut:
            self.cut = str(cut)
            self._lose(cut.member)
        if self._open:
            yield self._closed(self._open)

    def _closed(self, sample: Sample) -> Sample:
        if not self.count:
            self._first = frozenset(sample.members)
        self.count += 1
        return sample

    def _add(self, member: Member) -> Sample | None:
        """Take a member; returns the sample that ends before it, if one does."""
        if member.kind == "folder" or _is_meta(member.name):
            return None
        key, extension = base_plus_ext(member.name)
        if key is None:
            self._stray(member.name, "a member without an extension")
            return None
        if member.kind != "file":
            self._stray(member.name, "a link or a special file")
            return None
        closed = None if self._continues(key, extension) else self._begin(key)
        assert self._open is not None
        self._open.members[extension.lower()] = (member.offset, member.size)
        return closed

    def _continues(self, key: str, extension: str) -> bool:
        """A member of this name belongs to the open sample."""
        last = self._open
        return last is not None and last.key == key and extension.lower() not in last.members

    def _begin(self, key: str) -> Sample | None:
        closed, self._open = self._open, Sample(key)
        return closed

    def _stray(self, name: str, reason: str) -> None:
        self.strays.append(Rejection(name, reason))

    def _lose(self, member: str) -> None:
        """Give up what a cut leaves in doubt.

        Args:
            member: the one that the archive ends in, or empty where it ends between two.
        """
        key, extension = base_plus_ext(member)
        if member:
            self._stray(key or member, CUT_OFF)
        if key is not None and not _is_meta(member):
            # The cut-off member belongs to the open sample, or shows that this one is whole.
            self._open = None if self._continues(key, extension) else self._open
        elif self._open and not (self._first and self._first <= self._open.members.keys()):
            # A sample after which nothing stands is whole if it has all that the first has.
            self._stray(self._open.key, CUT_OFF)
            self._open = None


def _is_meta(name: str) -> bool:
    """webdataset's own notes in a tar, as it tells them."""
    if "/" not in name and name.startswith("__") and name.endswith("__"):
        return True
    return _META.match(name) is not None
