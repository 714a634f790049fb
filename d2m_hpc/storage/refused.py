"""Errors of the operating system in words: the file, the reason, and what helps."""

from __future__ import annotations

import errno
from pathlib import Path

from d2m_hpc.errors import DiskError

ADVICE = {
    errno.ENOSPC: "make room there, and run the same command again",
    errno.EDQUOT: "make room in your quota, and run the same command again",
    errno.EFBIG: "the limit of a file's size (ulimit -f) is too low",
    errno.EACCES: "you may not read or write there; mend its permissions, or name another folder",
    errno.EPERM: "you may not read or write there; mend its permissions, or name another folder",
    errno.EROFS: "that filesystem can only be read; name a folder elsewhere",
    errno.ENOENT: "it is missing, or was removed meanwhile",
    errno.ENOTDIR: "a file stands where a folder should be; move it, or name another folder",
    errno.EISDIR: "a folder stands where a file should be; move it away",
    errno.EEXIST: "something else stands in its place; move it away",
    errno.EIO: "the disk or file server fails; try again, and ask who runs it",
    errno.ESTALE: "the file server has lost the folder; try again, and ask who runs it",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENAMETOOLONG: "that name is too long for its filesystem",
}
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
"""Errors of a disk, quota or file server, whatever is written."""


def require_there(folder: Path) -> None:
    """Raise a `DiskError` if a folder of the run was removed, or is not mounted any more."""
    if not folder.is_dir():
        advice = "put it back, or, where it was removed on purpose, submit again"
        raise DiskError(f"{folder} is gone: removed, moved, or not mounted any more; {advice}")


def of_system(error: OSError) -> str:
    """Describe an error of the operating system: the file, the reason, and what helps."""
    names = [_name(n) for n in (error.filename, error.filename2) if n is not None]
    what = f"{error.strerror or type(error).__name__}; {ADVICE.get(error.errno or 0, 'try again')}"
    return f"{' -> '.join(names)}: {what}" if names else what


def _name(name: object) -> str:
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else str(name)
