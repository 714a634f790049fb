"""Where checkpoints lie, what they must be, and how they are fetched. No torch.

A weights folder holds the files under their published names (`xlm-roberta-base` is a folder), so it
can be copied by hand to a machine without internet.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.download import (
    NO_HEADERS,
    DownloadError,
    OnBytes,
    PartialFile,
    download,
)
from d2m_hpc.models.lock import UNLOCKED, Lock, alone
from d2m_hpc.models.published import Checkpoint, HubRepo
from d2m_hpc.storage.files import atomic_write, make_folder, sync_path
from d2m_hpc.storage.texts import nearest

if TYPE_CHECKING:
    from d2m_hpc.models.family import ModelSpec

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that keep Hugging Face's libraries from asking their hub."""
MOST_FILES = 1000
"""Of a folder that a custom class declares."""


def default_dir() -> Path:
    """`$D2M_WEIGHTS`, or a folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.path.expanduser(os.environ.get("D2M_WEIGHTS") or f"{cache}/d2m_hpc")
    if folder.startswith("~"):  # a container's user without a home
        folder = os.path.join(tempfile.gettempdir(), f"d2m_hpc-{os.getuid()}")
    return Path(folder)


def weights_dir(configured: str | None) -> Path:
    return Path(os.path.expanduser(configured)) if configured else default_dir()


def needed(specs: Iterable[ModelSpec]) -> list[Checkpoint | HubRepo]:
    """What these models need, each once; custom models bring their own."""
    return list(dict.fromkeys(need for spec in specs for need in spec.checkpoints))


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashCache:
    """sha256 of files by path, size and mtime: gigabytes are read once, not at each submit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._known: dict[str, list[object]] = dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            self._known = {}

    def __call__(self, file: Path) -> str:
        stat = file.stat()
        entry = self._known.get(str(file))
        if entry and entry[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(entry[2])
        digest = sha256_of(file)
        self._known[str(file)] = [stat.st_size, stat.st_mtime_ns, digest]
        if self.path.parent.is_dir():
            atomic_write(self.path, json.dumps(self._known).encode(), durable=False)
        return digest


@dataclass(frozen=True)
class Checked:
    """One checkpoint as it was found: `sha256` is empty when the file is missing."""

    checkpoint: Checkpoint
    path: Path
    sha256: str

    @property
    def state(self) -> str:
        if not self.sha256:
            return "missing"
        return "ok" if self.checkpoint.is_published(self.sha256) else "not the published file"

    def is_usable(self, allow_unpublished: bool) -> bool:
        return self.state == "ok" or (allow_unpublished and self.state != "missing")


def look(
    checkpoint: Checkpoint, folder: Path, digest: Callable[[Path], str] = sha256_of
) -> Checked:
    path = folder / checkpoint.name
    return Checked(checkpoint, path, digest(path) if path.is_file() else "")


@dataclass(frozen=True)
class Found:
    """What is there of one thing that models need.

    Attributes:
        place: path of the file or of the repository's folder.
        files: one for a published file; those of a repository, or its folder while it is missing.
        commit: which a repository's revision is, by the lock file; empty where that has none.
    """

    need: Checkpoint | HubRepo
    place: Path
    files: Sequence[Checked]
    commit: str = ""

    @property
    def state(self) -> str:
        """Of a file as `Checked` says; a repository is present, partial, missing or changed."""
        states = {checked.state for checked in self.files}
        if isinstance(self.need, Checkpoint):
            return self.files[0].state
        if "missing" in states:
            return "missing" if states == {"missing"} else "partial"
        return "present" if states == {"ok"} else "changed" if self.commit else "not locked"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(c.path.stat().st_size for c in self.files if c.sha256)


def check(
    specs: Iterable[ModelSpec], folder: Path, digest: Callable[[Path], str] = sha256_of
) -> list[Checked]:
    """Look at every file that these models need, those of hub repositories one by one."""
    lock = Lock.read(folder)
    found = (c for need in needed(specs) for c in survey(need, folder, lock, digest).files)
    return list(dict.fromkeys(found))  # models may share a repository


def survey(
    need: Checkpoint | HubRepo, folder: Path, lock: Lock, digest: Callable[[Path], str] = sha256_of
) -> Found:
    """Look at one file, or at those of a repository, and compare them with the lock file, too."""
    if isinstance(need, Checkpoint):
        return Found(need, folder / need.name, [look(lock.expected(need), folder, digest)])
    files = [look(checkpoint, folder, digest) for checkpoint in lock.of(need, folder)]
    locked = lock.repositories.get(need.name)
    return Found(need, folder / need.name, files, locked.commit if locked else "")


def survey_all(
    specs: Iterable[ModelSpec],
    folder: Path,
    custom_file: Path | None = None,
    quick: bool = False,
    cache: Callable[[Path], str] = sha256_of,
) -> list[Found]:
    """Look at all that these models need, and at what custom classes declare as theirs.

    Args:
        quick: read no file; one of the right size is taken for the right one.
        cache: hashes files.
    """
    specs, lock = [*specs], Lock.read(folder)
    digest = lock.digest(folder, lambda path: "unread", timed=False) if quick else cache
    own = [p for s in specs for given in s.files for p in _paths(given, custom_file or folder)]
    asked = {} if quick else asked_hashes(specs)
    files = [Checkpoint(str(p), "", asked.get(str(p), "")) for p in dict.fromkeys(own)]
    return [survey(need, folder, lock, digest) for need in [*needed(specs), *files]]


def asked_hashes(specs: Iterable[ModelSpec]) -> dict[str, str]:
    """The sha256 that a config gives of checkpoints at hand, by their paths."""
    given = ((spec.files[:1], getattr(spec.family, "sha256", "")) for spec in specs)
    return {path: sha256 for files, sha256 in given if sha256 for path in files}


@dataclass(frozen=True)
class Kept:
    """A checkpoint as a submit found it, to tell whether tasks find the same."""

    path: str
    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path, digest: Callable[[Path], str] = sha256_of) -> Kept:
        stat = path.stat()  # first: what is written meanwhile has another time
        return cls(str(path), stat.st_size, stat.st_mtime_ns, digest(path))

    def other(self) -> str:
        """What is wrong with the file now; nothing where it is the same, by its time or hash."""
        try:
            stat = os.stat(self.path)
            if (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns):
                return ""
            found = sha256_of(Path(self.path))
        except OSError as error:
            return f"{self.path} cannot be read: {error.strerror or error}"
        if found == self.sha256:
            return ""
        return f"{self.path} is another file: its sha256 was {self.sha256}, is {found}"


