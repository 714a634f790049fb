"""Files that the first of many tasks writes; all other tasks use the first one's content."""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from d2m_hpc.errors import DiskError
from d2m_hpc.storage.files import durable, make_folder
from d2m_hpc.storage.texts import safe

WITHOUT_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
"""Errors of filesystems without hard links."""
PATIENCE = 10.0
"""Seconds for the first task to finish a short file, where the file cannot appear whole."""
WHY = 200
"""Characters of the error that are shown for a damaged file."""
T = TypeVar("T")


def as_it_is(found: Any) -> Any:
    return found


def read(path: Path, take: Callable[[Any], T] = as_it_is) -> T | None:
    """Read the agreed content; None where no task has written yet.

    Args:
        take: converts the JSON; raises where no task can have written that.

    Raises:
        DiskError: the file is damaged.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            if time.monotonic() > deadline:
                raise _damaged(path, error) from error
            time.sleep(0.05)
            continue
        try:
            return take(found)
        except (ValueError, LookupError, TypeError) as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DiskError:
    why = safe(f"{type(error).__name__}: {error}", WHY)
    advice = "remove it, and run the same command again: tasks make it anew"
    return DiskError(f"{path} is damaged: {why}; {advice}")


def agree(path: Path, proposal: Any, take: Callable[[Any], T] = as_it_is) -> T | None:
    """Write a proposal if the file does not exist; return the file's content, the same for all
    tasks.

    The file appears whole, by a hard link: making the link fails, on NFS too, where the file
    exists.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    data = json.dumps(proposal).encode()
    try:
        with durable(temporary, "xb") as file:
            file.write(data)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno in WITHOUT_LINKS:
                with suppress(FileExistsError), durable(path, "xb") as file:
                    file.write(data)
            elif not path.exists():
                raise
    finally:
        temporary.unlink(missing_ok=True)
    return read(path, take)
