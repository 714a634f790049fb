"""A tar on this node: its samples, and their members' bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from d2m_hpc.errors import ShardError
from d2m_hpc.storage.files import regular
from d2m_hpc.storage.texts import valid
from d2m_hpc.worker.read.members import is_foreign, is_reserved
from d2m_hpc.worker.read.names import EXTENSIONS, Members, Split, split
from d2m_hpc.worker.read.nature import HEAD, nature
from d2m_hpc.worker.read.reader import Reader, Sample, Samples, Version
from d2m_hpc.worker.read.tar import BLOCK, Member, ReadAhead, TarCut, members

CUT_OFF = "cut off where the archive ends"


class Archive(Reader):
    """A plain tar on this node, read from many threads at once.

    Args:
        damage: the fault of the stream that the tar came by.
        split: splits members' names.
    """

    def __init__(self, path: Path, damage: str = "", split: Split = split) -> None:
        self._split = split
        self._file = open(path, "rb", opener=regular)  # noqa: SIM115
        self._ahead = ReadAhead(self._file)
        self.version, self.damage = Version.of(self._file), damage
        self.size = self.version.size

    def read(self, offset: int, size: int) -> bytes:
        """A member's bytes; raise `ShardError` where the file has become shorter since it was
        indexed."""
        data = os.pread(self._file.fileno(), size, offset)
        while len(data) < size and (
            more := os.pread(self._file.fileno(), size - len(data), offset + len(data))
        ):
            data += more
        if len(data) < size:
            raise ShardError(f"{self._file.name}: the file changed while it was read")
        return data

    def latest(self, offset: int, size: int) -> bytes | memoryview:
        held = self._ahead.held(offset, size)
        return self.read(offset, size) if held is None else held

    def nature(self) -> str:
        """A description of a file that is no tar; empty for a tar."""
        fd = self._file.fileno()
        begins_well = not nature(os.pread(fd, BLOCK, 0), self.size)
        return "" if begins_well else nature(os.pread(fd, HEAD, 0), self.size)

    @property
    def is_doubtful(self) -> bool:
        """Whether the stream is damaged, or the last block holds more than zeros: in every whole
        tar and in few cut ones, it is zeros."""
        last = os.pread(self._file.fileno(), BLOCK, max(0, self.size - BLOCK))
        return bool(self.damage) or any(last)

    def index(self, needed: Members = EXTENSIONS) -> Index:
        return Index(self._ahead, self.size, needed, self._split)

    def close(self) -> None:
        self._file.close()


class Index(Samples):
    """Iterate, once, over a tar's samples in its order, while its headers are read.

    By webdataset's rule, consecutive members of one key form a sample, and a repeated extension
    starts the next one. Every member is in a sample or in the ledger; webdataset's own readers skip
    the rest without a word, and hold all members in memory.

    Args:
        ahead: of a plain tar, seekable.
        size: its size in bytes.
        needed: the members that make a sample a row.
        split: splits members' names.
    """

    def __init__(
        self,
        ahead: ReadAhead,
        size: int,
        needed: Members = EXTENSIONS,
        split: Split = split,
    ) -> None:
        super().__init__(needed)
        self._split = split
        self._members = members(ahead, size)
        self._open: Sample | None = None
        self._first: frozenset[str] = frozenset()
        self._keys: set[int] = set()  # hashes, which take less memory

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
        self.ledger.finish(self.count)

    def _add(self, member: Member) -> Sample | None:
        """Take a member; return the sample that ends before it, if any."""
        if member.kind == "folder":
            return None
        key, extension = self._named(member.name)
        is_file = member.kind == "file"
        if is_file and self._open and key is not None and self._continues(key, extension):
            self._open.members[extension.lower()] = (member.offset, member.size)
            return None
        if self.ledger.takes(member.name, key, extension, is_file) or key is None:
            return None
        closed = self._begin(key)
        assert self._open is not None
        self._open.members[extension.lower()] = (member.offset, member.size)
        return closed

    def _named(self, member: str) -> tuple[str | None, str]:
        key, extension = self._split(member)
        return key, extension or ""

    def _continues(self, key: str, extension: str) -> bool:
        """Whether a member of this name belongs to the open sample."""
        last = self._open
        return last is not None and last.key == key and extension.lower() not in last.members

    def _begin(self, key: str) -> Sample | None:
        closed = self._open
        again = hash(key) in self._keys and (closed is None or closed.key != key)
        self._open = Sample(key, again=again)
        self._keys.add(hash(key))
        return closed

    def _closed(self, sample: Sample) -> Sample:
        if not self.count:
            self._first = frozenset(sample.members)
        self.count += 1
        sample.links = self.ledger.settle(sample.key, sample.members, sample.again)
        if not sample.key.isascii():
            sample.key = valid(sample.key)
        return sample

    def _lose(self, member: str) -> None:
        """Give up whatever a cut leaves in doubt.

        Args:
            member: the member that the archive ends in, or empty where it ends between two.
        """
        key, extension = self._named(member)
        aside = is_foreign(member) or is_reserved(member)
        if member and not aside:
            self.ledger.stray(key or member, CUT_OFF)
        if key is not None and not aside:
            # The cut-off member belongs to the open sample, or shows that this one is whole.
            self._open = None if self._continues(key, extension) else self._open
        elif self._open and not (self._first and self._first <= self._open.members.keys()):
            # The last sample counts as whole if it has all members that the first one has.
            self.ledger.stray(self._open.key, CUT_OFF)
            self._open = None
