"""Files of a run folder that are not as this program wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2m_hpc.errors import D2MError
from d2m_hpc.storage.texts import safe

WHY = 200
"""Characters of what a library says of a damaged file."""


@contextmanager
def undamaged(path: Path, advice: str) -> Iterator[None]:
    """Take whatever goes wrong while a file is read and parsed for damage of that file.

    Args:
        advice: what to do about it.

    Raises:
        OSError: the system cannot read the file.
        D2MError: what is in it is not what this program writes.
    """
    try:
        yield
    except D2MError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # arrow's have none
            raise
        why = safe(str(error) or type(error).__name__, WHY)
        raise D2MError(f"{path} is damaged: {why}; {advice}") from error
