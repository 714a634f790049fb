"""Claim a shard, so that no other task works on it while this one is alive."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from d2m_hpc.storage.files import FILE_MODE, named
from d2m_hpc.storage.suspension import frozen_seconds

OWNERLESS_SECONDS = 2.0
"""A live holder writes its name within milliseconds of making the file."""

_DURATION = re.compile(r"^duration=(\d+(?:\.\d+)?(?:e[+-]\d+)?)$", re.M)
"""As filelock writes it."""

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
            seconds: without a heartbeat, after which a claim is lost.
        """
        self._path, self._seconds = path, seconds
        self._ownerless: tuple[int, int, float] | None = None
        self._frozen = frozen_seconds()
        self._lock = self._of(seconds)

    def _of(self, seconds: float) -> SoftFileLease:
        self._seconds = seconds
        return SoftFileLease(
            self._path, lease_duration=seconds, timeout=0, thread_local=False, mode=FILE_MODE
        )

    def claim(self) -> bool:
        """Take the shard; False when a live task holds it."""
        self._forget_what_was_not_watched()
        try:
            with named(self._path):
                self._lock.acquire()
        except LeaseSettingsMismatch:
            self._watch_as_its_holder_says()
            return False
        except Timeout:
            self._drop_ownerless()
            return False
        return True

    def _watch_as_its_holder_says(self) -> None:
        """The holder was started with another `lease_seconds`, and touches the file that often."""
        with suppress(OSError):
            if found := _DURATION.search(self._path.read_text("utf-8", "replace")):
                self._lock = self._of(float(found[1]))

    def _forget_what_was_not_watched(self) -> None:
        """Watch anew after this process stood still, as all tasks of a suspended job do: it has not
        seen that a heartbeat failed to come."""
        frozen = frozen_seconds()
        if frozen - self._frozen > self._seconds / 3:
            self._frozen = frozen
            if self._lock.token is None:
                self._lock = self._of(self._seconds)

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
        """Give the claim back; where the disk does not take that, it is lost by its silence."""
        with suppress(OSError):
            self._lock.release()


def is_held(path: Path) -> bool:
    """Whether another task holds the lease at a path, seen by claiming the lease for a moment."""
    if not path.exists():
        return False
    lease = Lease(path)
    if lease.claim():
        lease.release()
        return False
    return True
