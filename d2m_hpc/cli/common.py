"""Shared parts of the commands: types of arguments, reading the config, printing."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from d2m_hpc.config import Config


def named(given: Any) -> Path:
    """Parse a path. An empty text is none: a shell makes one of `"$OUT"` where OUT is not set."""
    if given == "":
        raise typer.BadParameter("found ''; valid is a path, such as . for the current folder")
    return Path(given)


def number(
    least: int | None = None, most: int | None = None, whole: bool = False
) -> Callable[[Any], float]:
    """Make a parser of numbers in ASCII digits. To --top, 1 is not 1.0, so whole ones are ints."""
    valid = "a whole number" if whole else "a number"
    if least is not None:
        valid += f" from {least} " + ("on" if most is None else f"to {most}")
    elif not whole:
        valid += ", such as 0.3"

    def parse(given: Any) -> float:
        text = str(given)
        is_int = whole or text.strip("+-").isdecimal()
        try:
            if not text.isascii() or "_" in text:
                raise ValueError(text)
            found = int(text) if is_int else float(text)
            if least is not None and not least <= found <= (math.inf if most is None else most):
                raise ValueError(text)
        except ValueError:
            raise typer.BadParameter(f"found {text!r}; valid is {valid}") from None
        return found

    return parse


def whole(least: int | None = None, most: int | None = None) -> Callable[[Any], float]:
    """Make a parser of whole numbers."""
    return number(least, most, whole=True)


ConfigFile = Annotated[Path, typer.Argument(parser=named, metavar="CONFIG", help="the YAML config")]
Target = Annotated[Path, typer.Argument(parser=named, metavar="CONFIG|RUN_DIR")]
SeedOfDraw = Annotated[int | None, typer.Option(parser=whole(), metavar="N", help="of the draw")]
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


def counted(number: int, one: str, many: str = "") -> str:
    """A text such as `1 task` or `1,200 tasks`."""
    from d2m_hpc.storage import texts

    return texts.counted(number, one, many)


@contextmanager
def at_interrupt(words: str = "the same command goes on from here") -> Iterator[None]:
    """At Ctrl-C, say what becomes of the work."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; {words}", file=sys.stderr)
        raise


def waiting(how: str) -> AbstractContextManager[None]:
    """Wait for array tasks; at Ctrl-C, say that they go on, and how they are ended."""
    return at_interrupt(f"the array tasks go on: {how}")


class _Unread(io.FileIO):
    """Writes to a stream's file, and takes what nobody reads any more."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(stream.fileno(), "w", closefd=False)
        self._stream = stream  # which closes the file once it is given up

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def outlive_readers() -> None:
    """Go on where whoever reads the output has gone, as `| head -1` has after its line."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        # With PYTHONUNBUFFERED there is no buffer between the text and the file.
        if isinstance(stream, io.TextIOWrapper) and isinstance(
            buffer, io.FileIO | io.BufferedWriter
        ):
            raw = _Unread(stream)
            under: Any = raw if isinstance(buffer, io.FileIO) else io.BufferedWriter(raw)
            how = (stream.encoding, stream.errors, None, stream.line_buffering)
            text = io.TextIOWrapper(under, *how, stream.write_through)
            setattr(sys, name, text)


@contextmanager
def ending() -> Iterator[None]:
    """End a supervised process at once, even if a model has left threads running."""
    try:
        yield
    except BaseException as error:
        if supervise := sys.modules.get("d2m_hpc.worker.supervise"):
            supervise.leave_by(error)
        raise
