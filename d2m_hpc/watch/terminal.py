"""Print runs, decisions and checks in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from d2m_hpc.launch.waiting import silence
from d2m_hpc.models.published import Checkpoint
from d2m_hpc.storage.texts import counted, fit, safe

if TYPE_CHECKING:
    from d2m_hpc.config import Config
    from d2m_hpc.launch.head import FirstSamples
    from d2m_hpc.launch.slurm import Array, Proposal
    from d2m_hpc.models.weights import Checked, Found
    from d2m_hpc.plan.decide import Decision
    from d2m_hpc.run.tasks import Progress as TaskProgress
    from d2m_hpc.watch.status import Summary
    from d2m_hpc.watch.verify import Report

WIDE = 10_000
LONGEST = 20_000
"""Characters of a text that are printed."""
LINES = 12
"""Lines of a screen that `top` leaves for what is not a task."""
IDLE = "nothing runs"
SHOWN, NUMBERS = 300, 4
"""Characters of a sample's value, and numbers of a feature, that are shown."""


class Screen(Console):
    """A console that escapes control characters in names, captions and errors."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape a text; every printed text, in a table's cells too, comes through here."""
        return super().render_str(safe(text, LONGEST, lines=True), **options)


def new_console(file: IO[str] | None = None, terminal: bool | None = None) -> Console:
    """A console that prints brackets in paths and errors as they are, and folds lines only at a
    terminal.

    Args:
        file: instead of standard output.
        terminal: instead of the file's own word.
    """
    made = Screen(file=file, force_terminal=terminal, highlight=False, markup=False, emoji=False)
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


def samples(head: FirstSamples) -> None:
    """Show the first samples, each with its values."""
    for row in head.to_dict()["rows"]:
        _pairs({name: _shown(value) for name, value in row.items()})
    for key, reason in head.rejections:
        console.print(f"rejected {key}: {reason}", style="yellow")
    left = f", {len(head.rejections)} rejected" if head.rejections else ""
    console.print(f"{counted(head.table.num_rows, 'sample')}{left}; nothing was written")


def _shown(value: Any) -> str:
    """A value in a line; of a long list, as of a feature, its first numbers and its length."""
    if isinstance(value, list) and len(value) > NUMBERS and isinstance(value[0], float):
        numbers = ", ".join(f"{number:.3g}" for number in value[:NUMBERS])
        return f"{len(value)} numbers: {numbers}, ..."
    return f"{value:.4g}" if isinstance(value, float) else fit(str(value), SHOWN)


def duration(seconds: float | None) -> str:
    """A text such as `2 h 05 min`, or `unknown`."""
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
    line = f"{counted(len(decided.shards), 'shard')}: {done:,} done, {len(decided.pending):,} to do"
    if decided.in_flight:
        line += f", {len(decided.in_flight):,} with live tasks"
    if given_up:
        attempts = decided.workload.config.max_attempts
        line += f", {given_up:,} given up after {counted(attempts, 'attempt')}"
        line += f" (--set max_attempts={attempts + 1})"
    console.print(line)
    for number, lacked in decided.gains():
        console.print(f"{counted(number, 'shard gains', 'shards gain')} {_gained(lacked)}")
    if decided.pending and decided.shard_seconds is not None:
        left = duration(len(decided.pending) * decided.shard_seconds)
        console.print(f"about {left} of work, by the shards that are done")
    notices(decided.notices)


def notices(told: Iterable[str]) -> None:
    for notice in told:
        console.print(f"note: {notice}", style="yellow")


def _gained(lacked: Config) -> str:
    """The columns, features and fields of a config, and the models for them."""
    kinds = {
        "columns": lacked.postprocess_columns,
        "features": lacked.postprocess_features,
        "fields": lacked.additional_fields,
        "derived columns": lacked.derive,
    }
    said = [f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names]
    if lacked.derive:
        return f"{'; '.join(said)} (of stored values)"
    models = f"models run: {', '.join(lacked.model_names) or 'none'}"
    return f"{'; '.join(said) or 'no column, feature or field'} ({models})"


def proposal(proposed: Proposal) -> None:
    """Print the tasks, arrays and sbatch options that a submit would use."""
    from d2m_hpc.launch.sbatch import flags

    most = counted(proposed.most, "shard")
    console.print(f"{counted(proposed.tasks, 'task')} of at most {most}")
    for array in proposed.arrays:
        line = f"array {array.name}: elements 0-{array.elements - 1}"
        line += f", {array.parallel} at once" if array.parallel else ""
        line += f", after array {array.after}" if array.after is not None else ""
        line += "".join(f", {kind}" for kind in (array.gres, array.constraint) if kind)
        console.print(line)
    console.print("sbatch", *flags(proposed.options))


