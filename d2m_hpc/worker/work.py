"""The shard that this task works on, from its claim to its end, and the times of its steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, local

from d2m_hpc.errors import DiskError, ShardError
from d2m_hpc.run.attempts import Attempt, Attempts
from d2m_hpc.run.records import Job, Shard
from d2m_hpc.storage.lease import Lease
from d2m_hpc.storage.refused import of_system
from d2m_hpc.worker.board import Board

log = logging.getLogger(__name__)

UNCOUNTED = Attempt(0)

_within = local()
"""The seconds of timed blocks within the one that a thread is in."""


class Clock:
    """Adds up seconds by stage, also of several threads: `with clock("decode"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock, self._lap = Lock(), (0.0, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block, without the blocks within it that this clock or another one times."""
        began, before = time.perf_counter(), getattr(_within, "seconds", 0.0)
        _within.seconds = 0.0
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self.add(stage, seconds - _within.seconds)
            _within.seconds = before + seconds

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def lap(self) -> tuple[float, float]:
        """The seconds since the last lap, and those of them that were waited."""
        began, waited = self._lap
        self._lap = time.perf_counter(), self.seconds.get("wait", 0.0)
        return self._lap[0] - began, self._lap[1] - waited

    def rounded(self) -> dict[str, float]:
        """Seconds by stage to the millisecond, as there are millions of records."""
        with self._lock:
            return {stage: round(seconds, 3) for stage, seconds in self.seconds.items()}


class Work:
    """A job, its lease, and the attempt that is on disk while the shard is copied and computed.

    Threads of a task share a work: the stager claims, the reader begins, the writer settles, and
    each may have to give it back. Its methods change its state under a lock; only `desert` takes no
    lock, as the lock's holder may hang.

    Attributes:
        clock: seconds by stage.

    Args:
        attempts: keeps the attempt on disk; None where no other task looks at the shard.
        is_first: no attempt was on disk when the lease was claimed.
        board: shared with the process that watches this one.
    """

    def __init__(
        self,
        job: Job,
        lease: Lease | None = None,
        attempts: Attempts | None = None,
        attempt: Attempt = UNCOUNTED,
        is_first: bool = True,
        board: Board | None = None,
    ) -> None:
        self.job, self.attempt, self.clock = job, attempt, Clock()
        self._lease, self._attempts, self._is_first = lease, attempts, is_first
        self._lock = Lock()
        self._is_open = self._rests = self._is_over = False
        self._board, self._slot = board or Board(), -1
        if board is not None:
            self._slot = board.claim(job.stem, attempt.number)

    @property
    def shard(self) -> Shard:
        return self.job.shard

    @property
    def is_lost(self) -> bool:
        """Whether another task has taken the shard over."""
        return self._lease is not None and self._lease.lost

    @property
    def rests(self) -> bool:
        """Whether the shard is computed and waits until all others are."""
        with self._lock:
            return self._rests

    def begin(self) -> None:
        """Put the attempt on disk before the shard's first byte is asked for.

        Copying and decompressing may kill the process too; other tasks then see the attempt.

        Raises:
            ShardError: the shard was given back meanwhile, or another task has taken it over.
            DiskError: the run folder does not take the file.
        """
        with self._lock:
            self._require_held()
            try:
                if self._attempts is not None:
                    self._attempts.begin(self.job.stem, self.attempt, anew=self._is_first)
            except FileExistsError:
                raise ShardError(f"{self.job.stem}: another task has begun with it") from None
            except OSError as error:
                raise DiskError(of_system(error)) from error
            self._is_open = True
            self._board.begin(self._slot)

    def wait(self) -> None:
        """Note that the shard waits to be read; if the process dies meanwhile, it is not blamed."""
        with self._lock:
            self._board.rest(self._slot)

    def read(self) -> None:
        """Note that the shard is read from now on.

        Raises:
            ShardError: the shard was given back meanwhile.
        """
        with self._lock:
            self._require_held()
            self._board.begin(self._slot)

    def rest(self) -> None:
        """Wait for other shards; a death of the process meanwhile does not blame this shard."""
        with self._lock:
            self._rests = True
            self._board.rest(self._slot)

    def resume(self) -> None:
        """Stop waiting: the shard is written next."""
        with self._lock:
            self._rests = False
            self._board.begin(self._slot)

    def settle(self, state: str) -> None:
        """End the attempt; the shard is on record as `done` or `failed`."""
        with self._lock:
            self._is_open = False
            if state == "done":
                self._board.finished_one()
            if self._attempts is not None and state == "done":
                self._attempts.done(self.job.stem)
            elif self._attempts is not None:
                self._attempts.end(self.job.stem, self.attempt)
            self._free()

    def release(self) -> None:
        """Leave the shard to other tasks; an unsettled attempt does not count as failed."""
        with self._lock:
            self._is_over = True
            try:
                if self._is_open and self._attempts is not None and not self.is_lost:
                    self._attempts.end(self.job.stem, self.attempt)
            except OSError as error:
                log.warning("%s cannot be given back: %s", self.job.stem, of_system(error))
            finally:
                self._is_open = False
                self._free()
                self.desert()

    def desert(self) -> None:
        """Release the lease alone: other tasks find an attempt that never ended."""
        if self._lease is not None:
            self._lease.release()

    def _require_held(self) -> None:
        if self._is_over:
            raise ShardError(f"{self.job.stem}: given back before it was read")

    def _free(self) -> None:
        self._board.free(self._slot)
        self._slot = -1
