"""The smallest row of the benchmark of whole processes; the other program is not installed here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks import whole


def test_our_side_of_the_smallest_row_is_measured(tmp_path: Path) -> None:
    ours = str(Path(sys.executable).with_name("d2m"))
    given = argparse.Namespace(folder=tmp_path, checkpoints=tmp_path / "weights", ours=ours)
    row = min(whole.ROWS.values(), key=lambda row: row.samples)
    assert row is whole.ROWS["start"]
    spent, memory = whole.Sides(row, given).run("ours")
    assert spent > 0
    assert 0.05 < memory < 4


def test_a_program_that_fails_is_told_with_its_words(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "raise SystemExit('no such luck')"]
    with pytest.raises(RuntimeError, match="no such luck"):
        whole.cpu(words, tmp_path)