def submitted(arrays: Sequence[Array]) -> None:
    for array in arrays:
        elements = counted(array.elements, "element")
        console.print(f"array {array.job_id}: {elements} ({array.name})")
    if arrays:
        console.print("`d2m status` shows how far it is")


def figures(found: Summary) -> dict[str, str]:
    """A run's figures by name, without rare ones that are 0."""
    tried = found.rows + found.rejected
    share = f" ({found.rejected / tried:.2%})" if found.rejected else ""
    is_known = found.eta_seconds is not None or found.state == "running"
    left = duration(found.eta_seconds) if is_known else IDLE
    counts = ("shards", "done", "failed", "pending", "running", "rows")
    limits, mean = found.limits, "" if found.working or not found.rows else ", mean"
    shares = {"waiting for samples": limits.wait_share, "GPUs busy": limits.gpu_busy_share}
    seldom = {
        "finished by an earlier config": found.outdated,
        "finished, and removed since": found.removed,
        "done, and not derived": found.underived,
        "given up": found.given_up,
        "run again in float32": found.recomputed,
    }
    return {
        **{name: f"{getattr(found, name):,}" for name in counts},
        "rejected samples": f"{found.rejected:,}{share}",
        f"samples a second{mean}": f"{found.samples_per_second:,.1f}",
        "time left": "none" if found.complete else left,
        **_costs(found),
        **{name: f"{share:.0%} of the time" for name, share in shares.items() if share is not None},
        **{name: f"{number:,}" for name, number in seldom.items() if number},
    }


def _costs(found: Summary) -> dict[str, str]:
    """Hours of GPUs, or of tasks without one, by what became of them; nothing below a minute."""
    if found.spent.hours < 1 / 60:
        return {}
    if not found.gpu_hours:
        return {"task hours": str(found.spent)}
    rate = f"{found.rows / found.gpu_hours:,.0f}"
    return {"GPU hours": str(found.spent), "samples a GPU hour": rate}


def ran_on(found: Summary) -> str:
    """A text such as `NVIDIA H100 80GB HBM3 (12 tasks), CPU (1 task)`."""
    return ", ".join(f"{model} ({counted(n, 'task')})" for model, n in found.hardware.items())


def summary(found: Summary) -> None:
    rows = {**figures(found), "outputs": found.output, "run folder": found.run_dir}
    if found.tasks:
        rows["array tasks"] = ", ".join(f"{n:,} {state}" for state, n in found.tasks.items())
    if found.rounds:
        follows = "; the next one submits what is left" if found.goes_on else ""
        rows["by itself"] = f"{found.rounds}{follows}"
    if found.hardware:
        rows["ran on"] = ran_on(found)
    _pairs(rows, found.state)
    console.print(ProgressBar(max(found.shards, 1), found.done, width=50))
    console.print()
    _counted(found)
    _remarks(found)
    if found.stragglers:
        console.print(f"slower than the others: {', '.join(found.stragglers)}", style="yellow")
    for node, why in found.broken_nodes.items():
        console.print(f"node {node} could not start tasks: {why}", style="red")
    for group in found.failures:
        names = ", ".join(group.shards[:5]) + (", ..." if len(group.shards) > 5 else "")
        head = f"failed {len(group.shards)} ({names}): {group.kind}: {group.error}"
        console.print(head, style="red")
        console.print(f"  log: {group.log}", style="red")


def _remarks(found: Summary) -> None:
    if found.limits.advice:
        console.print(found.limits.advice, style="yellow" if found.limits.starved else "dim")
    for path in found.odd:
        what = "is no regular file, but a folder, a pipe or a device; move it away"
        console.print(f"{path} {what}, and submit again", style="red")
    if found.changed:
        notices(found.changed.notices())
    for wait in found.waiting:
        console.print(str(wait), style="red" if wait.never else "yellow")
    for ended in found.ended:
        console.print(str(ended), style="red")
    if found.silent:
        console.print(silence(found.silent), style="yellow")
    if found.unasked:
        console.print(f"Slurm cannot be asked: {found.unasked}", style="yellow")


def _counted(found: Summary) -> None:
    for reason, number in found.rejections.items():
        console.print(f"rejected {number:,}: {reason}")
    for notice, number in found.notices.items():
        console.print(f"noted of {counted(number, 'shard')}: {notice}", style="dim")