def declared(spec: ModelSpec, file: Path) -> dict[str, Path]:
    """The checkpoints that a custom class declares, by names that do not depend on their place.

    Args:
        file: the custom file, from whose folder relative paths lead.

    Raises:
        WeightsError: one is not there, or is a folder of too many files.
    """
    found: dict[str, Path] = {}
    for given in spec.files:
        path = file.parent / os.path.expanduser(given)
        inside = _paths(given, file)
        if len(inside) > MOST_FILES:
            raise WeightsError(
                f"checkpoints of {spec.name!r}: {path} holds {len(inside):,} files; valid are up "
                f"to {MOST_FILES:,}; declare those that the model reads"
            )
        for each in inside:
            if not each.is_file():
                raise WeightsError(f"checkpoints of {spec.name!r}: {each} is not there")
            name = "/".join((spec.name, *each.relative_to(path.parent).parts))
            while found.get(name, each) != each:
                name += "~"
            found[name] = each
    return found


def _paths(given: str, file: Path) -> list[Path]:
    """The files of one entry of a custom class's checkpoints."""
    path = file.parent / os.path.expanduser(given)
    return _files_in(path) if path.is_dir() else [path]


def _files_in(folder: Path) -> list[Path]:
    """All that are not hidden: downloaders keep their own notes in hidden folders."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in files if not any(n[0] == "." for n in p.relative_to(folder).parts))


def require(checked: Sequence[Checked], allow_unpublished: bool, config: str) -> dict[str, str]:
    """The sha256 of each checkpoint by name.

    Raises:
        WeightsError: naming every file that is missing or wrong, its URL and the command to run.
    """
    problems = []
    unlocked = [c for c in checked if c.checkpoint.sha256 == UNLOCKED and c.sha256]
    for item in checked:
        if item.state == "missing":
            url = item.checkpoint.url
            where = (
                f"it is published at {url}" if url else "a custom file declares it, or the config"
            )
            problems.append(f"{item.path} is missing; {where}{_beside(item.checkpoint.name)}")
        elif not item.is_usable(allow_unpublished):
            whose = "published is" if item.checkpoint.url else "the config says"
            if item in unlocked[1:]:  # for one cause
                continue
            others = len(unlocked) - 1 if item in unlocked else 0
            more = f", nor {others} more files" if others else ""
            problems.append(
                f"{item.path} has sha256 {item.sha256}, {whose} {item.checkpoint.sha256}{more} "
                "(allow_unpublished_weights: true accepts your own)"
            )
    if problems:
        published = any(item.checkpoint.url for item in checked)
        advice = [f"run `d2m weights fetch {config}` where there is internet"] if published else []
        raise WeightsError("\n  ".join(["checkpoints:", *problems, *advice]))
    return {item.checkpoint.name: item.sha256 for item in checked}


def _beside(name: str) -> str:
    """What to say of a missing repository, if a folder here has its owner's name: a folder in that
    one may be meant."""
    owner, _, repo = name.rpartition("@")[0].removeprefix("hub/").partition("--")
    if not repo or not Path(owner).is_dir():
        return ""
    known = (path.name for path in Path(owner).iterdir())
    return f"; {Path(owner).absolute()} has no {repo!r}{nearest(repo, known)}"


def address(checkpoint: Checkpoint, mirror: str = "") -> str:
    """Where a checkpoint is fetched from: its publisher, or a mirror's folder.

    Raises:
        WeightsError: the mirror is no http(s) URL.
    """
    if not mirror:
        return checkpoint.url
    if not mirror.startswith(("http://", "https://")):
        raise WeightsError(
            f"mirror {mirror!r}: valid is http://... or https://...; copy files of a folder by hand"
        )
    return f"{mirror.rstrip('/')}/{quote(checkpoint.name)}"


def fetch(
    checkpoint: Checkpoint,
    folder: Path,
    mirror: str = "",
    allow_unpublished: bool = False,
    on_bytes: OnBytes = lambda done, total: None,
) -> Checked:
    """Download one checkpoint; readers see the whole file or none, one process fetches at a time.

    A file that is there and right costs neither a lock nor a connection. What a broken transfer
    has brought stays in `NAME.part` for the next call.

    Args:
        mirror: URL of a folder with the files under their published names, to ask instead.
        allow_unpublished: take what is in the folder, or what a mirror has, whatever its hash.
        on_bytes: called with the bytes so far and in all.

    Raises:
        WeightsError: the server cannot be reached, breaks off, or sends another file.
    """
    path = folder / checkpoint.name
    try:
        with writable(path):
            return fetched(checkpoint, folder, mirror, allow_unpublished, on_bytes)
    except DownloadError as error:
        reason = " ".join(str(error).split())
        url = address(checkpoint, mirror)
        advice = "check the URL" if error.status in (404, 410) else "try again"
        raise WeightsError(f"{url}: {reason}; {advice}, or copy to {path}") from None


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Say what to do where a weights folder takes no file.

    Raises:
        WeightsError: the block failed for the disk's sake.
    """
    try:
        yield
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be written or read: {error}; make room, or choose another weights_dir"
        ) from None


