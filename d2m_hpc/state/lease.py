"""Claim a shard, so that no other task works on it while this one is alive."""

from __future__ import annotations

from pathlib import Path

from filelock import SoftFileLease, Timeout

LEASE_SECONDS = 120.0
"""A holder that has not been heard of for so long has lost its claim."""


class Lease:
    """A claim on one shard, kept alive by a heartbeat thread while it is held.

    Keep the object while the shard is in other hands: a stale holder on another machine is
    recognised by watching its heartbeat fail to come, which takes `LEASE_SECONDS`.
    """

    def __init__(self, path: Path) -> None:
        self._lock = SoftFileLease(
            path, lease_duration=LEASE_SECONDS, timeout=0, thread_local=False, mode=0o644
        )

    def claim(self) -> bool:
        """Take the shard; False when a live task holds it."""
        try:
            self._lock.acquire()
        except Timeout:
            return False
        return True

    @property
    def lost(self) -> bool:
        """Another task has taken the shard over."""
        return self._lock.compromise is not None

    def release(self) -> None:
        self._lock.release()
