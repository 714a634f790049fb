"""Fetch repositories of the Hugging Face hub into the weights folder, at one commit for all.

huggingface_hub tells the commit, its files and who may read them. Their bytes come by
`models.download`: that library's own downloads begin anew when the process was stopped.
"""

from __future__ import annotations

import errno
import hashlib
import re
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from d2m_hpc.errors import WeightsError
from d2m_hpc.models import download, lock, weights
from d2m_hpc.models.download import DownloadError, OnBytes
from d2m_hpc.models.lock import Lock, LockedFile, LockedRepo
from d2m_hpc.models.published import Checkpoint, HubRepo, endpoint
from d2m_hpc.models.weights import OFFLINE, Checked, Found, address, writable
from d2m_hpc.storage.files import atomic_write
from d2m_hpc.storage.texts import safe

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

WHY = 200
"""Characters of what a library says of an error."""

TransferBar = Callable[[str], AbstractContextManager[OnBytes]]
"""Shows the transfer of one file while it lasts."""


@dataclass(frozen=True)
class Wish:
    """How to fetch.

    Attributes:
        progress: shows the transfer of a file by name while it lasts.
        mirror: URL of a weights folder to ask instead of the publishers.
        allow_unpublished: take what is in the folder, or what a mirror has, whatever its hash.
        update: take the commit that a revision is now, and files that their publishers replaced,
            though the lock file has others.
    """

    progress: TransferBar
    mirror: str = ""
    allow_unpublished: bool = False
    update: bool = False


def fetch(need: Checkpoint | HubRepo, folder: Path, wish: Wish) -> Found:
    """Download what a model needs, and enter it into the lock file; again goes on where it was.

    Raises:
        WeightsError: a server refuses, cannot be reached, or sends another file; or the folder
            cannot be written.
    """
    if isinstance(need, HubRepo):
        return _repository(need, folder, wish)
    wanted = need if wish.update else Lock.read(folder).expected(need)
    with wish.progress(need.name) as on_bytes:
        found = weights.fetch(wanted, folder, wish.mirror, wish.allow_unpublished, on_bytes)
    _note(found, folder)
    return Found(need, found.path, [found])


def _note(found: Checked, folder: Path) -> None:
    """Enter a file into the lock file, but none that is only accepted in the place of another.

    Where files are all right in a folder of somebody else's, its lock file stays as it is.
    """
    if found.state != "ok":
        return
    try:
        with lock.changing(folder) as held:
            held.note(found.checkpoint.name, found.path, found.sha256)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            with writable(folder / lock.NAME):
                raise


def _repository(repo: HubRepo, folder: Path, wish: Wish) -> Found:
    locked = Lock.read(folder).repositories.get(repo.name)
    if locked is None or wish.update:
        locked = _from_mirror(repo, wish.mirror) if wish.mirror else _from_hub(repo)
        _require_some(repo, locked)
        locked = _entered(repo, folder, locked)
    wanted = _require_some(repo, locked)
    files = [_file(checkpoint, repo, locked, folder, wish) for checkpoint in wanted]
    return Found(repo, folder / repo.name, files, locked.commit)


def _require_some(repo: HubRepo, commit: LockedRepo) -> list[Checkpoint]:
    """The files of a commit that are needed.

    Raises:
        WeightsError: there are none.
    """
    if wanted := commit.checkpoints(repo):
        return wanted
    needed = f"none of {', '.join(repo.files)}" if repo.files else "no file of a model"
    has = ", ".join(sorted(commit.files)[:8]) or "none"
    what = f"{repo.url} has {needed} at {commit.commit[:12]}; its files: {has}"
    advice = "check the name, and ask for a newer commit by `d2m weights fetch --update`"
    raise WeightsError(safe(f"{what}; {advice}", 2 * WHY))


def _entered(repo: HubRepo, folder: Path, new: LockedRepo) -> LockedRepo:
    """Enter a commit into the lock file; remove the files that the commit before it had and this
    one has not, or has others of."""
    with writable(folder), lock.changing(folder) as held:
        old = held.repositories.get(repo.name, LockedRepo("", "", "", {})).files
        same = {name: file for name, file in old.items() if file.is_same(new.files.get(name))}
        for name in old.keys() - same.keys():
            (folder / repo.name / name).unlink(missing_ok=True)
        held.repositories[repo.name] = replace(new, files={**new.files, **same})
        return held.repositories[repo.name]


def _file(
    checkpoint: Checkpoint, repo: HubRepo, locked: LockedRepo, folder: Path, wish: Wish
) -> Checked:
    path = folder / checkpoint.name
    listed = locked.files[checkpoint.name.removeprefix(f"{repo.name}/")]
    with writable(path):
        if not listed.size and not path.is_file():
            atomic_write(path, b"")
        if path.is_file() and not wish.allow_unpublished and not _is_listed(path, listed):
            path.unlink()
        found, accept_any = weights.look(checkpoint, folder), wish.allow_unpublished
        if not found.is_usable(accept_any):
            found = _downloaded(checkpoint, repo, folder, wish)
            accept_any = accept_any and bool(wish.mirror)
        right = _is_listed(path, listed)
        if not right and not accept_any:
            path.unlink()
            raise WeightsError(f"{path}: another file came than the commit has; try again")
    if right:
        _note(found, folder)
    return found


