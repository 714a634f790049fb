"""What planning, submitting, resuming and looking cost, at up to a million shards.

    python -m benchmarks.control [--shards N ...] [--json FILE] [--scratch FOLDER] [--lives N]

Each step is a command in a process of its own, as a user types it; its wall and CPU seconds and its
peak memory are what the kernel says of it (`wait4`). The state is what tasks leave: tars of many
sizes (sparse) in ten folders, found by a glob and of colliding names; then half of them done, 16
shards a task, with a file of records and one of progress of each task, and a pair of outputs of
each shard (hard links to a real pair, which `verify` finds right).

A command starts with about a second of imports. That share, which the same step takes in a run of
32 shards, is taken off before the cost a shard is computed, from the CPU seconds. `flatness` is the
cost a shard at the largest size over that at the smallest; null where less than 0.05 s are left of
either, too little to tell. Runs of up to 10,000 shards are made several times, and each step's
cheapest counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import Watch

LIMITS = {"seconds": 15.0, "peak_mb": 1536.0, "flatness": 1.5}
SIZES = [10_000, 100_000, 1_000_000]
FIXED = 32
"""Shards of the run by which the cost of starting is measured."""
LEAST_SECONDS = 0.05
FEW = 10_000
BIN = Path(sys.executable).parent
STATE = Path(__file__).with_name("run_state.py")
READ_CHUNK = """
import sys
from pathlib import Path
from d2m_hpc.run.chunks import Chunks
from d2m_hpc.run.folder import RunDir
chunks = Chunks(RunDir(Path(sys.argv[1])).submission("000"))
[own] = chunks.read([len(chunks) // 2])
assert own
"""


@dataclass
class Row:
    """One step at one size; `us_per_shard` is microseconds of CPU time, without the start's."""

    step: str
    shards: int
    seconds: float
    cpu_seconds: float
    peak_mb: float
    us_per_shard: float = 0.0


def make_state(*words: object) -> None:
    subprocess.run([sys.executable, str(STATE), *map(str, words)], check=True)


def measure(step: str, shards: int, command: Sequence[str], folder: Path) -> Row:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed, with its words.
    """
    environment = {**os.environ, "PATH": str(BIN)}  # Slurm's answers are not what is measured
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{shlex.join(command)}: {said.read().decode()[-2000:]}")
    return Row(step, shards, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def steps(folder: Path, shards: int) -> Iterator[Row]:
    """All of a run's life, in order: the later steps find what the earlier ones left."""

    def d2m(step: str, *words: str) -> Row:
        return measure(step, shards, [str(BIN / "d2m"), *words], folder)

    yield d2m("plan", "plan", "c.yml")
    yield d2m("plan of URLs", "plan", "urls.yml")
    yield d2m("submit", "submit", "c.yml", "--no-sbatch")
    make_state(folder)
    yield d2m("status", "status", "c.yml")
    yield d2m("resume", "submit", "c.yml", "--dry-run")
    yield d2m("verify --sample 20", "verify", "c.yml", "--sample", "20", "--partial")
    yield measure("task", shards, [sys.executable, "-c", READ_CHUNK, "c/.d2m"], folder)
    yield d2m("resubmit, merging", "submit", "c.yml", "--no-sbatch")
    yield d2m("status, merged", "status", "c.yml")
    yield d2m("resubmit, merged", "submit", "c.yml", "--no-sbatch")


def live(shards: int, scratch: Path | None) -> list[Row]:
    """Every step of one run; its state is removed."""
    with tempfile.TemporaryDirectory(prefix="d2m-control-", dir=scratch) as folder:
        make_state(folder, shards)
        return list(steps(Path(folder), shards))


def run_all(
    sizes: Iterable[int], few_lives: int, scratch: Path | None, console: Console
) -> list[Row]:
    """Every step at every size."""
    start: dict[str, float] = {}
    rows = []
    for shards in (FIXED, *sorted(sizes)):
        console.print(f"{shards:,} shards", style="dim")
        lives = [live(shards, scratch) for _ in range(few_lives if shards <= FEW else 1)]
        for same_step in zip(*lives, strict=True):
            row = min(same_step, key=lambda row: row.cpu_seconds)
            net = row.cpu_seconds - start.setdefault(row.step, row.cpu_seconds)
            row.us_per_shard = round(max(0.0, net) / shards * 1e6, 2)
            rows.append(row)
    return rows


def flatness(rows: Sequence[Row]) -> dict[str, float | None]:
    """By step, the cost a shard at the largest size over that at the smallest."""
    found: dict[str, float | None] = {}
    for step in dict.fromkeys(row.step for row in rows):
        _, least, *_, most = [r for r in rows if r.step == step] * 2
        enough = min(r.us_per_shard * r.shards for r in (least, most)) >= LEAST_SECONDS * 1e6
        found[step] = round(most.us_per_shard / least.us_per_shard, 2) if enough else None
    return found


def show(rows: Sequence[Row], flat: dict[str, float | None], console: Console) -> None:
    table = Table("step", "shards", "seconds", "CPU seconds", "MB", "us a shard", "flatness")
    for step, ratio in flat.items():
        own = [row for row in rows if row.step == step]
        for row in own:
            figures = f"{row.seconds:.2f} {row.cpu_seconds:.2f} {row.peak_mb:.0f}".split()
            last = str(ratio or "") if row is own[-1] else ""
            table.add_row(step, f"{row.shards:,}", *figures, f"{row.us_per_shard:.1f}", last)
        table.add_section()
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="+", default=SIZES)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--scratch", type=Path, help="where the state is made; it is removed")
    parser.add_argument("--lives", type=int, default=5, help="runs of up to 10,000 shards")
    asked = parser.parse_args()
    console, watch = Console(stderr=True), Watch()
    rows = run_all(asked.shards, asked.lives, asked.scratch, console)
    flat = flatness(rows)
    show(rows, flat, Console())
    if asked.json:
        figures = {
            "name": "control",
            "command": shlex.join(["python", "-m", "benchmarks.control", *sys.argv[1:]]),
            "machine": watch.describe(),
            "rows": [asdict(row) for row in rows],
            "flatness": flat,
            "limits": LIMITS,
        }
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
