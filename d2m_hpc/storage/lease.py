"""Claim a shard, so that no other task works on it while this task is alive."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from d2m_hpc.storage.files import FILE_MODE, named
from d2m_hpc.storage.suspension import frozen_seconds

OWNERLESS_SECONDS = 2.0
"""Age at which a lease file without a holder's name is removed: live holders write within
milliseconds."""

_DURATION = re.compile(r"^duration=(\d+(?:\.\d+)?(?:e[+-]\d+)?)$", re.M)
"""The lease's length, as filelock writes it."""

LEASE_SECONDS = 120.0
"""Seconds without a heartbeat after which a claim is lost."""


class Lease:
    """A claim on one shard, kept alive by a heartbeat thread while it is held.

    Keep the object while another task holds the shard: a dead holder on another machine is
    recognised by watching the file for `LEASE_SECONDS` without a heartbeat.
    """

    def __init__(self, path: Path, seconds: float = LEASE_SECONDS) -> None:
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
        """Watch by the length in the file: the holder was started with another `lease_seconds`."""
        with suppress(OSError):
            if found := _DURATION.search(self._path.read_text("utf-8", "replace")):
                self._lock = self._of(float(found[1]))

    def _forget_what_was_not_watched(self) -> None:
        """Watch anew after this process was suspended, as it may have missed heartbeats
        meanwhile."""
        frozen = frozen_seconds()
        if frozen - self._frozen > self._seconds / 3:
            self._frozen = frozen
            if self._lock.token is None:
                self._lock = self._of(self._seconds)

    def _drop_ownerless(self) -> None:
        """Remove the file of a holder that was killed before writing its name.

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
        """Whether another task has taken the shard over, by the file: a suspended process knows no
        better."""
        token = self._lock.token
        try:
            return token is None or token not in self._path.read_text(encoding="utf-8")
        except OSError:
            return True

    def release(self) -> None:
        """Give the claim back; where the disk refuses, the claim ends by its silence."""
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
