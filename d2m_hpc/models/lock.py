"""`weights.lock.json`: what was fetched into a weights folder, so that all later fetches and tasks
have the same."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.published import Checkpoint, HubRepo, endpoint
from d2m_hpc.storage.files import atomic_write, make_folder
from d2m_hpc.storage.lease import Lease
from d2m_hpc.storage.texts import BRIEF, safe

NAME = "weights.lock.json"
LONGEST_NAME = 255
"""Characters of a file's name."""
UNLOCKED = f"not known: {NAME} beside it does not name it"
"""In place of the published hash of a repository's file that nobody fetched."""


@dataclass(frozen=True)
class LockedFile:
    """A file as it was fetched, or as the hub lists it.

    Attributes:
        sha256: in hex; empty until the file is fetched where the hub does not tell it.
        git: the hash by which git knows a small file.
        modified_ns: when the file was last written; 0 before it is fetched.
    """

    size: int
    sha256: str = ""
    git: str = ""
    modified_ns: int = 0

    def is_same(self, other: LockedFile | None) -> bool:
        """Whether two commits have the same file, by the hash that the hub tells."""
        known = (self.git, self.git or self.sha256)
        return other is not None and known == (other.git, other.git or other.sha256)


@dataclass(frozen=True)
class LockedRepo:
    """A repository as it was fetched: which commit its revision was, and every file of that."""

    repo_id: str
    revision: str
    commit: str
    files: Mapping[str, LockedFile]

    @property
    def folder(self) -> str:
        """Its folder's name; empty where no repository has such a name."""
        try:
            return HubRepo(self.repo_id, self.revision).name
        except ValueError:
            return ""

    def unsafe(self) -> Iterator[str]:
        """Names of files that would lead out of the repository's folder."""
        return filter(_leads_out, [*self.files, self.commit])

    def checkpoints(self, repo: HubRepo) -> list[Checkpoint]:
        """Those of the commit's files that are needed, as files to fetch and to check."""
        return [
            Checkpoint(f"{repo.name}/{name}", self.url(name), self.files[name].sha256)
            for name in repo.selected(self.files)
        ]

    def url(self, name: str) -> str:
        """Where the commit's file is published."""
        return f"{endpoint()}/{self.repo_id}/resolve/{self.commit}/{quote(name)}"


@dataclass(frozen=True)
class Lock:
    """What a weights folder's lock file says.

    Example:
        >>> Lock.read(Path("/nowhere")).repositories
        {}

    Attributes:
        files: published files by name.
        repositories: hub repositories by their folder's name.
    """

    files: dict[str, LockedFile] = field(default_factory=dict)
    repositories: dict[str, LockedRepo] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, told: str = "") -> Lock:
        """
        Args:
            told: where the file is from, for messages.

        Raises:
            WeightsError: there is a lock file, and it cannot be read.
        """
        path = folder / NAME
        try:
            lock = _json().validate_json(path.read_bytes())
            wrong = [n for repo in lock.repositories.values() for n in repo.unsafe()]
            wrong += filter(_leads_out, [*lock.files, *lock.repositories])
            if wrong:
                raise ValueError(f"{safe(repr(wrong[0]), BRIEF)} in it is no name of a file")
            for name, repo in lock.repositories.items():
                other = f"{repo.repo_id} at {repo.revision}" if name != repo.folder else "no files"
                if name != repo.folder or not repo.files:
                    raise ValueError(safe(f"its entry {name!r} is of {other}", 3 * BRIEF))
            if bare := next((n for n, file in lock.files.items() if not file.sha256), ""):
                raise ValueError(safe(f"its entry {bare!r} has no sha256", 3 * BRIEF))
        except (FileNotFoundError, NotADirectoryError):
            return cls()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no lock file"
            if not isinstance(error, OSError | ValidationError):
                why = str(error)
            advice = "restore it, or remove it and run `d2m weights fetch` again"
            raise WeightsError(f"{told or path} cannot be read: {why}; {advice}") from None
        return lock

    def expected(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint with the hash that was fetched, where none was published."""
        locked = self.files.get(checkpoint.name)
        if checkpoint.sha256 or locked is None:
            return checkpoint
        return Checkpoint(checkpoint.name, checkpoint.url, locked.sha256)

    def of(self, repo: HubRepo, folder: Path) -> list[Checkpoint]:
        """The files that are needed of a repository; its folder where none is known.

        What lies in the folder without an entry in the lock file is no published file.
        """
        if locked := self.repositories.get(repo.name):
            known = locked.checkpoints(repo)
            return [c if c.sha256 else replace(c, sha256=UNLOCKED) for c in known] or [
                Checkpoint(repo.name, repo.url)
            ]
        place = folder / repo.name
        inside = [p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()]
        names = repo.selected(n for n in inside if not n.startswith(".cache/"))
        found = [Checkpoint(f"{repo.name}/{n}", repo.url, UNLOCKED) for n in names]
        return found or [Checkpoint(repo.name, repo.url)]

    def digest(
        self, folder: Path, other: Callable[[Path], str], timed: bool = True
    ) -> Callable[[Path], str]:
        """sha256 of files in the folder: from the lock while size and time are those fetched.

        Args:
            other: computes it for all other files.
            timed: False to look at sizes alone.
        """
        known = {str(folder / name): file for name, file in self.files.items()}
        for place, repo in self.repositories.items():
            known |= {str(folder / place / name): file for name, file in repo.files.items()}

        def of(path: Path) -> str:
            size, modified_ns = _seen(path.stat())
            file = known.get(str(path))
            if file is None or not file.sha256 or file.size != size:
                return other(path)
            return other(path) if timed and file.modified_ns != modified_ns else file.sha256

        return of

    def note(self, name: str, path: Path, sha256: str) -> None:
        """Keep what a fetched file is."""
        size, modified_ns = _seen(path.stat())
        for place, repo in self.repositories.items():
            if known := repo.files.get(inside := name.removeprefix(f"{place}/")):
                found = replace(known, size=size, sha256=sha256, modified_ns=modified_ns)
                self.repositories[place] = replace(repo, files={**repo.files, inside: found})
                return
        self.files[name] = LockedFile(size, sha256, modified_ns=modified_ns)


@cache
def _json() -> TypeAdapter[Lock]:
    """The lock's form in JSON; pydantic makes it in 25 ms, which most commands do without."""
    return TypeAdapter(Lock)


def _leads_out(name: str) -> bool:
    """Whether a name is none of a file below a folder."""
    parts = name.split("/")
    odd = not name.isprintable() or "\\" in name or max(map(len, parts)) > LONGEST_NAME
    return odd or bool({"", ".", ".."} & {*parts})


def _seen(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def changing(folder: Path) -> Iterator[Lock]:
    """Change a folder's lock file, one process at a time.

    Raises:
        WeightsError: the lock file that is there cannot be read.
        OSError: none can be written.
    """
    make_folder(folder)
    with alone(folder / NAME):
        lock = Lock.read(folder)
        before = _json().dump_json(lock)
        yield lock
        if _json().dump_json(lock) != before:
            atomic_write(folder / NAME, _json().dump_json(lock, indent=1))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Change a file while no other process does, of all machines that share its folder."""
    lease = Lease(path.with_name(f"{path.name}.lock"))
    while not lease.claim():
        time.sleep(0.2)
    try:
        yield
    finally:
        lease.release()
