"""How files are written: whole or not at all, by the umask, privately where they hold secrets."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FILE_MODE, FOLDER_MODE = 0o664, 0o775
"""Before the umask: groups share runs by umask 002 and the setgid bit; nobody shares with all."""
PRIVATE_MODE = 0o600
"""Of files that hold secrets, as the URLs of a plan may."""


def fsync_dir(folder: Path) -> None:
    """Make the renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents by the umask; none is world-writable, whatever it is.

    `Path.mkdir(mode, parents=True)` gives the mode to the last one only.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(FOLDER_MODE, exist_ok=True)


def owned(path: str, flags: int) -> int:
    """An opener for `open`, of files that are not world-writable, whatever the umask."""
    return os.open(path, flags, FILE_MODE)


def regular(path: str, flags: int) -> int:
    """An opener for `open`, of files to read; it never waits, as for somebody to write into a pipe.

    Raises:
        OSError: the path is a device's, a pipe's or a socket's.
    """
    fd = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # `open` has words for a folder
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file, but a device or a pipe", path)
    return fd


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name the file in errors of the system that name none, as those of full disks."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def atomic_write(
    path: Path, data: bytes | Iterable[bytes], durable: bool = True, private: bool = False
) -> None:
    """Replace a file so that readers see the old content or the new, never a part.

    Args:
        path: the file; its folder is made if it is missing.
        data: the whole content, or its parts where it is large.
        durable: fsync before the rename; False for files that are rewritten every few seconds.
        private: nobody but the owner may read it, as it holds a secret.
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
        fsync_dir(path.parent)


def overwrite(path: Path, data: bytes) -> None:
    """Replace a short file in place, by one write, for a file that changes every few seconds.

    Unlike `atomic_write` it leaves nothing behind when it is killed; readers may see a part.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, FILE_MODE)
    try:
        with named(path):
            os.ftruncate(fd, os.pwrite(fd, data, 0))
    finally:
        os.close(fd)


def own_only(path: str, flags: int) -> int:
    """An opener for `open`."""
    return os.open(path, flags, PRIVATE_MODE)


def is_private(path: Path) -> bool:
    """Whether a file is there that nobody but its owner may read."""
    with suppress(FileNotFoundError):
        return not path.stat().st_mode & 0o077
    return False
