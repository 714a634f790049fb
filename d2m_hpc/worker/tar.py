"""The members of a tar, one after the other, by their headers alone.

A header that says nothing out of the ordinary is read here; the standard library, which takes ten
times as long, reads all others.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
_TIME_ONLY = re.compile(rb"(\d+) mtime=[0-9.]+\n")
"""The PAX header that webdataset puts before every member."""
_UNREADABLE = (
    *(tarfile.HeaderError, ValueError, ArithmeticError, LookupError),
    *(MemoryError, RecursionError),
)
"""What the standard library raises at headers that are broken, or made to break it."""


class TarCut(Exception):
    """The archive ends too early; `member` is the name of the one that is cut off, if one is."""

    def __init__(self, where: str, member: str = "") -> None:
        super().__init__(where)
        self.member = member


class Member(NamedTuple):
    """`offset` and `size` of its data, in bytes; `kind` is `file`, `folder` or `other`."""

    name: str
    offset: int
    size: int
    kind: str = "file"


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """Read a tar's headers: ustar, PAX, GNU long names.

    The standard library's own loop takes a broken header, or an archive that stops between two
    members, for the end; here both are a cut.

    Args:
        file: a plain tar, seekable.
        size: its size in bytes.

    Raises:
        TarCut: after the last whole member.
    """
    slow = _SlowReader(file)
    offset = 0
    while True:
        try:
            member, following = _ordinary(file, offset) or slow.read(offset)
        except _UNREADABLE as error:
            if where := _cut_at(error, file, offset, size):
                raise TarCut(where) from None
            return
        if (end := member.offset + member.size) > size:
            where = f"at byte {size}: {member.name} should reach byte {end}"
            raise TarCut(where, member.name)
        yield member
        offset = following


def _ordinary(file: BinaryIO, offset: int) -> tuple[Member, int] | None:
    """A regular file's header, alone or behind a PAX header that holds but a time.

    Returns:
        the member, and where the next one's header stands; None for any other header.
    """
    file.seek(offset)
    blocks = file.read(3 * BLOCK)
    start = 2 * BLOCK if _is_time(blocks) else 0
    header = blocks[start : start + BLOCK]
    if header[156:157] != tarfile.REGTYPE or header[345] or (size := _size(header)) is None:
        return None
    name = header[:100].partition(b"\0")[0].decode(tarfile.ENCODING, "surrogateescape")
    data = offset + start + BLOCK
    return Member(name, data, size), data + -(-size // BLOCK) * BLOCK


def _is_time(blocks: bytes) -> bool:
    """A PAX header comes first, and says nothing but the next member's time."""
    if blocks[156:157] != tarfile.XHDTYPE or not (size := _size(blocks[:BLOCK])):
        return False
    time = _TIME_ONLY.fullmatch(blocks[BLOCK : 2 * BLOCK], 0, size)
    return time is not None and int(time[1]) == size


def _size(header: bytes) -> int | None:
    """The data's size by a header of 11 octal digits and a right checksum; None by any other."""
    digits, end = header[124:135], header[135:136]
    if len(header) < BLOCK or not digits.isdigit() or end not in (b"\0", b" "):
        return None
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if header[148:156] != b"%06o\0 " % checksum:
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


class _SlowReader:
    """One header at a time, by the standard library."""

    def __init__(self, file: BinaryIO) -> None:
        self._tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(tarfile.RECORDSIZE)))
        self._tar.fileobj = file  # only now, so that the constructor reads nothing of it
        self._file = file

    def read(self, offset: int) -> tuple[Member, int]:
        """The member, and where the next one's header stands."""
        self._file.seek(offset)
        info = tarfile.TarInfo.fromtarfile(self._tar)
        following = self._tar.offset
        if info.size < 0 or following <= offset:
            raise ValueError("a negative size")
        if info.issparse():  # its size counts its holes
            return Member(info.name, following, 0, "other"), following
        size = info.size if info.isreg() else 0
        kind = "folder" if info.isdir() else "file" if info.isreg() else "other"
        return Member(info.name, info.offset_data, size, kind), following


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