def fetched(
    checkpoint: Checkpoint,
    folder: Path,
    mirror: str,
    allow_unpublished: bool,
    on_bytes: OnBytes,
    headers: Mapping[str, str] = NO_HEADERS,
) -> Checked:
    """Do what `fetch` does, for callers that know better what to do about errors.

    Args:
        headers: for the server of the checkpoint's URL.

    Raises:
        DownloadError: the server does not give the file.
        WeightsError: it sends another.
        OSError: it cannot be written.
    """
    path, url = folder / checkpoint.name, address(checkpoint, mirror)
    found = look(checkpoint, folder)
    if found.is_usable(allow_unpublished):
        return found
    make_folder(path.parent)
    with alone(path):
        found = look(checkpoint, folder)  # another process may have fetched it meanwhile
        if found.is_usable(allow_unpublished):
            return found
        part = PartialFile(path.with_name(f"{path.name}.part"))
        accept_any = allow_unpublished and bool(mirror)
        resumed = part.size > 0
        found = Checked(checkpoint, path, download(url, part, on_bytes, headers))
        if resumed and not found.is_usable(accept_any):  # its beginning may be another file's
            part.remove()
            found = Checked(checkpoint, path, download(url, part, on_bytes, headers))
        if not found.is_usable(accept_any):
            part.remove()
            raise WeightsError(
                f"{url} sent a file of sha256 {found.sha256}, published is {checkpoint.sha256}; "
                "nothing was kept (allow_unpublished_weights: true accepts what a mirror has, "
                "--update what took the place of a file that has no published hash)"
            )
        os.replace(part.path, path)
        part.remove()
        sync_path(path.parent)
    return found
