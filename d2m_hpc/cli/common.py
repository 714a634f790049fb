"""Shared parts of the commands: types of arguments, reading the config, printing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from d2m_hpc.config import Config

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="the YAML config")]
Target = Annotated[Path, typer.Argument(metavar="CONFIG|RUN_DIR")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a config key")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def load(path: Path, overrides: list[str] | None = None, options: Any = None) -> Config:
    from d2m_hpc.config import load as load_config

    return load_config(path, overrides or (), options or {})


def print_json(values: Any) -> None:
    """Print JSON that every parser takes and every terminal shows."""
    from d2m_hpc.storage.texts import as_json

    print(as_json(values))


def echo(text: str) -> None:
    """Print a line that may hold any file names, fit for a terminal."""
    from d2m_hpc.storage.texts import TRACEBACK, safe

    print(safe(text, TRACEBACK, lines=True))


@contextmanager
def ending() -> Iterator[None]:
    """End a supervised process at once, even if a model has left threads running."""
    try:
        yield
    except BaseException as error:
        if supervise := sys.modules.get("d2m_hpc.worker.supervise"):
            supervise.leave_by(error)
        raise
