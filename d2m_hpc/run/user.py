"""The name of the calling user."""

from __future__ import annotations

import getpass
import os


def user_name() -> str:
    """The user's name; the user's number in a container that lists no users."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # KeyError until Python 3.12, OSError since then
        return f"uid {os.getuid()}"
