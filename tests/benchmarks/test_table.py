from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.table import BEGIN, END, README, RESULTS, load, render, rewrite

README_TEXT = f"# Title\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n"


def _ratio(name: str, median: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "title": f"title of {name}",
        "target": 4.5,
        "direction": "at least",
        "ratio": {"median": median, "min": median / 2, "max": median * 2},
        "met": median >= 4.5,
        "ours": [1.0],
        "baseline": [median],
        "machine": {"cpu": "a CPU", "cores": 2, "python": "3.12", "torch": "2.11", "others": 0.03},
        "date": "2026-01-02",
        **more,
    }


CONTROL = {
    "name": "control",
    "rows": [
        {"step": "status", "shards": 10_000, "seconds": 1.24, "peak_mb": 101.2},
        {"step": "status", "shards": 1_000_000, "seconds": 9.96, "peak_mb": 700.0},
    ],
    "flatness": {"status": 1.2},
    "limits": {"seconds": 15.0, "peak_mb": 1536.0, "flatness": 1.5},
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    bound = {"direction": "at most", "target": 1.3, "conventional": [5.0, 7.0]}
    for result in (
        _ratio("quick", 123.4),
        _ratio("slow", 3.0),
        _ratio("task", 6.0, ours_on_cpu=[1.0, 2.0, 9.0]),
        _ratio("bounded", 1.2, **bound),
        _ratio("loader", 2.0, baseline=[6.0], libraries_alone=[2.0, 9.0, 1.0]),
    ):
        (folder / f"{result['name']}.json").write_text(json.dumps(result))
    return folder


def test_every_row_is_in_the_table(results: Path) -> None:
    text = render(load(results))
    assert "| `quick` | title of quick | 123 (61.7 to 247) | at least 4.5 | yes |" in text
    assert "| `slow` | title of slow | 3.00 (1.50 to 6.00) | at least 4.5 | **no** |" in text
    assert "title of bounded (conventionally 5.00 to 7.00) | 1.20" in text
    assert "title of loader (3.00 if decoding and resizing were all there is) | 2.00" in text
    assert "title of task (ratio 3.00 with our normalising on the CPU)" in text
    assert "a CPU, 2 cores, Python 3.12, torch 2.11; 2026-01-02." in text
    assert "at most 0.03 cores" in text


def test_without_a_gpu_the_table_says_so(results: Path) -> None:
    assert "The GPU table is empty: none was at hand." in render(load(results))
    model = {"part": "model", "samples_per_second": 12.3456, "command": "python -m one"}
    rows = [model, {"part": "graph", "kernels": {"sgemm": 1.0}}]
    gpu = {"rows": rows, "command": "python -m all", "date": "2026-01-02"}
    (results / "gpu.json").write_text(json.dumps(gpu))
    text = render(load(results))
    assert "is empty" not in text
    assert "| part | samples/s |\n| --- | --- |\n| model | 12.35 |" in text
    assert "2026-01-02: `python -m all`; `python -m one`" in text


def test_control_is_shown_by_steps_and_sizes(results: Path) -> None:
    (results / "control.json").write_text(json.dumps(CONTROL))
    text = render(load(results))
    assert "| step | 10,000 shards | 1,000,000 shards | cost a shard, last over first |" in text
    assert "| status | 1.2 s, 101 MB | 10.0 s, 700 MB | 1.20 |" in text
    assert "Limits: 15 s and 1536 MB" in text


def test_rewriting_changes_what_stands_between_the_markers(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README_TEXT)
    rewrite(results, readme)
    written = readme.read_text()
    assert written.startswith(f"# Title\n\nbefore\n\n{BEGIN}\n")
    assert written.endswith(f"{END}\n\nafter\n")
    assert "`quick`" in written
    assert "old" not in written
    rewrite(results, readme)
    assert readme.read_text() == written


def test_the_plot_is_an_image_of_every_row(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README_TEXT)
    rewrite(results, readme)
    image = (results / "ratios.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    for path in results.glob("[st]*.json"):
        path.unlink()
    rewrite(results, readme)
    assert len((results / "ratios.png").read_bytes()) < len(image)


def test_the_readme_shows_what_the_results_say() -> None:
    """Fails when results change: `scripts/bench table` rewrites the table."""
    shown = README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    assert shown == render(load(RESULTS))
