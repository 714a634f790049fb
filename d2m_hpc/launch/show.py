"""What people see in the terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table

if TYPE_CHECKING:
    from d2m_hpc.launch.decide import Decision
    from d2m_hpc.launch.slurm import Array, Proposal
    from d2m_hpc.launch.status import Summary
    from d2m_hpc.launch.verify import Report
    from d2m_hpc.models.weights import Checked, Checkpoint
    from d2m_hpc.worker.progress import Listener
    from d2m_hpc.worker.progress import Progress as TaskProgress

WATCH_SECONDS = 3.0
PLAIN_SECONDS = 10.0
"""How often a run that is not watched at a terminal says a line."""
WIDE = 10_000


def new_console(file: IO[str] | None = None, terminal: bool | None = None) -> Console:
    """Shows paths and errors as they are, brackets and all; folds lines only at a terminal.

    Args:
        file: instead of standard output.
        terminal: instead of what the file says of itself.
    """
    made = Console(file=file, force_terminal=terminal, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.soft_wrap, made.width = True, WIDE
    return made


console = new_console()


def _pairs(rows: dict[str, Any], title: str | None = None) -> None:
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


def duration(seconds: float | None) -> str:
    """Such as `2 h 05 min`, or `unknown`."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def decision(decided: Decision) -> None:
    done, given_up = len(decided.done), len(decided.exhausted)
    line = f"{len(decided.shards)} shards: {done} done, {len(decided.pending)} to do"
    if decided.in_flight:
        line += f", {len(decided.in_flight)} with live tasks"
    if given_up:
        attempts = decided.workload.config.max_attempts
        line += (
            f", {given_up} given up after {attempts} attempts (--set max_attempts={attempts + 1})"
        )
    console.print(line)
    if decided.pending and decided.shard_seconds is not None:
        left = duration(len(decided.pending) * decided.shard_seconds)
        console.print(f"about {left} of work, by the shards that are done")
    for notice in decided.notices:
        console.print(f"note: {notice}", style="yellow")


def proposal(proposed: Proposal) -> None:
    """Chunks, arrays and sbatch's options, as they would be."""
    console.print(
        f"{len(proposed.chunks)} tasks of at most {max(map(len, proposed.chunks))} shards"
    )
    for array in proposed.arrays:
        line = f"array {array.name}: elements 0-{array.elements - 1}"
        line += f", {array.parallel} at once" if array.parallel else ""
        line += f", after array {array.after}" if array.after is not None else ""
        console.print(line)
    flags = (f"--{k}" if v is True else f"--{k}={v}" for k, v in proposed.options.items())
    console.print("sbatch", *flags)


def submitted(arrays: Sequence[Array]) -> None:
    for array in arrays:
        console.print(f"array {array.job_id}: {array.elements} elements ({array.name})")
    if arrays:
        console.print("`d2m status` shows how far it is")


def summary(found: Summary) -> None:
    rows = {
        "shards": f"{found.shards}",
        "done": f"{found.done}",
        "failed": f"{found.failed}",
        "pending": f"{found.pending}",
        "running": f"{found.running}",
        "rows": f"{found.rows:,}",
        "rejected": f"{found.rejected:,}",
        "samples a second": f"{found.samples_per_second:,.1f}",
        "time left": "none" if found.complete else duration(found.eta_seconds),
        "outputs": found.output,
        "run folder": found.run_dir,
    }
    if found.tasks:
        rows["array tasks"] = ", ".join(f"{n} {state}" for state, n in found.tasks.items())
    if found.gpu_hours:
        rows["GPU-hours"] = f"{found.gpu_hours:,.1f}"
    if found.recomputed:
        rows["run again in float32"] = f"{found.recomputed:,}"
    _pairs(rows, found.state)
    console.print(ProgressBar(max(found.shards, 1), found.done, width=50))
    console.print()
    for reason, number in found.rejections.items():
        console.print(f"rejected {number:,}: {reason}")
    if found.stragglers:
        console.print(f"slower than the others: {', '.join(found.stragglers)}", style="yellow")
    for node, why in found.broken_nodes.items():
        console.print(f"node {node} could not start tasks: {why}", style="red")
    for group in found.failures:
        names = ", ".join(group.shards[:5]) + (", ..." if len(group.shards) > 5 else "")
        head = f"failed {len(group.shards)} ({names}): {group.kind}: {group.error}"
        console.print(head, style="red")
        console.print(f"  log: {group.log}", style="red")


def watch(look: Callable[[], Summary]) -> None:
    """The summary again and again, until the run is complete or nothing of it is left to happen."""
    while True:
        found = look()
        console.clear()
        summary(found)
        if found.state in ("complete", "failed"):
            return
        time.sleep(WATCH_SECONDS)


def report(found: Report) -> None:
    for fault in found.faults:
        console.print(f"{fault.file} {fault.what}", style="red")
    wrong = len({f.file for f in found.faults})
    checked = f"{found.checked} shards checked"
    if found.checked < found.done:
        checked = f"checked {found.checked:,} of {found.done:,} shards, a random sample"
    console.print(f"{checked}, {wrong} files wrong")


def checkpoints(known: Sequence[Checkpoint]) -> None:
    table = Table("file", "published at", "sha256", show_edge=False)
    for item in known:
        table.add_row(item.name, item.url, item.sha256[:12] or "not published")
    console.print(table)


def checked(found: Sequence[Checked]) -> None:
    for item in found:
        style = "green" if item.state == "ok" else "red"
        console.print(f"{item.state:8} {item.path}", style=style)
    if not found:
        console.print("no checkpoint is needed")


@contextmanager
def download(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar for one file."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console) as bar:
        row = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


@contextmanager
def progress(decided: Decision) -> Iterator[Listener]:
    """What will be done, then a bar of shards; plain lines where nobody sits at a terminal."""
    decision(decided)
    package, warnings = logging.getLogger("d2m_hpc"), _Warnings(logging.WARNING)
    package.addHandler(warnings)
    try:
        if console.is_terminal:
            with _bar(len(decided.pending)) as listener:
                yield listener
        else:
            yield _PlainLines()
    finally:
        package.removeHandler(warnings)


class _Warnings(logging.Handler):
    """What goes wrong on the way, above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(f"{record.levelname.lower()}: {self.format(record)}", style="yellow")


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
    with Progress(*columns, console=console) as bar:
        row = bar.add_task("", total=shards, speed=0.0, failed="")

        def show(task: TaskProgress) -> None:
            failed = f"{task.failed} failed" if task.failed else ""
            finished = task.done + task.failed
            bar.update(row, completed=finished, speed=_speed(task), failed=failed)

        yield show


def _speed(task: TaskProgress) -> float:
    seconds = task.updated - task.started
    return task.rows / seconds if seconds > 0 else 0.0


class _PlainLines:
    """A line now and then, and the last one."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def __call__(self, task: TaskProgress) -> None:
        now = time.monotonic()
        if now - self.said < PLAIN_SECONDS and task.state == "running":
            return
        self.said = now
        print(
            f"{task.done + task.failed}/{task.shards} shards, {task.rows} rows, "
            f"{_speed(task):.1f} samples/s, {task.failed} failed",
            flush=True,
        )
