"""Files that hold secrets, as the URLs of a plan may: nobody but their owner may read them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MODE = 0o600


def own_only(path: str, flags: int) -> int:
    """An opener for `open`."""
    return os.open(path, flags, MODE)


def is_private(path: Path) -> bool:
    """Whether a file is there that nobody but its owner may read."""
    with suppress(FileNotFoundError):
        return not path.stat().st_mode & 0o077
    return False


@contextmanager
def own_files(private: bool) -> Iterator[None]:
    """Let all files that are made in the block, by libraries too, be private if one says so."""
    before = os.umask(0o077) if private else None
    try:
        yield
    finally:
        if before is not None:
            os.umask(before)