def top(found: Summary, tasks: Sequence[TaskProgress]) -> None:
    """Print the tasks at work in as many lines as there are, slow ones first, and the totals."""
    tasks = [task for task in tasks if task.task not in found.lost]
    nodes = len({task.host for task in tasks})
    told = figures(found)
    shards = f"{told['done']} of {counted(found.shards, 'shard')}, {told['failed']} failed"
    working = f"{counted(len(tasks), 'task')} on {counted(nodes, 'node')}"
    if (starting := found.tasks.get("running", 0) - len(tasks) - len(found.silent)) > 0:
        working += f", {starting} starting"
    left = told["time left"] if told["time left"] == IDLE else f"time left {told['time left']}"
    rate = f"{found.samples_per_second:,.1f} samples/s, {left}" if tasks else left
    console.print(f"{found.state}: {shards}; {working}; {rate}")
    names = ("task", "node", "device", "shard", "shards", "rows", "rows/s", "waits", "GPU", "for")
    table = Table(*names)
    now = time.time()
    for task in sorted(tasks, key=lambda t: t.speed)[: max(console.height - LINES, 1)]:
        done = f"{task.done + task.failed}/{task.shards}"
        shares = ["" if s is None else f"{s:.0%}" for s in (task.wait_share, task.busy_share)]
        numbers = (done, f"{task.rows:,}", f"{task.speed:,.1f}", *shares)
        numbers += (duration(now - task.started),)
        table.add_row(task.lane, task.host, task.device, task.shard, *numbers)
    console.print(table)
    _remarks(found)


def watch(look: Callable[[], Summary], show: Callable[[Summary], None] = summary) -> None:
    """Print the summary again and again, until the run is over, or nobody works on it."""
    from d2m_hpc.launch.commands import wait_for_next_look

    began, idle = time.monotonic(), 0
    while True:
        found = look()
        console.clear()
        show(found)
        if found.state in ("complete", "failed"):
            return
        idle = 0 if found.is_alive else idle + 1
        if idle > 1:  # once may be between two tasks
            console.print("nobody works on it; `d2m-submit` goes on", style="yellow")
            return
        wait_for_next_look(began)


def report(found: Report) -> None:
    for fault in found.faults:
        console.print(f"{fault.file} {fault.what}", style="red")
    wrong = len({f.file for f in found.faults})
    checked = f"{counted(found.checked, 'shard')} checked"
    if found.checked < found.done:
        checked = f"checked {found.checked:,} of {found.done:,} shards, a random sample"
    console.print(f"{checked}, {counted(wrong, 'file')} wrong")
    if wrong:
        console.print("to compute a shard again, delete its parquet and run d2m-submit")
    notices(found.changed.notices())
    if found.unfinished:
        left = f"{found.unfinished:,} of {found.shards:,} shards are not finished"
        console.print(f"{left}; `d2m status` says why, and `d2m-submit` goes on", style="yellow")


OWN = "declared by a custom file, or the config"
"""Of checkpoints that are not published."""


def checkpoints(known: Sequence[Found]) -> None:
    """Print checkpoints' paths, sizes and sources."""
    table = Table("file or folder", "size", "published at", "sha256 or commit", show_edge=False)
    for item in known:
        need, state = item.need, item.state
        size = "missing" if state == "missing" else decimal(item.size)
        if isinstance(need, Checkpoint):
            whose = "an installed package" if "site-packages" in item.place.parts else OWN
            whose = need.url or whose
            table.add_row(str(item.place), size, whose, need.sha256[:12] or "not published")
        else:
            size = size if state == "missing" else f"{size}, {state}"
            where = f"{need.url} at {need.revision}"
            table.add_row(str(item.place), size, where, item.commit[:12] or "not fetched")
    console.print(table)


def checked(found: Sequence[Found], allow_unpublished: bool) -> None:
    """The state of each file, and of each repository with its files that are not right."""
    for item in found:
        if isinstance(item.need, Checkpoint):
            for file in item.files:
                _state(file, allow_unpublished)
            continue
        style = "green" if item.state == "present" else "yellow"
        at = f"{item.need.revision} is {item.commit[:12]}" if item.commit else item.need.revision
        files = counted(len(item.files), "file")
        told = f"{files}, {decimal(item.size)}, {at}" if item.size else at
        console.print(f"{item.state:8} {item.place} ({told})", style=style)
        for file in item.files:
            if file.state != "ok" and file.path != item.place:  # a folder that is not there
                _state(file, allow_unpublished)
    if not found:
        console.print("no checkpoint is needed")


def _state(item: Checked, allow_unpublished: bool) -> None:
    accepted = item.state != "ok" and item.is_usable(allow_unpublished)
    style = "green" if item.state == "ok" else "yellow" if accepted else "red"
    why = " (accepted: allow_unpublished_weights is true)" if accepted else ""
    console.print(f"{item.state:8} {item.path}{why}", style=style)


@contextmanager
def download(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar for one file, at a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        row = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)
