"""Read the members of a tar by their headers alone, and say where a tar is cut or damaged.

An ordinary header is read here; the standard library, ten times slower, reads all others.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple
from zlib import adler32

from d2m_hpc.storage.texts import BRIEF, safe

BLOCK = tarfile.BLOCKSIZE
ENCODING = "utf-8"
"""The encoding of names, whatever a task's locale: a key must not depend on the node."""
_TIME_ONLY = re.compile(rb"(\d+) mtime=[0-9.]+\n")
"""The PAX header that webdataset puts before every member."""
STRETCH = 1 << 20
"""Bytes that are read at a time to find headers. All are read for the members anyway; to look for
each header by itself is several calls for a sample, at each of which the only thread that reads
headers would wait for the interpreter's lock."""
LONGEST_HEADER = 1 << 20
"""Bytes of a long name or a PAX header; Linux' own limit for a path is 4096."""
MOST_HEADERS = 100
"""Headers that describe one member; two or three in practice."""
_NO_PREFIX = bytes(BLOCK - 345)
"""The end of a header whose name has no second part."""
_EXTENDED = (*b"xgX", *b"LK")
_RECORD = re.compile(rb"(\d{1,20}) [^=]+=")
_DIGITS = re.compile(rb"\d{100}")
PADDING = tarfile.RECORDSIZE + BLOCK
"""Zeros at the end of any archive: two blocks, and the rest of a record of the usual 10,240 bytes;
one record more where only one block was left in the record before."""
RECORDS = [BLOCK << power for power in range(5, 12)]
"""Larger records, 16 KiB to 1 MiB, that archives for tapes and fast disks are padded to."""
JOINED = "two archives, one after the other"
DAMAGED = "damaged"
"""What a message on a tar begins with that goes on behind the place where it cannot be read."""
TRUNCATED = "truncated header"
"""The standard library's words for a header that is cut off."""
_UNREADABLE = (
    *(tarfile.HeaderError, ValueError, ArithmeticError, LookupError),
    *(MemoryError, RecursionError),
)
"""The standard library's errors at broken or malicious headers."""


class ReadAhead:
    """Reads a file for its headers, `STRETCH` bytes at a time, and keeps the last of them.

    Args:
        file: seekable; other readers may move its position.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._start, self._block = 0, b""
        self._before = (0, b"")

    def header(self, offset: int) -> tuple[bytes, int]:
        """A block with the bytes that an ordinary member's headers may take, unless the file ends
        before, and the place in it where they begin."""
        if not 0 <= (at := offset - self._start) <= len(self._block) - 3 * BLOCK:
            self._before = (self._start, self._block)
            self.file.seek(offset)
            self._start, self._block, at = offset, self.file.read(STRETCH), 0
        return self._block, at

    def held(self, offset: int, size: int) -> memoryview | None:
        """Bytes that came along with the headers; None where some of them did not."""
        for start, block in ((self._start, self._block), self._before):
            if start <= offset and offset + size <= start + len(block):
                return memoryview(block)[offset - start : offset - start + size]
        return None


class TarCut(Exception):
    """The archive ends too early; `member` is the name of a member that is cut off."""

    def __init__(self, where: str, member: str = "") -> None:
        super().__init__(where)
        self.member = member


class Member(NamedTuple):
    """A member; `offset` and `size` of its data, in bytes; `kind` is `file`, `folder` or
    `other`."""

    name: str
    offset: int
    size: int
    kind: str = "file"


def members(ahead: ReadAhead, size: int) -> Iterator[Member]:
    """Read a tar's headers: ustar, PAX, GNU long names.

    The standard library's own loop takes a broken header, or an archive that stops between two
    members, for the end; here both are a cut.

    Args:
        ahead: of a plain tar, seekable.
        size: its size in bytes.

    Raises:
        TarCut: after the last whole member.
    """
    file = ahead.file
    slow = _SlowReader(file)
    offset = 0
    while True:
        try:
            member, following = _ordinary(*ahead.header(offset), offset) or slow.read(offset)
        except _UNREADABLE as error:
            if where := _cut_at(error, file, offset, size):
                raise TarCut(where) from None
            return
        if (end := member.offset + member.size) > size:
            where = f"at byte {size}: {safe(member.name, BRIEF)} should reach byte {end}"
            raise TarCut(where, member.name)
        yield member
        offset = following


def _ordinary(block: bytes, at: int, offset: int) -> tuple[Member, int] | None:
    """Read a regular file's header, alone or behind a PAX header with just a time.

    Returns the member and the next header's offset; None for any other header.

    Args:
        block: of the tar.
        at: the header's place in it.
        offset: the header's place in the tar.
    """
    header = block[at : at + BLOCK]
    data = offset + BLOCK
    if header[156:157] == tarfile.XHDTYPE and _is_time(header, block, at + BLOCK):
        header = block[at + 2 * BLOCK : at + 3 * BLOCK]
        data += 2 * BLOCK
    if header[156:157] != tarfile.REGTYPE or (size := _size(header)) is None:
        return None
    name = header[:100].partition(b"\0")[0].decode(ENCODING, "surrogateescape")
    return Member(name, data, size), data + -(-size // BLOCK) * BLOCK


def _is_time(header: bytes, block: bytes, at: int) -> bool:
    """Whether a PAX header, whose data are at a place in a block, has just the next member's
    time."""
    if not (size := _size(header)):
        return False
    time = _TIME_ONLY.fullmatch(block, at, at + min(size, BLOCK))
    return time is not None and int(time[1]) == size


def _size(header: bytes) -> int | None:
    """The data's size, by a header of 11 octal digits, a right checksum and no prefix of the name;
    None for any other."""
    digits, end = header[124:135], header[135:136]
    if header[345:] != _NO_PREFIX or not digits.isdigit() or end not in (b"\0", b" "):
        return None
    checksum = _sum(header[:148]) + 8 * ord(" ") + _sum(header[156:345])
    if header[148:156] != b"%06o\0 " % checksum:
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _sum(data: bytes) -> int:
    """The sum of up to 256 bytes, five times as fast as by `sum`.

    The lower half of an Adler-32 checksum (RFC 1950) is 1 more than the sum of the bytes, modulo
    65,521, which 256 bytes do not reach.
    """
    return (adler32(data) & 0xFFFF) - 1


class _SlowReader:
    """Reads one header at a time, by the standard library."""

    def __init__(self, file: BinaryIO) -> None:
        self._tar = tarfile.TarFile(
            fileobj=io.BytesIO(bytes(tarfile.RECORDSIZE)), encoding=ENCODING
        )
        self._tar.fileobj = file  # after the constructor, which would read from it
        self._file = file

    def read(self, offset: int) -> tuple[Member, int]:
        """Read a member; return it and the next header's offset."""
        _require_bounded(self._file, offset)
        self._file.seek(offset)
        info = tarfile.TarInfo.fromtarfile(self._tar)
        following = self._tar.offset
        if info.size < 0 or following <= offset:
            raise ValueError("a negative size")
        if info.issparse():  # its size includes holes
            return Member(info.name, following, 0, "other"), following
        size = info.size if info.isreg() else 0
        kind = "folder" if info.isdir() else "file" if info.isreg() else "other"
        return Member(info.name, info.offset_data, size, kind), following


