"""The entry points of the commands: Ctrl-C ends them quietly, at any moment, with exit code 130.

This module imports the standard library only, as typer's import takes a noticeable time.
"""

import sys


def main() -> None:
    """Run `d2m`."""
    _run("app")


def main_submit() -> None:
    """Run `d2m-submit`, the same as `d2m submit`."""
    _run("submit_app")


def _run(name: str) -> None:
    try:
        from d2m_hpc.cli import commands

        commands.run(getattr(commands, name))
    except KeyboardInterrupt:
        sys.exit(130)
