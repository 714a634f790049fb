"""An error in words for people: what is wrong, where, and what to do."""

from __future__ import annotations

import traceback

from d2m_hpc.errors import ConfigError, D2MError

LONGEST_LINE = 3000


def explained(error: Exception) -> tuple[str, int]:
    """The message of an error, and the exit code of a command that ends with the error."""
    from d2m_hpc.storage.refused import ADVICE, of_system

    if isinstance(error, D2MError):
        return _safe(str(error)), error.exit_code
    if isinstance(error, OSError) and error.errno in ADVICE:
        return _safe(of_system(error)), ConfigError.exit_code
    return _safe(_unexpected(error)), D2MError.exit_code


def _unexpected(error: Exception) -> str:
    """The message of a fault in this program, with the place of the fault."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"unexpected {what}{where}; please report this, with what D2M_TRACEBACK=1 adds"


def _safe(text: str) -> str:
    """Make each line of a text fit for a terminal."""
    from d2m_hpc.storage.texts import safe

    return "\n".join(safe(line, LONGEST_LINE) for line in text.split("\n"))
