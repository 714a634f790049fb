"""Lease a shard while this task is alive; take over the leases of dead tasks."""

from __future__ import annotations

import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from d2m_hpc.storage.files import FILE_MODE, named
from d2m_hpc.storage.suspension import frozen_seconds
from d2m_hpc.storage.texts import BRIEF, counted, safe

OWNERLESS_SECONDS = 2.0
"""Age at which a lease file without a holder's name is removed: live holders write within
milliseconds."""
DEAD = ".dead-"
"""Part of the names of dead holders' files that were renamed away."""

_DURATION = re.compile(r"^duration=(\d+(?:\.\d+)?(?:e[+-]\d+)?)$", re.M)
"""The lease's length, as filelock writes it."""

LONGEST = 4096
"""Bytes that are read of a lease file; a lease has some hundred."""
LEASE_SECONDS = 120.0
"""Seconds without a heartbeat after which a claim is lost."""


class _Lock(SoftFileLease):
    """filelock's lease, which tells the file whose holder it finds dead."""

    dead: os.stat_result | None = None

    def _take_over(self, marker: os.stat_result, breaker_pid: int | None) -> None:
        self.dead = marker
        super()._take_over(marker, breaker_pid)


class Lease:
    """A claim on one shard, kept alive by a heartbeat thread while it is held.

    Keep the object while another task holds the shard: a dead holder on another machine is
    recognised by watching the file for `LEASE_SECONDS` without a heartbeat.
    """

    def __init__(self, path: Path, seconds: float = LEASE_SECONDS) -> None:
        self._path, self._seconds = path, seconds
        self._frozen = frozen_seconds()
        self._lock = self._of(seconds)

    def _of(self, seconds: float) -> _Lock:
        self._seconds = seconds
        self._seen: tuple[bytes, int, float] = b"", 0, 0.0
        return _Lock(
            self._path, lease_duration=seconds, timeout=0, thread_local=False, mode=FILE_MODE
        )

    def claim(self) -> bool:
        """Take the shard; False when a live task holds it.

        Raises:
            OSError: the folder is gone, or the disk refuses.
        """
        self._forget_what_was_not_watched()
        while True:
            try:
                with named(self._path):
                    self._path.parent.stat()  # filelock would make the folder of a removed run anew
                    self._lock.acquire()
                return self._is_confirmed()
            except LeaseSettingsMismatch:
                self._watch_as_its_holder_says()
                return False
            except Timeout:
                if not self._removes_dead():
                    return False

    def _is_confirmed(self) -> bool:
        """Whether the file is still this claim's: if this process stood still between the file's
        making and its first byte, another one has removed it as nobody's."""
        if lost := self.lost:
            self.release()
        return not lost

    def _watch_as_its_holder_says(self) -> None:
        """Watch by the length in the file: the holder was started with another `lease_seconds`."""
        with suppress(OSError):
            self._lock = self._of(_duration(self._path))

    def _forget_what_was_not_watched(self) -> None:
        """Watch anew after this process was suspended, as it may have missed heartbeats
        meanwhile."""
        frozen = frozen_seconds()
        if frozen - self._frozen > self._seconds / 3:
            self._frozen = frozen
            if self._lock.token is None:
                self._lock = self._of(self._seconds)

    def _removes_dead(self) -> bool:
        """Remove the file of a dead holder that filelock leaves; returns whether one is gone.

        filelock takes over by an exchange of two names, which NFS, Lustre and others do not know.
        And an empty file, of a holder that was killed before it wrote its name, stays for ever, for
        the sake of filelock's versions before 3.22.
        """
        dead, self._lock.dead = self._lock.dead, None
        try:
            # Opening a file makes a client of NFS forget the size and time that it has cached.
            with open(self._path, "rb") as file:
                content, stat = file.read(LONGEST), os.fstat(file.fileno())
        except OSError:
            return False
        now, beat = time.monotonic(), stat.st_mtime_ns
        if self._seen[:2] != (content, beat):
            self._seen = content, beat, now
        silent = now - self._seen[2] > (self._seconds if content else OWNERLESS_SECONDS)
        is_found = dead is not None and (dead.st_ino, dead.st_mtime_ns) == (stat.st_ino, beat)
        return (silent or is_found) and self._set_aside(content)

    def _set_aside(self, content: bytes) -> bool:
        """Remove a dead holder's file; put back the file of a holder that has taken it over since.

        A rename succeeds for one of many that try it.
        """
        aside = self._path.with_name(f"{self._path.name}{DEAD}{secrets.token_hex(8)}")
        with suppress(OSError):
            self._path.rename(aside)
            try:
                is_dead = _head(aside) == content
                if not is_dead:
                    os.link(aside, self._path)
                return is_dead
            finally:
                aside.unlink()
        return False

    @property
    def lost(self) -> bool:
        """Whether another task has taken the shard over, by the file: a suspended process knows no
        better."""
        token = self._lock.token
        try:
            return token is None or token.encode() not in _head(self._path)
        except OSError:
            return True

    def release(self) -> None:
        """Give the claim back; where the disk refuses, the claim ends by its silence."""
        with suppress(OSError):
            self._lock.release()


def held(paths: Iterable[Path]) -> set[Path]:
    """Tell which of some claims a live process holds, and drop what dead ones left.

    A file younger than its holder's time limit, by the clock of the disk, is a live one's. An older
    one is watched for that limit, which is said: on some filesystems the clock is the holder's own.
    One without a holder's name is watched for `OWNERLESS_SECONDS`, whatever its age.
    """
    waiting = {path: Lease(path) for path in paths if path.exists()}
    live, beats, said = set[Path](), dict[Path, int](), False
    while True:
        for path, lease in [*waiting.items()]:
            if not lease.claim():
                if not path.exists():
                    continue  # nobody's, if it stays so
                beat = _overdue(path)
                if beat is not None and beats.setdefault(path, beat) == beat:
                    continue  # a dead one's, if it stays so
                live.add(path)
            lease.release()
            del waiting[path]
        if not waiting:
            return live
        if not said:
            said = True
            _tell([path for path in waiting if not _is_ownerless(path)])
        time.sleep(0.2)


def _is_ownerless(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return not _head(path)
    return True


def _tell(paths: list[Path]) -> None:
    if not paths:
        return
    seconds = max(map(_duration, paths))
    few = ", ".join(safe(path.name, BRIEF) for path in paths[:3])
    text = counted(len(paths), "claim of another machine gives", "claims of other machines give")
    text += f" no sign of life ({few})"
    print(f"note: {text}; watching them for {seconds:.0f} s", file=sys.stderr, flush=True)


def _overdue(path: Path) -> int | None:
    """The time of a claim's last heartbeat where another one, or a name, should have come; None if
    not yet."""
    with suppress(FileNotFoundError), tempfile.NamedTemporaryFile(dir=path.parent) as now:
        beat = path.stat().st_mtime_ns
        if _is_ownerless(path) or os.fstat(now.fileno()).st_mtime_ns - beat > _duration(path) * 1e9:
            return beat
    return None


def _duration(path: Path) -> float:
    """Seconds without a heartbeat after which a claim is lost, as its holder wrote them down."""
    with suppress(FileNotFoundError):
        if found := _DURATION.search(_head(path).decode("utf-8", "replace")):
            return float(found[1])
    return LEASE_SECONDS


def _head(path: Path) -> bytes:
    """The bytes of a lease file, as far as a lease may go."""
    with open(path, "rb") as file:
        return file.read(LONGEST)
