"""The command line of the benchmarks.

python -m benchmarks [NAME ... | all | table | control | gpu] [--smoke] [--data DIR] ...
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.harness import REPETITIONS, Row, Setting, measure, save, show
from benchmarks.machine import load_warning
from benchmarks.table import README, RESULTS, rewrite

PROGRAMS = {
    "control": "plan, submit, status, resume and verify of up to a million shards",
    "gpu": "the six models on a GPU, alone and from tars to files",
}
"""Benchmarks with a command line of their own; what follows their name goes to them."""


def rows() -> dict[str, Row]:
    """All rows, in the table's order."""
    from benchmarks.rows import faces, loading, tasks, text, writing

    modules = (loading, faces, text, writing, tasks)
    return {row.name: row for module in modules for row in module.ROWS}


def chosen(names: Sequence[str]) -> list[Row]:
    """The rows of these names, or whose names begin with one and a dash.

    Raises:
        SystemExit: there is no such row.
    """
    known = rows()
    if names == ["all"]:
        return list(known.values())
    for name in names:
        if not any(_is_of(known_name, name) for known_name in known):
            valid = ", ".join([*known, *PROGRAMS, "all", "table"])
            raise SystemExit(f"there is no row {name!r}; valid: {valid}")
    return [row for row in known.values() if any(_is_of(row.name, name) for name in names)]


def _is_of(row: str, name: str) -> bool:
    return row == name or row.startswith(f"{name}-")


def list_rows(console: Console) -> None:
    for row in rows().values():
        goal = f"{row.direction} {row.target:g}"
        console.print(f"  {row.name:18} {row.title} [{goal}]", markup=False, soft_wrap=True)
    for name, what in PROGRAMS.items():
        console.print(f"  {name:18} {what}", soft_wrap=True)
    console.print("all, table (rewrites the README's table and the plot), --help for more")


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure the rows asked for, one after the other."""
    if doubt := load_warning():
        console.print(f"[bold red]{doubt}")
    command = shlex.join(["scripts/bench", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="d2m-bench-") as made:
        setting = Setting(
            options.data or Path(made),
            options.workers,
            options.reference,
            options.smoke,
            options.repetitions,
        )
        for row in chosen(options.names):
            result = measure(row, setting, command)
            show(result, console)
            save(result, options.results)


def program(name: str, arguments: Sequence[str]) -> int:
    """Run a benchmark that stands alone; by default it writes its JSON beside the others'."""
    given = list(arguments) or ["--json", str(RESULTS / f"{name}.json")]
    command = [sys.executable, "-m", f"benchmarks.{name}", *given]
    return subprocess.run(command, cwd=Path(__file__).parents[1]).returncode


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a row, or all, or table")
    parser.add_argument("--smoke", action="store_true", help="tiny and once, to see that it runs")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--workers", type=int, default=2, help="threads and processes (2)")
    parser.add_argument("--data", type=Path, help="where tars are made and kept")
    parser.add_argument("--reference", type=Path, help="a checkout to run in the baseline's place")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--readme", type=Path, default=README, help="whose table is rewritten")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in PROGRAMS:
        return program(arguments[0], arguments[1:])
    options, console = parse(arguments), Console(width=100)
    if options.names == ["table"]:
        rewrite(options.results, options.readme)
    elif options.names:
        run(options, console)
    else:
        list_rows(console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
