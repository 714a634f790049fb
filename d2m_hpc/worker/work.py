"""One shard on its way through a task."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from threading import Semaphore
from typing import Any

from d2m_hpc.run.manifest import Job, Rejection, Shard
from d2m_hpc.storage.lease import Lease
from d2m_hpc.storage.urls import is_local
from d2m_hpc.worker.batch import Batch
from d2m_hpc.worker.clock import Clock
from d2m_hpc.worker.held import Held
from d2m_hpc.worker.read.members import Notes
from d2m_hpc.worker.read.seen import Seen

AHEAD = 4
"""Batches that may wait for the device."""


@dataclass
class Work:
    """One shard on its way through the task; iterate over its batches.

    Attributes:
        lease: released when the shard is done with.
        held: the attempt, which is on disk from before the shard is read.
        rejections: complete once the iteration has ended.
        total: samples in the tar, known once the iteration has ended, as are the next three.
        notices: what is to be said of members that are no samples.
        causes: why samples of the tar lack something, as far as it tells, and what to do.
        seen: which fields the samples have.
        clock: how long the stages took.
        began: when, by `time.monotonic`, its computation did; till then, when it was claimed.
        room: for batches that wait for the device; one for all works of a loader.
    """

    job: Job
    lease: Lease | None = None
    held: Held | None = None
    rejections: list[Rejection] = field(default_factory=list)
    total: int = 0
    notices: list[str] = field(default_factory=list)
    causes: Notes = field(default_factory=Notes)
    cancelled: bool = False
    seen: Seen = field(default_factory=Seen)
    clock: Clock = field(default_factory=Clock)
    began: float = field(default_factory=time.monotonic)
    room: Semaphore = field(default_factory=lambda: Semaphore(AHEAD))
    _queue: Queue[Any] = field(default_factory=Queue)

    def __iter__(self) -> Iterator[Batch]:
        """
        Raises:
            ShardError, or whatever stopped the reader.
        """
        while (batch := self._next()) is not None:
            yield batch

    def _next(self) -> Batch | None:
        with self.clock("wait"):
            item = self._queue.get()
            self.room.release()
            if isinstance(item, BaseException):
                raise item
            return None if item is None else item.result()

    @property
    def shard(self) -> Shard:
        return self.job.shard

    @property
    def attempt(self) -> int:
        """The shard's own count of attempts, this one included."""
        return self.held.attempt.number if self.held is not None else 0

    def begin(self) -> None:
        """The shard is read from now on."""
        if self.held is not None:
            self.held.begin()

    def release(self) -> None:
        """Leave the shard to others."""
        if self.held is not None:
            self.held.release()
        elif self.lease is not None:
            self.lease.release()

    def put(self, item: Future[Batch] | BaseException | None) -> None:
        """Hand over a batch, an error or the end (None); gives up once nobody listens."""
        while not self.room.acquire(timeout=0.2):
            if self.cancelled:
                return
        self._queue.put(item)
        if self.cancelled:
            self.cancel()

    def cancel(self) -> None:
        """No more batches are wanted."""
        self.cancelled = True
        while True:
            try:
                self._queue.get_nowait()
            except Empty:
                return
            self.room.release()


def size_and_time(shard: Shard) -> tuple[int, int]:
    """The tar's size and time, which tell later whether it is still the one that was read."""
    if is_local(shard.url):
        with suppress(OSError):
            there = os.stat(shard.url)
            return there.st_size, there.st_mtime_ns
    return shard.size or 0, 0
