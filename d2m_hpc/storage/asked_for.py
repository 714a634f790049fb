"""Files that a user names by -o."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from d2m_hpc.errors import ConfigError
from d2m_hpc.storage import files


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """
    Raises:
        ConfigError: the system does not let the file be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        mistake = f"{path} cannot be written: {reason}; name another by -o"
        raise ConfigError("-o", [mistake]) from error


def write(path: Path, data: Iterable[bytes]) -> None:
    """Replace a file, or that which a link leads to; a device or pipe is written into.

    Args:
        data: the parts of the content.

    Raises:
        ConfigError: the system does not let the file be written.
    """
    with _writing(path):
        if _is_special(path):
            with open(path, "wb") as file:
                file.writelines(data)
        else:
            _require_folder(path)
            files.atomic_write(Path(os.path.realpath(path)), data)


def make_folder(folder: Path) -> None:
    """Make a folder in one that is there.

    Raises:
        ConfigError: the folder above is missing, or the system does not let it be made.
    """
    with _writing(folder):
        _require_folder(folder)
        files.make_folder(folder.absolute())


def require_writable(path: Path) -> None:
    """Find out before hours of reading whether a file can be written in the end.

    Raises:
        ConfigError: its folder is missing or cannot be written into, or the name is a folder's.
    """
    with _writing(path):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if _is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(None, "you may not write into it")
            return
        with tempfile.TemporaryFile(dir=_require_folder(path)) as file:
            file.write(b"d2m")


def _require_folder(path: Path) -> str:
    """The folder in which a file is replaced: that which a link leads into."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(None, f"there is no folder {folder}; make it")
    return folder


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()
