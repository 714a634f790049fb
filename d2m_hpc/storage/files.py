"""Write files: whole or not at all, by the umask, private where they hold secrets."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import IO, Any

FILE_MODE, FOLDER_MODE = 0o664, 0o775
"""Modes before the umask: groups share runs by umask 002 and the setgid bit; nothing is shared with
all."""
SYNC_SECONDS = 0.1
"""After which files that grow are brought to the disk once more."""
PRIVATE_MODE = 0o600
"""The mode of files that hold secrets, such as the URLs of a plan."""


def sync_path(path: Path) -> None:
    """Make a file's content durable, or the names in a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents by the umask; none becomes world-writable.

    `Path.mkdir(mode, parents=True)` gives the mode to the last folder only.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(FOLDER_MODE, exist_ok=True)


def owned(path: str, flags: int) -> int:
    """Open a file that is never world-writable, whatever the umask; an opener for `open`."""
    return os.open(path, flags, FILE_MODE)


def regular(path: str, flags: int) -> int:
    """Open a regular file for reading, without waiting for the writer of a pipe; an opener for
    `open`.

    Raises:
        OSError: the path names a device, a pipe or a socket.
    """
    fd = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # `open` has words for a folder
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file, but a device or a pipe", path)
    return fd


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add the file's name to system errors without one, such as those of full disks."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def durable(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a new file that is on disk when the block ends; mode `xb` replaces none."""
    with named(path), open(path, mode, opener=owned) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def synced_along(growing: Callable[[], Iterable[Path]]) -> Iterator[None]:
    """Bring files to the disk while they are written, so that their end has little to wait for.

    Args:
        growing: tells the files; those that are not there, or no longer, are left out.

    Raises:
        OSError: the disk is full or fails.
    """
    ended = Event()

    def sync() -> None:
        while not ended.wait(SYNC_SECONDS):
            with suppress(FileNotFoundError):
                for path in growing():
                    sync_path(path)

    with ThreadPoolExecutor(1) as pool:
        synced = pool.submit(sync)
        try:
            yield
        finally:
            ended.set()
    synced.result()


def atomic_write(
    path: Path, data: bytes | Iterable[bytes], durable: bool = True, private: bool = False
) -> None:
    """Replace a file so that readers see the old content or the new, never a part.

    Args:
        path: the file; a missing folder is made.
        data: the whole content, or its parts.
        durable: sync to disk before the rename; False for files that change every few seconds.
        private: only the owner may read the file, as it holds a secret.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        opener = own_only if private else owned
        with named(path), open(temporary, "wb", opener=opener) as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_path(path.parent)


def overwrite(path: Path, data: bytes) -> None:
    """Replace a short file in place by one write, for a file that changes every few seconds.

    A kill leaves no temporary file, unlike with `atomic_write`; readers may see a part.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, FILE_MODE)
    try:
        with named(path):
            os.ftruncate(fd, os.pwrite(fd, data, 0))
    finally:
        os.close(fd)


def own_only(path: str, flags: int) -> int:
    """Open a file that only its owner may read; an opener for `open`."""
    return os.open(path, flags, PRIVATE_MODE)


def is_private(path: Path) -> bool:
    """Whether a file exists and only its owner may read it."""
    with suppress(FileNotFoundError):
        return not path.stat().st_mode & 0o077
    return False
