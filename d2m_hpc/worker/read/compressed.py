"""Recognise and read compressed streams by their first bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

HEAD = 16
"""Bytes that tell how a stream is compressed."""
PIECE = 1 << 16
PLAIN = 512
"""Bytes of what was compressed that tell what it is."""
MEMORY = 1 << 28
"""Bytes that decompressing may take: four times what `xz -9` asks for. zstd's own limit is half."""
BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""The libraries' errors for a damaged stream; `OSError` may also be its source's."""


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Codec(NamedTuple):
    """A compression; `open` makes a reader of plain bytes from one of compressed bytes."""

    name: str
    magic: re.Pattern[bytes]
    open: Callable[[Any], AbstractContextManager[Readable]]


class _Xz(io.RawIOBase):
    """Reads a stream of one part or several in bounded memory, which `lzma.LZMAFile` does not.

    Bytes after a part that begin no other are padding, as they are to that class.
    """

    def __init__(self, source: Readable) -> None:
        self._source, self._decoder = source, self._new()
        self._block, self._is_maybe_padding = b"", False

    def read(self, size: int = -1) -> bytes:
        while not self._decoder.eof or self._has_more():
            block, self._block = self._block, b""
            if not block and self._decoder.needs_input and not (block := self._source.read(PIECE)):
                raise EOFError("the stream ended before its end mark")
            try:
                plain = self._decoder.decompress(block, size)
            except lzma.LZMAError as error:
                if not self._is_maybe_padding or is_hungry(str(error)):
                    raise
                break
            self._is_maybe_padding = False
            if plain:
                return plain
        return b""

    def _has_more(self) -> bool:
        """Whether another part follows, which is read next; zeros between parts are padding."""
        block = self._decoder.unused_data.lstrip(b"\0")
        while not block:
            if not (raw := self._source.read(PIECE)):
                return False
            block = raw.lstrip(b"\0")
        self._decoder, self._block, self._is_maybe_padding = self._new(), block, True
        return True

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY)


def is_hungry(error: str) -> bool:
    """Whether a library says that a stream takes more memory than is allowed, and not that the
    stream is damaged."""
    return "emory" in error


def _zstd(source: Any) -> AbstractContextManager[Readable]:
    # By pyarrow, as the standard library has zstd only from Python 3.14 on.
    made: AbstractContextManager[Readable] = pa.CompressedInputStream(
        pa.PythonFile(source, mode="r"), "zstd"
    )
    return made


# A tar begins with a file's name, which may begin like bzip2's three letters.
CODECS = (
    Codec("gzip", re.compile(rb"\x1f\x8b"), lambda source: gzip.GzipFile(fileobj=source)),
    Codec("xz", re.compile(rb"\xfd7zXZ\0"), _Xz),
    Codec("bzip2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    Codec("zstd", re.compile(rb"\x28\xb5\x2f\xfd"), _zstd),
)


def codec_of(head: bytes) -> Codec | None:
    """The compression of a stream with these first bytes, if any."""
    return next((codec for codec in CODECS if codec.magic.match(head)), None)


def start_of(head: bytes) -> bytes:
    """The first plain bytes of a compressed stream; empty for a damaged or too short one."""
    codec = codec_of(head)
    with suppress(*BROKEN):
        if codec:
            with codec.open(io.BytesIO(head)) as stream:
                return stream.read(PLAIN)
    return b""
