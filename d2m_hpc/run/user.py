"""Who calls."""

from __future__ import annotations

import getpass
import os


def user_name() -> str:
    """The user's name; in a container, whose users need not be listed anywhere, the number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # until Python 3.12 and since
        return f"uid {os.getuid()}"
