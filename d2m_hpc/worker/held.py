"""A task's attempt at a shard, from its claim to its end."""

from __future__ import annotations

from d2m_hpc.errors import ShardError
from d2m_hpc.state.attempts import Attempt, Attempts
from d2m_hpc.state.lease import Lease


class Held:
    """A shard's lease, and the attempt that is on disk while the shard is read and computed.

    Args:
        last: what was on disk when the lease was claimed.
    """

    def __init__(
        self, lease: Lease, attempts: Attempts, stem: str, attempt: Attempt, last: Attempt | None
    ) -> None:
        self.lease, self.attempt = lease, attempt
        self._attempts, self._stem, self._last = attempts, stem, last
        self._open = False

    def begin(self) -> None:
        """Put the attempt on disk, for whoever finds that it never ended.

        Raises:
            ShardError: another task has taken the shard over.
        """
        try:
            self._attempts.begin(self._stem, self.attempt, anew=self._last is None)
        except FileExistsError:
            raise ShardError(f"{self._stem}: another task has begun with it") from None
        self._open = True

    def settled(self, state: str) -> None:
        """The shard is on record as `done` or `failed`."""
        self._open = False
        if state == "done":
            self._attempts.done(self._stem)
        else:
            self._attempts.end(self._stem, self.attempt)

    def release(self) -> None:
        """Leave the shard to others; what is not settled is given back, which is no failure."""
        if self._open and not self.lease.lost:
            self._attempts.end(self._stem, self.attempt)
        self._open = False
        self.lease.release()

    def desert(self) -> None:
        """Leave the shard to others as one that the process cannot finish."""
        self.lease.release()
