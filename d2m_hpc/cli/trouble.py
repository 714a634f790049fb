"""An error in words for people: what is wrong, where, and what to do."""

from __future__ import annotations

import errno
import traceback

from d2m_hpc.errors import ConfigError, D2MError

LONGEST_LINE = 3000
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


def explained(error: Exception) -> tuple[str, int]:
    """An error's words and the exit code of a command that it ends."""
    if isinstance(error, D2MError):
        return _safe(str(error)), error.exit_code
    if isinstance(error, OSError) and error.errno in ADVICE:
        return _safe(of_system(error)), ConfigError.exit_code
    return _safe(_unexpected(error)), D2MError.exit_code


def of_system(error: OSError) -> str:
    """What the operating system refused, for which file, and what helps."""
    names = [_name(n) for n in (error.filename, error.filename2) if n is not None]
    what = f"{error.strerror or type(error).__name__}; {ADVICE.get(error.errno or 0, 'try again')}"
    return f"{' -> '.join(names)}: {what}" if names else what


def _name(name: object) -> str:
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else str(name)


def _unexpected(error: Exception) -> str:
    """A mistake of this program: where it was made is enough to report it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"unexpected {what}{where}; please report this, with what D2M_TRACEBACK=1 adds"


def _safe(text: str) -> str:
    """As many lines as there are, each of them fit for a terminal."""
    from d2m_hpc.state.texts import safe

    return "\n".join(safe(line, LONGEST_LINE) for line in text.split("\n"))
