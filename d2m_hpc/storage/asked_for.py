"""Files that a user names by -o."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2m_hpc.errors import ConfigError
from d2m_hpc.storage.files import make_folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
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


def require_writable(path: Path) -> None:
    """Find out before hours of reading whether a file can be written in the end.

    Raises:
        ConfigError: its folder cannot be made or written into, or the name is a folder's.
    """
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        make_folder(path.absolute().parent)
        with tempfile.TemporaryFile(dir=path.absolute().parent) as file:
            file.write(b"d2m")
