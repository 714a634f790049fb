"""The benchmark of exports runs, and tells a line for each; never how fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_exports_are_measured_beside_a_copy_and_nothing_is_left(tmp_path: Path) -> None:
    words = ["--shards", "3", "--rows", "20", "--times", "1", "--folder", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.exports", *words, "hf", "img2dataset"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    head, rule, *rows = ended.stdout.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["`hf`", "`img2dataset`"]
    assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_export_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.exports", "hff"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "found hff; valid: npy" in ended.stderr
