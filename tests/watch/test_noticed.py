"""What was noted of shards is told, grouped, counted, bounded and escaped."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import pytest
from kit import STATS, sample, write_config, write_tar

from d2m_hpc import cli


def test_notices_are_grouped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        members = {n: d for j in range(2) for n, d in sample(f"{i}{j}", j).items()}
        write_tar(tmp_path / "tars" / f"{i}.tar", {**members, f"._{i}0.jpg": b"x"})
    config = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=f"{tmp_path}/tars/*.tar",
        output_metadata_dir=f"{tmp_path}/out",
    )
    said = {}
    monkeypatch.chdir(tmp_path)
    for words in (
        ("submit", str(config), "--local"),
        ("status", str(config), "--json"),
        ("report", str(config), "-o", "r.html"),
    ):
        monkeypatch.setattr("sys.argv", ["d2m", *words])
        with pytest.raises(SystemExit):
            cli.main()
        said[words[0]] = capsys.readouterr().out
    [(notice, count)] = json.loads(said["status"])["notices"].items()
    assert count == 3
    assert "._" in notice
    assert f"noted of 3 shards: {notice}" in said["submit"]
    assert escape(notice) in (tmp_path / "r.html").read_text()
