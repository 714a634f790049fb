"""A task's attempt at a shard, from its claim to its end."""

from __future__ import annotations

import logging

from d2m_hpc.errors import DiskError, ShardError
from d2m_hpc.run.attempts import Attempt, Attempts
from d2m_hpc.storage.lease import Lease
from d2m_hpc.storage.refused import of_system
from d2m_hpc.worker.board import Board

log = logging.getLogger(__name__)


class Held:
    """A shard's lease, and the attempt that is on disk while the shard is read and computed.

    Args:
        last: what was on disk when the lease was claimed.
        board: tells the process that watches this one what is in hand.
    """

    def __init__(
        self,
        lease: Lease,
        attempts: Attempts,
        stem: str,
        attempt: Attempt,
        last: Attempt | None,
        board: Board,
    ) -> None:
        self.lease, self.attempt = lease, attempt
        self._attempts, self._stem, self._last = attempts, stem, last
        self._open = self.rests = False
        self._board, self._slot = board, board.claim(stem, attempt.number)

    def begin(self) -> None:
        """Put the attempt on disk, for whoever finds that it never ended.

        Raises:
            ShardError: another task has taken the shard over.
            DiskError: the run folder does not take it.
        """
        try:
            self._attempts.begin(self._stem, self.attempt, anew=self._last is None)
        except FileExistsError:
            raise ShardError(f"{self._stem}: another task has begun with it") from None
        except OSError as error:
            raise DiskError(of_system(error)) from error
        self._open = True
        self._board.begin(self._slot)

    def rest(self) -> None:
        """The shard is computed and waits; nothing that happens meanwhile is its doing."""
        self.rests = True
        self._board.rest(self._slot)

    def resume(self) -> None:
        """The shard is written from now on."""
        self.rests = False
        self._board.begin(self._slot)

    def settled(self, state: str) -> None:
        """The shard is on record as `done` or `failed`."""
        self._open = False
        if state == "done":
            self._attempts.done(self._stem)
            self._board.finished_one()
        else:
            self._attempts.end(self._stem, self.attempt)
        self._free()

    def release(self) -> None:
        """Leave the shard to others; what is not settled is given back, which is no failure."""
        try:
            if self._open and not self.lease.lost:
                self._attempts.end(self._stem, self.attempt)
        except OSError as error:
            log.warning("%s cannot be given back: %s", self._stem, of_system(error))
        finally:
            self._open = False
            self._free()
            self.lease.release()

    def desert(self) -> None:
        """Leave the shard to others as one that the process cannot finish."""
        self.lease.release()

    def _free(self) -> None:
        self._board.free(self._slot)
        self._slot = -1
