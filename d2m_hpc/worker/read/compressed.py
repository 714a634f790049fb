"""Compressed streams, known by their first bytes."""

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
PLAIN = 512
"""Bytes of what was compressed that tell what it is."""
BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What the libraries raise where a stream is damaged; `OSError` may also be its source's."""


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Codec(NamedTuple):
    """`open` makes a reader of plain bytes from one of compressed bytes."""

    name: str
    magic: re.Pattern[bytes]
    open: Callable[[Any], AbstractContextManager[Readable]]


def _zstd(source: Any) -> AbstractContextManager[Readable]:
    # The standard library has it from Python 3.14 on; pyarrow is here anyway.
    made: AbstractContextManager[Readable] = pa.CompressedInputStream(
        pa.PythonFile(source, mode="r"), "zstd"
    )
    return made


# A tar begins with a file's name: bzip2's three letters could well be of one.
CODECS = (
    Codec("gzip", re.compile(rb"\x1f\x8b"), lambda source: gzip.GzipFile(fileobj=source)),
    Codec("xz", re.compile(rb"\xfd7zXZ\0"), lzma.LZMAFile),
    Codec("bzip2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    Codec("zstd", re.compile(rb"\x28\xb5\x2f\xfd"), _zstd),
)


def codec_of(head: bytes) -> Codec | None:
    """How a stream that begins so is compressed, if it is."""
    return next((codec for codec in CODECS if codec.magic.match(head)), None)


def start_of(head: bytes) -> bytes:
    """The first plain bytes of a compressed stream; empty where it is damaged or too short."""
    codec = codec_of(head)
    with suppress(*BROKEN):
        if codec:
            with codec.open(io.BytesIO(head)) as stream:
                return stream.read(PLAIN)
    return b""
