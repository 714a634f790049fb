"""Time the stages of a shard."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up seconds by stage, also of several threads: `with clock("decode"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, stage: str, besides: str = "") -> Iterator[None]:
        """Time a block, without its time in the stage `besides`."""
        began, before = time.perf_counter(), self.seconds.get(besides, 0.0)
        try:
            yield
        finally:
            other = self.seconds.get(besides, 0.0) - before
            self.add(stage, time.perf_counter() - began - other)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def rounded(self) -> dict[str, float]:
        """Seconds by stage to the millisecond, as there are millions of records."""
        with self._lock:
            return {stage: round(seconds, 3) for stage, seconds in self.seconds.items()}
