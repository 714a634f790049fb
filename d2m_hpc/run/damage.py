"""Damaged files of a run folder, reported by their paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2m_hpc.errors import D2MError
from d2m_hpc.storage.texts import safe

WHY = 200
"""The most characters of a library's words about a damaged file."""


@contextmanager
def undamaged(path: Path, advice: str) -> Iterator[None]:
    """Raise every error in reading and parsing a file as a D2MError that names the file.

    Args:
        advice: the user's way out, for the message.

    Raises:
        OSError: the system cannot read the file.
        D2MError: the file's content cannot be understood.
    """
    try:
        yield
    except D2MError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # arrow's errors have none
            raise
        why = safe(str(error) or type(error).__name__, WHY)
        raise D2MError(f"{path} is damaged: {why}; {advice}") from error
