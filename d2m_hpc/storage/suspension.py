"""How long this process was suspended: by a signal, by Slurm, or with its whole machine."""

from __future__ import annotations

import threading
import time

TICK = 1.0
SLACK = 4.0
"""Seconds that a tick may be late on a busy machine."""


class Awake:
    """A thread that ticks; a late tick shows a time in which nothing ran."""

    def __init__(self) -> None:
        self.frozen = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="awake", daemon=True)

    def __enter__(self) -> Awake:
        global _current
        _current = self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _tick(self) -> None:
        before = time.monotonic()
        while not self._over.wait(TICK):
            now = time.monotonic()
            if now - before > TICK + SLACK:
                self.frozen += now - before - TICK
            before = now


_current: Awake | None = None


def frozen_seconds() -> float:
    """Seconds that this process was suspended while an `Awake` was entered."""
    return _current.frozen if _current else 0.0
