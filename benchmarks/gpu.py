"""What a GPU makes of the six models, from its arithmetic's ceiling to tars turned into files.

    python -m benchmarks.gpu [--parts tests,graph,tar] [--seconds 5] [--json FILE]
    python -m benchmarks.gpu --tiny      # small nets, on whatever there is: to see that it runs

It needs no internet: the nets have the published sizes and random values. Each part runs in a
process of its own for its minutes at most, and each figure is in the file as soon as it is there.
TFLOP/s are of operations counted in the nets (two for a multiplication with its addition); `share`
is of the card's large half-precision matrix products, `of_roofline` of the least time that
arithmetic and memory of each operation take on it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import gpu_data
from benchmarks.gpu_parts import PARTS, ROOT, THREADS, Bench, Row
from benchmarks.gpu_roofline import Ceiling
from benchmarks.machine import Watch

SHOWN = {
    "samples_per_second": "samples/s",
    "tflops": "TFLOP/s",
    "share": "share",
    "of_roofline": "of roofline",
    "idle": "idle",
    "launches": "launches",
    "waits": "waits",
    "limit": "limit",
}


class Report:
    """The figures so far, in a file, for this process and those of the parts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._path.read_text())
        return found

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.read()["rows"]
        return rows

    def write(self, content: dict[str, Any]) -> None:
        fresh = self._path.with_name(f"{self._path.name}.new")
        fresh.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(fresh, self._path)

    def add(self, row: Row) -> None:
        content = self.read()
        self.write({**content, "rows": [*content["rows"], row]})

    def ceiling(self) -> Ceiling | None:
        for row in self.rows:
            if row["part"] == "device" and "tflops" in row:
                return Ceiling(row["tflops"] * 1e12, row["bandwidth_tb"] * 1e12)
        return None


def prepare(bench: Bench) -> None:
    """Checkpoints, and tars for the seconds: a first one to warm up, as many as a fast GPU does."""
    if (bench.folder / "tars").exists():
        return
    make = gpu_data.tiny_checkpoints if bench.tiny else gpu_data.full_checkpoints
    make(bench.folder / "checkpoints")
    samples = bench.batch_size * 2
    count = 2 if bench.tiny else max(THREADS[-1], round(2500 * bench.seconds / samples) + 1)
    gpu_data.tars(bench.folder / "tars", count, samples)


def run_here(parts: Sequence[str], bench: Bench, report: Report) -> None:
    """Run all in this process."""
    for part in parts:
        for row in PARTS[part][0](replace(bench, ceiling=report.ceiling())):
            report.add(row)


def run_parts(parts: Sequence[str], given: argparse.Namespace, report: Report) -> bool:
    """Run each in a process of its own; tell whether all of them ended well."""
    well = True
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
    for part in parts:
        own = ["--only", part, "--folder", str(given.folder), "--json", str(given.json)]
        minutes = PARTS[part][1]
        try:
            code = subprocess.run([*command, *own], cwd=ROOT, timeout=minutes * 60).returncode
            ended = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            ended = f"over its {minutes:g} minutes"
        if ended:
            well = False
            report.add({"part": part, "name": ended})
    return well


def table(found: Sequence[Row]) -> Table:
    shown = Table("part", "name", "mode", *SHOWN.values(), "more")
    for row in found:
        figures = [row.get(key, "") for key in SHOWN]
        named = {"part", "name", "mode", *SHOWN, "kernels", "waits"}
        more = {k: v for k, v in row.items() if k not in named}
        shown.add_row(
            row["part"],
            row["name"],
            row.get("mode", ""),
            *(f"{f:.4g}" if isinstance(f, float) else str(f) for f in figures),
            ", ".join(f"{k} {_short(v)}" for k, v in more.items()),
        )
    return shown


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    known = ",".join(name for name in PARTS if name != "device")
    parser.add_argument("--parts", default=known, help=f"some of {known}")
    parser.add_argument("--tiny", action="store_true", help="small nets, to see that it runs")
    parser.add_argument("--seconds", type=float, help="of each measurement (5; tiny: 0.2)")
    parser.add_argument("--batch-size", type=int, help="512; tiny: 4")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    parser.add_argument("--folder", type=Path, help="where checkpoints and tars are made and kept")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.parts = given.parts.split(",")
    if odd := [name for name in given.parts if name not in PARTS]:
        parser.error(f"there is no part {', '.join(odd)}; valid: {known}")
    return given


def main() -> int:
    given = parse()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not given.tiny:
        sys.exit("there is no CUDA device here; --tiny runs small nets on the CPU")
    with tempfile.TemporaryDirectory() as temporary:
        given.folder = (given.folder or Path(temporary)).resolve()
        given.json = (given.json or given.folder / "gpu.json").resolve()
        report = Report(given.json)
        bench = Bench(
            device=device,
            tiny=given.tiny,
            seconds=given.seconds or (0.2 if given.tiny else 5.0),
            batch_size=given.batch_size or (4 if given.tiny else 512),
            folder=given.folder,
        )
        if given.only:
            run_here([given.only], bench, report)
            return 0
        watch = Watch()
        report.write({**about(bench), "machine": watch.describe(), "rows": []})
        prepare(bench)
        parts, well = ["device", *given.parts], True
        if given.tiny:  # nets so small that imports would take longer
            run_here(parts, bench, report)
        else:
            well = run_parts(parts, given, report)
        report.write({**report.read(), "machine": watch.describe()})
        Console(width=200).print(table(report.rows))
    return 0 if well else 1


def about(bench: Bench) -> dict[str, Any]:
    return {
        "name": "gpu",
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "tiny": bench.tiny,
        "seconds": bench.seconds,
        "batch_size": bench.batch_size,
    }


if __name__ == "__main__":
    sys.exit(main())
