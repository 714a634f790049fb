"""The attempts at shards that are under way, or that ended without finishing their shard.

Every attempt has a number, larger than those of all earlier attempts at the shard. The holder of
the shard's lease writes the number to a file before copying or reading the shard, and removes the
file once the shard is done. A file without an end, of a shard whose lease is free, belongs to an
attempt that never ended: its process was killed or crashed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from d2m_hpc.storage.files import FILE_MODE, atomic_write, make_folder, named, overwrite, sync_path


@dataclass(frozen=True)
class Attempt:
    """The newest attempt at a shard, as its file has it.

    Attributes:
        number: 1 for the first attempt.
        task: `submission-index-attempt` of the array task.
        ended: whether the attempt failed, or gave the shard back on purpose.
        died: whether a process died while it had the shard in hand.
        lost: how many attempts ended with their whole node, and do not count as failed.
    """

    number: int
    task: str = ""
    host: str = ""
    ended: bool = False
    died: bool = False
    lost: int = 0


_FIELDS = frozenset(f.name for f in fields(Attempt))


class Attempts:
    """The files of all attempts of a run; the holder of a shard's lease writes that shard's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def last(self, stem: str) -> Attempt | None:
        """Read the newest attempt at a shard; None if there is no file."""
        try:
            values = json.loads(self._path(stem).read_bytes())
            known = {k: v for k, v in values.items() if k in _FIELDS}
            return replace(Attempt(int(known.pop("number"))), **known)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, LookupError, AttributeError):
            return Attempt(0, ended=True)  # its writer was killed before it began with the shard

    def begin(self, stem: str, attempt: Attempt, anew: bool) -> None:
        """Write an attempt to disk, before its work begins.

        Args:
            anew: whether there was no file when the lease was claimed.

        Raises:
            FileExistsError: another task has begun since, so the lease is lost.
        """
        data = json.dumps(asdict(attempt)).encode()
        if not anew:
            atomic_write(self._path(stem), data)
            return
        make_folder(self._folder)
        fd = os.open(self._path(stem), os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        try:
            with named(self._path(stem)):
                os.write(fd, data)
                os.fsync(fd)
        finally:
            os.close(fd)
        sync_path(self._folder)

    def done(self, stem: str) -> None:
        """Remove the file of a finished shard, whose outputs carry the attempt's number."""
        self._path(stem).unlink(missing_ok=True)

    def end(self, stem: str, attempt: Attempt) -> None:
        """Write down that an attempt ended without finishing the shard; its number stays taken."""
        data = json.dumps(asdict(replace(attempt, ended=True))).encode()
        try:
            atomic_write(self._path(stem), data)
        except OSError:  # a full disk may still take a file in the space of the file before it
            overwrite(self._path(stem), data)

    def unended(self) -> dict[str, Attempt]:
        """Read the attempts that are under way or never ended, by stem."""
        found = ((stem, self.last(stem)) for stem in self.stems())
        return {stem: a for stem, a in found if a is not None and not a.ended}

    def drop(self, done: Collection[str]) -> None:
        """Remove the files that killed tasks left of finished shards."""
        for stem in self.stems():
            if stem in done:
                self.done(stem)

    def stems(self) -> list[str]:
        """List the shards that have a file."""
        names = os.listdir(self._folder) if self._folder.is_dir() else []
        return [name.removesuffix(".json") for name in names if name.endswith(".json")]

    def _path(self, stem: str) -> Path:
        return self._folder / f"{stem}.json"
