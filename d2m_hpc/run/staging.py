"""Staging folders, one for each attempt: a pair is written there before it is renamed into place.

The folder fences the commit. A task may be frozen (SIGSTOP, a hung file server) for longer than its
lease, and go on in the middle of a commit. Every step of a commit is a rename into or out of the
attempt's own folder, and the next task that claims the shard first renames the folders of earlier
attempts away. So the next step of the frozen task fails with ENOENT.
"""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from d2m_hpc.storage.files import FOLDER_MODE

STAGING = ".d2m-tmp"
DOOMED = ".removed-"
"""The prefix of folders that were renamed away; any task may delete these."""
TRIES = 100
"""Tries to make a folder while other tasks remove its parent."""


class Staging:
    """The staging folders in `root`, on the outputs' filesystem, so that a rename commits."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self, stem: str, attempt: int) -> Path:
        """Make an attempt's folder.

        A task that ends may remove the empty `root` at any moment, so `root` is made as well; the
        folder around `root` is not, lest an unmounted disk's mount point is written to.

        Raises:
            OSError: the folder cannot be made.
        """
        folder = self.root / f"{stem}.{attempt}-{secrets.token_hex(4)}"
        for last in (*[False] * TRIES, True):
            try:
                with suppress(FileExistsError):
                    self.root.mkdir(FOLDER_MODE)
                folder.mkdir(FOLDER_MODE)
                break
            except FileNotFoundError:
                if last or not self.root.parent.is_dir():
                    raise
        return folder

    def fence(self, stem: str, attempt: int | None = None) -> bool:
        """Remove the folders of earlier attempts at a shard; the caller holds its lease.

        Args:
            attempt: the caller's own number; folders of later attempts stay, as the caller itself
                may have been frozen. None removes all.

        Returns:
            Whether there was a folder to remove.

        Raises:
            OSError: a folder could not be renamed away.
        """
        found = False
        if attempt is None or attempt > 1:
            self._ask_anew()
        for name in self._names():
            number = _attempt(name)
            is_earlier = attempt is None or number is None or number < attempt
            if name.startswith(DOOMED):
                shutil.rmtree(self.root / name, ignore_errors=True)
            elif _stem(name) == stem and is_earlier:
                found = True
                remove(self.root / name)
        return found

    def _ask_anew(self) -> None:
        """Make a client of NFS forget its listing of `root`, which may be a minute old."""
        own = self.root / f"{DOOMED}{secrets.token_hex(8)}"
        with suppress(FileNotFoundError):
            with suppress(FileExistsError):
                self.root.mkdir(FOLDER_MODE)
            own.mkdir(FOLDER_MODE)
            own.rmdir()

    def stems(self) -> set[str]:
        """The stems of all shards with staging folders."""
        return {_stem(name) for name in self._names() if not name.startswith(DOOMED)}

    def _names(self) -> list[str]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return os.listdir(self.root)
        return []

    def close(self) -> None:
        """Remove `root` if no task uses it."""
        for name in self._names():
            if name.startswith(DOOMED):
                shutil.rmtree(self.root / name, ignore_errors=True)
        with suppress(OSError):
            self.root.rmdir()


def remove(folder: Path) -> None:
    """Rename an attempt's folder away at once, then delete it.

    Raises:
        OSError: the folder cannot be renamed.
    """
    doomed = folder.with_name(f"{DOOMED}{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _attempt(name: str) -> int | None:
    """The number of a folder's attempt; None if another version made the folder."""
    number = name.rpartition(".")[2].partition("-")[0]
    return int(number) if number.isdecimal() and "." in name else None
