"""Folders, one for each attempt, in which a pair is written before it is renamed into place.

The folder fences the commit. A task may be frozen (SIGSTOP, a hung file server) for longer than its
lease, and go on in the middle of a commit. Every step of a commit is a rename into or out of the
attempt's own folder, and the next task that claims the shard first renames the folders of earlier
attempts away. Whichever step the frozen task wakes at fails with ENOENT.
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
"""The names of folders that were renamed away begin so; any task may delete these."""
TRIES = 100


class Staging:
    """The attempts' folders; `root` is on the outputs' filesystem, so that a rename commits."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self, stem: str, attempt: int) -> Path:
        """Make an attempt's folder.

        A task that ends may remove the empty `root` at any moment; it is then made again, but
        never the folder that `root` lies in: a disk that is not mounted must not be written to.

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
        """Take the folders of earlier attempts at a shard away; the caller holds its lease.

        Args:
            attempt: the caller's own number; folders of later attempts stay, as the caller itself
                may have been frozen. None for all.

        Returns:
            Whether there were any.

        Raises:
            OSError: a folder is still in its place.
        """
        found = False
        for name in self._names():
            number = _attempt(name)
            is_earlier = attempt is None or number is None or number < attempt
            if name.startswith(DOOMED):
                shutil.rmtree(self.root / name, ignore_errors=True)
            elif _stem(name) == stem and is_earlier:
                found = True
                remove(self.root / name)
        return found

    def stems(self) -> set[str]:
        """Stems of the shards that have folders of attempts."""
        return {_stem(name) for name in self._names() if not name.startswith(DOOMED)}

    def _names(self) -> list[str]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return os.listdir(self.root)
        return []

    def close(self) -> None:
        """Remove `root` when no task uses it."""
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
    """The attempt's number; None where another version made the folder."""
    number = name.rpartition(".")[2].partition("-")[0]
    return int(number) if number.isdecimal() and "." in name else None
