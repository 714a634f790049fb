"""Write the files that a user names by an option: -o, unless another one is said."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from d2m_hpc.errors import ConfigError
from d2m_hpc.storage import files


@contextmanager
def _writing(path: Path, option: str = "-o") -> Iterator[None]:
    """Raise the system's refusal to write a file as a `ConfigError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        mistake = f"{path} cannot be written: {reason}; name another by {option}"
        raise ConfigError(option, [mistake]) from error


def write(path: Path, data: Iterable[bytes], option: str = "-o") -> None:
    """Replace a file, or the target of a link; write into a device or a pipe.

    Args:
        data: the parts of the content.

    Raises:
        ConfigError: the system refuses.
    """
    with _writing(path, option):
        if _is_special(path):
            with open(path, "wb") as file:
                file.writelines(data)
        else:
            _require_folder(path)
            files.atomic_write(Path(os.path.realpath(path)), data)


def make_folder(folder: Path) -> None:
    """Make a folder whose parent exists; raise `ConfigError` where that cannot be done."""
    with _writing(folder):
        _require_folder(folder)
        files.make_folder(folder.absolute())


def require_writable(path: Path, option: str = "-o") -> None:
    """Check, before hours of reading, that a file can be written at the end.

    Raises:
        ConfigError: its folder is missing or read-only, or the name is a folder's.
    """
    with _writing(path, option):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if _is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(None, "you may not write into it")
            return
        with tempfile.TemporaryFile(dir=_require_folder(path)) as file:
            file.write(b"d2m")


def _require_folder(path: Path) -> str:
    """The folder in which a file is replaced: for a link, the target's folder."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(None, f"there is no folder {folder}; make it")
    return folder


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()
