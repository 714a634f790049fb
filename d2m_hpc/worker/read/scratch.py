"""A task's folder on its node's own disk: bounded, and removed by others after a kill."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2m_hpc.errors import NodeError, ShardError
from d2m_hpc.storage.refused import of_system

log = logging.getLogger(__name__)


class Scratch:
    """A folder for copies of tars, of `limit` bytes together; `change` is the lock of `used`."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.used = 0
        self.change = threading.Condition()

    @contextmanager
    def copy(self, name: str) -> Iterator[Copy]:
        """A file of this name, which is gone when the block ends."""
        copy = Copy(self, self.folder / name)
        try:
            yield copy
        finally:
            copy.path.unlink(missing_ok=True)
            with self.change:
                self.used -= copy.granted
                self.change.notify_all()


class Copy:
    """A tar that is being copied; `granted` is its share of bytes."""

    def __init__(self, scratch: Scratch, path: Path) -> None:
        self.path, self.granted = path, 0
        self._scratch = scratch

    def reserve(self, size: int) -> None:
        """Wait until other copies leave so many bytes; raise `ShardError` for more than the whole
        limit."""
        if size <= self.granted:
            return
        place = self._scratch
        if size > place.limit:
            raise ShardError(
                f"{self.path.name} has {size} bytes or more, and copies may take {place.limit} of "
                f"{place.folder}; raise scratch_bytes, or set TMPDIR to a larger disk"
            )
        with place.change:
            place.change.wait_for(lambda: place.used - self.granted + size <= place.limit)
            place.used += size - self.granted
            self.granted = size


@contextmanager
def scratch(limit: int | None = None, sharers: int = 1) -> Iterator[Scratch]:
    """Make a folder on the node's own disk, for as long as the block lasts.

    A lock, which the kernel drops with the process, distinguishes folders in use from killed tasks'
    folders, which are removed.

    Args:
        limit: bytes of tars at once; by default half of the free space.
        sharers: tasks that share the default.

    Raises:
        NodeError: the folder cannot be made.
    """
    try:
        disk = _disk()
        _sweep(disk)
        folder, lock = _locked_folder(disk)
    except OSError as error:
        why = f"there is no room for copies of tars on {socket.gethostname()}: {of_system(error)}"
        raise NodeError(f"{why}; TMPDIR names another place") from error
    try:
        half = shutil.disk_usage(folder).free // 2 // sharers
        yield Scratch(folder, half if limit is None else limit)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _disk() -> Path:
    """The disk for scratch: SLURM_TMPDIR, which some sites make for each job, or TMPDIR, or /tmp.

    A login node's variable may name a folder that this node does not have.
    """
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        given = os.environ.get(name, "")
        if os.path.isdir(given):
            return Path(given)
        if given:
            log.warning("%s is %s, which is no folder here; copies go elsewhere", name, given)
    return Path(tempfile.gettempdir())


def _prefix() -> str:
    """The start of folders' names, own to a host, as locks may not hold between hosts."""
    return f"d2m-{socket.gethostname()}-"


def _locked_folder(disk: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(), dir=disk))
        # Until the folder is locked, another task may take it for a leftover and remove it.
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            if _lock(lock) and folder.is_dir():
                return folder, lock
            os.close(lock)


def _lock(folder: int) -> bool:
    """Lock a folder; False if another process has. On a disk without locks no folder is removed."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def _sweep(disk: Path) -> None:
    """Remove killed tasks' folders; other users' folders, and those in use, cannot be locked."""
    for folder in disk.glob(f"{_prefix()}*"):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
