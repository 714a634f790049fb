"""Every row, tiny and once, as a user runs it. What it costs is never looked at."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks import reference
from benchmarks.__main__ import chosen

ROOT = Path(__file__).parents[2]
FACES = ("faces-sparse", "faces-crowded")
TEXT = ("text-clip-b32", "text-clip-l14", "text-xlm-roberta")
ROWS = (
    *("loader-one-tar", "loader-many-tars", "loader-exact", "loader-clip", "first-batch"),
    *("threads", *FACES, *TEXT, "writer", "task"),
    *("overlap-loader", "overlap-balanced", "overlap-device", "memory"),
)
KEYS = {
    *("name", "title", "target", "direction", "ratio", "met", "ours", "baseline", "unit"),
    *("against", "machine", "command", "date"),
}
MACHINE = {"cpu", "cores", "load_before", "load_after", "others", "python", "torch"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all rows."""
    made = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "benchmarks", "all", "--smoke"]
    command += ["--data", str(made / "data"), "--results", str(made / "results")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert all(name in ended.stdout for name in ("ratio", "at least 50", "at most 1.3"))
    return made / "results"


def _result(folder: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return result


def test_there_is_a_result_of_every_row(folder: Path) -> None:
    assert {path.stem for path in folder.iterdir()} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_all_of_its_figures(folder: Path, name: str) -> None:
    result = _result(folder, name)
    assert result.keys() >= KEYS
    assert result["machine"].keys() == MACHINE
    assert result["name"] == name
    assert "--smoke" in result["command"]
    figures = [*result["ours"], *result["baseline"], *result["ratio"].values()]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)


@pytest.mark.parametrize("name", ROWS)
def test_the_ratio_is_that_of_the_figures(folder: Path, name: str) -> None:
    result = _result(folder, name)
    pairs = list(zip(result["ours"], result["baseline"], strict=True))
    faster = result["direction"] == "at least"
    ratios = [theirs / ours if faster else ours / theirs for ours, theirs in pairs]
    expected = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
    assert result["ratio"] == pytest.approx(expected)
    over = result["ratio"]["median"] >= result["target"]
    under = result["ratio"]["median"] <= result["target"]
    assert result["met"] is (over if faster else under)


@pytest.mark.parametrize("name", TEXT)
def test_few_tokens_are_computed_in_vain(folder: Path, name: str) -> None:
    result = _result(folder, name)
    assert result["met"]
    assert min(result["conventional"]) > result["ratio"]["max"] >= 1


@pytest.mark.parametrize("name", FACES)
def test_faces_were_found_to_compare(folder: Path, name: str) -> None:
    assert _result(folder, name)["boxes"] > 10


def test_outputs_are_opened_by_the_writer_thread_only(folder: Path) -> None:
    opened = _result(folder, "writer")["files_opened_by_thread"]
    assert opened.keys() == {"writer"}
    assert opened["writer"] >= 8  # four shards' pairs


def test_an_unknown_row_is_named() -> None:
    with pytest.raises(SystemExit, match="no row 'laoder'; valid: loader-one-tar, "):
        chosen(["loader", "laoder"])
    assert [row.name for row in chosen(["text", "memory"])] == [*TEXT, "memory"]


def test_a_reference_program_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"\.venv/bin/python is missing"):
        reference.seconds(tmp_path, "loader", {}, 1)
