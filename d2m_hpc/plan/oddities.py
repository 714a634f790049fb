"""Check files that a pattern matches, but whose names do not end as those of tars do."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from d2m_hpc.plan.naming import location
from d2m_hpc.storage import stores
from d2m_hpc.storage.urls import GLOB, is_local

LOOKED_AT = 3
"""The most files of one ending that are opened: tars may have any ending, but all the same one."""
KINDS = 10
"""The most endings that are checked and reported."""
HEAD = 4096
"""Bytes that are read of a file."""
COMPRESSED = 1 << 20
"""Bytes that are read of a compressed file: blocks of bzip2 have up to 900 kB."""


class Oddities:
    """The files that one pattern names and that are not named as tars, by their endings."""

    def __init__(self, pattern: str, key: str) -> None:
        self._pattern, self._key = pattern, key
        self._kinds: dict[str, list[str]] = defaultdict(list)

    def add(self, url: str) -> None:
        name = location(url).rpartition("/")[2]
        self._kinds[re.sub(r"\d+", "0", name.partition(".")[2])].append(url)

    def told(self) -> str:
        """The mistake in the pattern; empty if all files that were opened are tars."""
        found, files = [], 0
        for kind, urls in list(self._kinds.items())[:KINDS]:
            step = max(1, len(urls) // LOOKED_AT)
            natures = ((url, _nature(url, self._key)) for url in urls[::step][:LOOKED_AT])
            if first := next(((url, what) for url, what in natures if what), None):
                files += len(urls)
                ending = f".{kind}" if kind else "no ending"
                found.append(f"{len(urls):,} with {ending} ({first[0]}: {first[1]})")
        if not found:
            return ""
        folder = self._pattern.rpartition("/")[0]
        better = f"{folder}/*.tar" if folder else "*.tar"
        is_parquet = any(kind.endswith("parquet") for kind in self._kinds)
        advice = "; `inputs` names parquets with images" if is_parquet else ""
        advice += f"; valid is for example {better!r}" if GLOB.search(self._pattern) else ""
        wrong = "neither tars nor parquets" if self._key == "inputs" else "no tars"
        kinds = ", ".join(found)
        return f"{self._pattern!r} names {files:,} files that are {wrong}: {kinds}{advice}"


def _nature(url: str, key: str) -> str:
    """The kind of a file; empty for a tar, compressed or not, and for a file that is unreadable."""
    # Neither module loads torch, but a login node imports modules of the worker only if needed.
    from d2m_hpc.worker.read.compressed import codec_of, start_of
    from d2m_hpc.worker.read.nature import nature

    try:
        head = _head(url, HEAD)
        if key == "inputs" and any(map(head.startswith, _magics())):
            return ""
        if codec := codec_of(head):
            plain = start_of(_head(url, COMPRESSED))
            what = nature(plain, len(plain)) if plain else ""
            return f"compressed with {codec.name}, {what}" if what else ""
        return nature(head, Path(url).stat().st_size if is_local(url) else len(head))
    except Exception:  # each store raises errors of its own, which preflight and the task report
        return ""


def _magics() -> list[bytes]:
    """The first bytes of the files that `inputs` may name besides tars."""
    from d2m_hpc.worker.read.readers import READERS

    return [*READERS]


def _head(url: str, size: int) -> bytes:
    if not is_local(url):
        return stores.peek(url, size)
    with open(url, "rb") as file:
        return file.read(size)