def _is_listed(path: Path, listed: LockedFile) -> bool:
    """Whether a file has the hash by which git, and so the hub, knows a small one."""
    if not listed.git:
        return True
    data = path.read_bytes()
    content = b"blob %d\0" % len(data) + data
    return hashlib.sha1(content, usedforsecurity=False).hexdigest() == listed.git


def _downloaded(checkpoint: Checkpoint, repo: HubRepo, folder: Path, wish: Wish) -> Checked:
    headers = {} if wish.mirror else _headers(repo)
    try:
        with wish.progress(checkpoint.name) as on_bytes:
            return weights.fetched(
                checkpoint, folder, wish.mirror, wish.allow_unpublished, on_bytes, headers
            )
    except DownloadError as error:
        if wish.mirror:
            raise WeightsError(f"{address(checkpoint, wish.mirror)}: {error}") from None
        raise _refused(repo, error.status, str(error)) from None


def _from_mirror(repo: HubRepo, mirror: str) -> LockedRepo:
    """What the lock file of a mirror says of a repository."""
    wanted = Checkpoint(lock.NAME, "")
    with tempfile.TemporaryDirectory() as folder:
        try:
            weights.fetched(wanted, Path(folder), mirror, False, lambda done, total: None)
        except DownloadError as error:
            raise WeightsError(f"{address(wanted, mirror)}: {error}; try again") from None
        locked = Lock.read(Path(folder), address(wanted, mirror)).repositories.get(repo.name)
    if locked is None:
        raise WeightsError(f"{mirror}: its {lock.NAME} has no {repo.name}; fetch it there first")
    return locked


def _from_hub(repo: HubRepo) -> LockedRepo:
    """The commit that the revision is now, and its files."""
    info = _asked(repo)
    files = {
        sibling.rfilename: LockedFile(
            -1 if sibling.size is None else sibling.size,
            sha256=sibling.lfs.sha256 if sibling.lfs else "",
            git="" if sibling.lfs else sibling.blob_id or "",
        )
        for sibling in info.siblings or ()
    }
    if not info.sha:
        raise _refused(repo, 0, "the hub tells no commit")
    found = LockedRepo(repo.repo_id, repo.revision, info.sha, files)
    if wrong := next(found.unsafe(), None):
        raise WeightsError(f"{repo.url}: {wrong!r} is no name of a file that can be fetched")
    return found


def _asked(repo: HubRepo) -> ModelInfo:
    """The hub's answer; waits and asks again where another answer may come."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    _headers(repo)  # raises where the hub is not to be asked
    api, tries = HfApi(endpoint=endpoint(), library_name="d2m_hpc"), 0
    while True:
        tries += 1
        try:
            return api.model_info(
                repo.repo_id,
                revision=repo.revision,
                files_metadata=True,
                timeout=download.TIMEOUT_SECONDS,
            )
        except RevisionNotFoundError:
            valid = "valid is a branch, a tag or a commit"
            raise WeightsError(f"{repo.url} has no revision {repo.revision!r}: {valid}") from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status not in download.PASSING or tries == download.TRIES:
                raise _refused(repo, status, f"the server answers {status}") from None
            download.pause(tries, error.response.headers.get("Retry-After"))
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # of its answer
            what = f"{endpoint()} gives no hub's answer: {type(error).__name__}: {error}"
            raise _refused(repo, 0, what) from None
        except Exception as error:  # of the HTTP library, which is another in each version
            reason = f"{type(error).__name__}: {error}"
            proxy = download.by_proxy(endpoint())
            raise _refused(repo, 0, f"the hub cannot be reached{proxy}: {reason}") from None


def _headers(repo: HubRepo) -> dict[str, str]:
    """What tells the hub who asks.

    Raises:
        WeightsError: the hub is not to be asked.
    """
    from huggingface_hub import constants, get_token

    if not re.match(r"https?://[^/\s]", endpoint()):
        valid = "valid is the URL of a hub, such as https://huggingface.co"
        raise WeightsError(f"{repo.repo_id}: HF_ENDPOINT is {endpoint()!r}; {valid}")
    if constants.HF_HUB_OFFLINE:
        advice = f"unset {' and '.join(OFFLINE)}, or fetch on another machine"
        raise WeightsError(f"{repo.url}: the hub is switched off here; {advice}")
    try:
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    except (OSError, ValueError):
        path = constants.HF_TOKEN_PATH
        raise WeightsError(f"{path} cannot be read as a token; `hf auth login` again") from None
    return {"Authorization": f"Bearer {token}"} if token else {}


ADVICE = {
    401: "the repository is gated, private, renamed or misspelt: check its name, accept its "
    "licence on that page, then `hf auth login` or set HF_TOKEN",
    403: "the account of your token has no access: accept the licence on that page, or use the "
    "token of another account in HF_TOKEN",
    404: "check the name of the repository; `--update` asks for its newest commit",
    429: "too many requests came from here: wait some minutes; `hf auth login` raises the limit",
}


def _refused(repo: HubRepo, status: int, reason: str) -> WeightsError:
    """What to do about an answer; it holds no token."""
    if status == 403 and not _headers(repo):
        status = 401  # there is no token
    advice = ADVICE.get(status, f"try again, or set HF_ENDPOINT to a mirror of {endpoint()}")
    if status in (401, 404):
        advice += f"; a folder at hand is named './{repo.repo_id}'"
    return WeightsError(safe(f"{repo.url}: {' '.join(reason.split())}; {advice}", 2 * WHY))
