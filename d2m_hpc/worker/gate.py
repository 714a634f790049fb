"""Have the threads that decode wait while the one that computes has work of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

PATIENCE = 0.1
"""Seconds that threads wait at most: where the GPU's queue is full, a launch waits for the GPU."""


class Gate:
    """Shut while a batch is launched or its outputs are read: the interpreter's lock is free then.

    Each takes some tens of milliseconds with the lock. Beside 16 threads that decode, which want
    the lock as well, each took ten times as long, and the GPU had nothing to do. Decoding loses
    less by the wait, as it is batches ahead.
    """

    def __init__(self) -> None:
        self._open, self._until = Event(), 0.0
        self._open.set()

    @contextmanager
    def shut(self) -> Iterator[None]:
        self._until = time.monotonic() + PATIENCE
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def wait(self) -> None:
        """Return as soon as it is open, or has been shut for too long."""
        if not self._open.is_set():
            self._open.wait(max(0.0, self._until - time.monotonic()))
