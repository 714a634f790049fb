"""Keep freed memory for the next batch, and return what is too much of it to the system."""

from __future__ import annotations

import ctypes
import os
import time

GROWTH = 256 << 20
"""Bytes of growth before free memory is looked for."""
PAUSE = 5.0
"""Seconds between two looks."""


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT = 128 << 20, 32 << 20
"""Bytes from which a block has its own mapping; older C libraries take no more than the second."""


def keep_freed() -> None:
    """Have the C library keep freed memory for the next block: for the whole process, for good.

    By default large blocks are new mappings, whose pages the kernel zeroes: 0.57 of the CPU time of
    the six models' small nets is left without that, at the same peak of memory. Without any bound
    0.51 would be left, and the peak be a tenth higher.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # as glibc has it
        any(mallopt(_M_MMAP_THRESHOLD, size) for size in KEPT)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


class Heap:
    """The C library's heap of this process.

    A batch's small results stay until the shard is written, at addresses of earlier large blocks.
    The next batch's large blocks do not fit between them, so that the heap grows and keeps the
    gaps' pages: 2 GB after 6,000 samples in batches of 16. Blocks with own mappings would leave no
    gaps, but zeroing their pages costs time for each picture (`keep_freed`).
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
