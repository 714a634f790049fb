"""Return free memory between used blocks to the system."""

from __future__ import annotations

import ctypes
import os
import time

GROWTH = 256 << 20
"""Bytes of growth before free memory is looked for."""
PAUSE = 5.0
"""Seconds between two looks."""


class Heap:
    """The C library's heap of this process.

    A batch's small results stay until the shard is written, at addresses of earlier large blocks.
    The next batch's large blocks do not fit between them, so that the heap grows and keeps the
    gaps' pages: 2 GB after 6,000 samples in batches of 16. Blocks with own mappings would leave no
    gaps, but zeroing their pages costs time for each picture.
    """

    def __init__(self, growth: int = GROWTH, pause: float = PAUSE) -> None:
        self._growth, self._pause = growth, pause
        self._least = _resident()
        self._next = time.monotonic()
        # Other C libraries than glibc have no such function.
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def tidy(self) -> None:
        """Return free pages where the process has grown by much."""
        now = time.monotonic()
        if now < self._next or self._trim is None:
            return
        self._next = now + self._pause
        if _resident() > self._least + self._growth:
            self._trim(0)
            self._least = _resident()


def _resident() -> int:
    """Bytes of memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