def _require_bounded(file: BinaryIO, offset: int) -> None:
    """Refuse headers that would take the standard library for ever, or all memory.

    Its regular expressions need quadratic time for a header of digits (CVE-2024-6232), and hold the
    interpreter meanwhile.

    Raises:
        HeaderError: a header is too long or malformed, or the archive ends in one that describes
            the next.
    """
    for number in range(MOST_HEADERS):
        file.seek(offset)
        block = file.read(BLOCK)
        if number and len(block) < BLOCK:
            raise tarfile.HeaderError(TRUNCATED)
        if len(block) < BLOCK or block[156] not in _EXTENDED:
            return
        size = tarfile.TarInfo.frombuf(block, ENCODING, "surrogateescape").size
        if not 0 <= size <= LONGEST_HEADER:
            raise tarfile.HeaderError(f"a header of {size} bytes, over {LONGEST_HEADER}")
        if len(data := file.read(size)) < size:
            raise tarfile.HeaderError(TRUNCATED)
        if block[156] in b"xgX":
            _require_records(data)
        offset += BLOCK + -(-size // BLOCK) * BLOCK
    raise tarfile.HeaderError(f"over {MOST_HEADERS} headers before one member")


def _require_records(data: bytes) -> None:
    """Raise `HeaderError` for records of a PAX header that POSIX does not allow."""
    position = 0
    while position < len(data) and data[position]:
        found = _RECORD.match(data, position)
        end = position + int(found[1]) if found else 0
        if not found or found.end() >= end or data[end - 1 : end] != b"\n":
            raise tarfile.HeaderError("invalid header")
        position = end
    if _DIGITS.search(data):
        raise tarfile.HeaderError("a number of over 100 digits in a header")


def _cut_at(error: Exception, file: BinaryIO, offset: int, size: int) -> str:
    """Say where and how an archive is cut or damaged; empty for the end-of-archive mark with zeros
    to the end."""
    kind = type(error).__name__
    reason, how = str(error) or kind, f"{DAMAGED} "
    if kind == "EmptyHeaderError":
        reason, how = "the end-of-archive mark is missing", ""
    elif reason == TRUNCATED:
        how = ""
    elif kind == "EOFHeaderError":
        reason = "zeros, and more data after them"  # as a lost write leaves
        if (after := _after_zeros(file, offset)) is None:
            if _is_padding(offset, size):
                return ""
            reason = "zeros to the end, far more than padding: a write that never finished"
            how = ""
        elif _is_next_archive(file, offset, after):
            return f"{JOINED}: the next begins at byte {after // BLOCK * BLOCK} of {size}"
    return f"{how}at byte {offset} of {size}: {reason}"


def _after_zeros(file: BinaryIO, offset: int) -> int | None:
    """The offset of the first other byte; None for zeros to the end."""
    file.seek(offset)
    while block := file.read(1 << 20):
        if rest := block.lstrip(b"\0"):
            return offset + len(block) - len(rest)
        offset += len(block)
    return None


def _is_next_archive(file: BinaryIO, offset: int, after: int) -> bool:
    """Whether an archive ends in these zeros, padded to a record as by `tar`, and another
    follows."""
    start = after // BLOCK * BLOCK
    if start % tarfile.RECORDSIZE or not 2 * BLOCK <= start - offset <= PADDING:
        return False
    file.seek(start)
    try:
        tarfile.TarInfo.frombuf(file.read(BLOCK), ENCODING, "surrogateescape")
    except _UNREADABLE:
        return False
    return True


def _is_padding(offset: int, size: int) -> bool:
    """Whether the zeros from `offset` on end an archive, or stand for bytes that were never
    written.

    A file has its full length before it is downloaded, and a filesystem may come back from a crash
    with zeros for lost bytes.
    """
    zeros = size - offset
    if not offset:  # an empty archive
        return zeros <= tarfile.RECORDSIZE
    return zeros <= max([PADDING, *(r + BLOCK for r in RECORDS if size % r == 0)])
