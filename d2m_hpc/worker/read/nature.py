"""Recognise what a file is that is no tar (HTML, a zip, text), to name that in the error."""

from __future__ import annotations

import re
import tarfile

from d2m_hpc.models.inputs import format_of
from d2m_hpc.storage.texts import safe

HEAD = 1 << 20
"""Bytes that are read; a tool's messages before a tar are shorter."""
MAGIC, MAGIC_AT = b"ustar", 257
SIGNATURES = {
    b"PAR1": "a parquet file",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x04\x22\x4d\x18": "compressed with lz4, which is not read; gzip, xz, bzip2 and zstd are",
    b"\x1f\x9d": "compressed with `compress`, which is not read; gzip, xz, bzip2 and zstd are",
    b"%PDF": "a PDF",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"version https://git-lfs": "a git-lfs pointer; `git lfs pull` fetches the file itself",
}
_MARKUP = re.compile(rb"\s*(<!doctype html|<html|<head|<body)", re.IGNORECASE)
_XML = re.compile(rb"\s*<(\?xml|error)", re.IGNORECASE)
_JSON = re.compile(rb'\s*(\{\s*["}]|\[\s*[\[{"\d\]-])')
_SPACE = b"\t\n\r\f\x1b"
QUOTED = 60
"""Characters of a text that are shown."""


def nature(head: bytes, size: int) -> str:
    """Describe a file that is no tar; empty for a tar, whole or damaged.

    Args:
        head: its first `HEAD` bytes.
        size: of the file, in bytes.
    """
    if not size:
        return "it is empty"
    if head[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC or _is_header(head[: tarfile.BLOCKSIZE]):
        return ""
    if not any(head[: tarfile.BLOCKSIZE]):  # an empty archive, or one without its start
        is_tar = any(head) or size <= tarfile.RECORDSIZE
        return "" if is_tar else f"its first {len(head)} bytes are zeros, and were never written"
    for signature, what in SIGNATURES.items():
        if head.startswith(signature):
            return f"it is {what}"
    if found := _chatter(head) or _text(head):  # first, as some pictures begin with two letters
        return found
    kind = format_of(head)
    return f"it is a picture ({kind})" if kind else f"it begins with the bytes {head[:8].hex(' ')}"


def _is_header(block: bytes) -> bool:
    """Whether a block is a tar's header, also of old tars without a magic number."""
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _chatter(head: bytes) -> str:
    """Describe bytes before a tar; before whole blocks, a tar's own start is damaged."""
    at = head.find(MAGIC)
    while at >= 0:
        start = at - MAGIC_AT
        if start % tarfile.BLOCKSIZE and _is_header(head[max(0, start) :][: tarfile.BLOCKSIZE]):
            return (
                f"{start} bytes stand before the tar, {_quoted(head[:start])}; a command may write "
                "nothing else to its standard output"
            )
        at = head.find(MAGIC, at + 1)
    return ""


def _text(head: bytes) -> str:
    if _MARKUP.match(head):
        return "it is an HTML page, as servers send in a file's place"
    if _XML.match(head):
        return f"it is XML, as stores send in a file's place: {_quoted(head)}"
    if _JSON.match(head):
        return f"it is JSON: {_quoted(head)}"
    start = head[:200]
    if all(byte >= 0x20 or byte in _SPACE for byte in start) and 0x7F not in start:
        return f"it is text: {_quoted(head)}"
    return ""


def _quoted(data: bytes) -> str:
    return repr(safe(data[: 4 * QUOTED].decode("utf-8", "surrogateescape").strip(), QUOTED))
