"""Claim a shard, so that no other task works on it while this one is alive."""

from __future__ import annotations

import time
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from d2m_hpc.state.rundir import FILE_MODE, named

OWNERLESS_SECONDS = 2.0
"""A live holder writes its name within milliseconds of making the file."""

LEASE_SECONDS = 120.0
"""A holder that has not been heard of for so long has lost its claim."""


class Lease:
    """A claim on one shard, kept alive by a heartbeat thread while it is held.

    Keep the object while the shard is in other hands: a stale holder on another machine is
    recognised by watching its heartbeat fail to come, which takes `LEASE_SECONDS`.
    """

    def __init__(self, path: Path, seconds: float = LEASE_SECONDS) -> None:
        """
        Args:
            seconds: without a heartbeat, after which a claim is lost; the same for all of a run.
        """
        self._path = path
        self._ownerless: tuple[int, int, float] | None = None
        self._lock = SoftFileLease(
            path, lease_duration=seconds, timeout=0, thread_local=False, mode=FILE_MODE
        )

    def claim(self) -> bool:
        """Take the shard; False when a live task holds it."""
        try:
            with named(self._path):
                self._lock.acquire()
        except (Timeout, LeaseSettingsMismatch):
            self._drop_ownerless()
            return False
        return True

    def _drop_ownerless(self) -> None:
        """Remove a file that a holder made but was killed before it wrote its name into.

        filelock keeps an empty file for ever, for the sake of its versions before 3.22.
        """
        try:
            stat = self._path.stat()
        except OSError:
            return
        now = time.monotonic()
        known = self._ownerless
        if stat.st_size or known is None or known[:2] != (stat.st_ino, stat.st_mtime_ns):
            self._ownerless = (stat.st_ino, stat.st_mtime_ns, now)
        elif now - known[2] > OWNERLESS_SECONDS:
            self._path.unlink(missing_ok=True)

    @property
    def lost(self) -> bool:
        """Another task has taken the shard over; looks at the file, as a stopped process must."""
        token = self._lock.token
        try:
            return token is None or token not in self._path.read_text(encoding="utf-8")
        except OSError:
            return True

    def release(self) -> None:
        self._lock.release()
