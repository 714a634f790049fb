"""The benchmark of the control plane runs, and says what it must; never how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARDS = 300
STEPS = {
    "plan",
    "plan of URLs",
    "submit",
    "status",
    "resume",
    "verify --sample 20",
    "task",
    "resubmit, merging",
    "status, merged",
    "resubmit, merged",
}


def test_every_step_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    scratch, figures = tmp_path / "scratch", tmp_path / "control.json"
    scratch.mkdir()
    words = [
        "--lives",
        "1",
        "--shards",
        str(SHARDS),
        "--scratch",
        str(scratch),
        "--json",
        str(figures),
    ]
    command = [sys.executable, "-m", "benchmarks.control", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert list(scratch.iterdir()) == []
    told = json.loads(figures.read_text())
    assert told.keys() == {"name", "command", "machine", "rows", "flatness", "limits"}
    assert (told["name"], told["flatness"].keys()) == ("control", STEPS)
    rows = [row for row in told["rows"] if row["shards"] == SHARDS]
    assert {row["step"] for row in rows} == STEPS
    assert len(told["rows"]) == 2 * len(rows) == 2 * len(STEPS)
    for row in rows:
        assert row["seconds"] > 0 < row["cpu_seconds"]
        assert 5 < row["peak_mb"] < 1000
        assert row["us_per_shard"] >= 0
    assert all(step in ended.stdout for step in ("plan", "status", "task"))
