"""Show the progress of a run in this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from d2m_hpc.storage.texts import counted
from d2m_hpc.watch import terminal

if TYPE_CHECKING:
    from d2m_hpc.run.tasks import Progress as TaskProgress
    from d2m_hpc.worker.progress import Listener

PLAIN_SECONDS = 10.0
"""Seconds between two lines, where nobody watches at a terminal."""


@contextmanager
def progress(shards: int) -> Iterator[Listener]:
    """Show warnings, and a bar of shards, or plain lines outside a terminal."""
    package, warnings = logging.getLogger("d2m_hpc"), _Warnings(logging.WARNING)
    package.addHandler(warnings)
    package.propagate = False  # to what a library sets up for all programs as it is imported
    try:
        if terminal.console.is_terminal:
            with _bar(shards) as listener:
                yield listener
        else:
            yield _PlainLines()
    finally:
        package.removeHandler(warnings)
        package.propagate = True


class _Warnings(logging.Handler):
    """Prints warnings above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        terminal.console.print(f"{record.levelname.lower()}: {self.format(record)}", style="yellow")


@contextmanager
def _bar(shards: int) -> Iterator[Listener]:
    columns = (
        TextColumn("shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:,.0f} samples/s"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}", style="red"),
    )
    with Progress(*columns, console=terminal.console) as bar:
        row = bar.add_task("", total=shards, speed=0.0, failed="")

        def tell(task: TaskProgress) -> None:
            failed = f"{task.failed} failed" if task.failed else ""
            finished = task.done + task.failed
            bar.update(row, completed=finished, speed=task.speed, failed=failed)

        yield tell


class _PlainLines:
    """A line now and then, and at the end."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def __call__(self, task: TaskProgress) -> None:
        now = time.monotonic()
        if now - self.said < PLAIN_SECONDS and task.state == "running":
            return
        self.said = now
        print(
            f"{task.done + task.failed}/{counted(task.shards, 'shard')}, "
            f"{counted(task.rows, 'row')}, "
            f"{task.speed:.1f} samples/s, {task.failed} failed",
            flush=True,
        )
