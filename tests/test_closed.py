"""Commands whose standard streams are closed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kit import STATS, write_config, write_shards


@pytest.mark.parametrize("closed", ["<&- >&-", "2>&-", "<&- >&- 2>&-"])
def test_a_run_needs_no_open_streams(closed: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1, samples=2)
    config = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=str(tmp_path / "tars"),
        output_metadata_dir=str(tmp_path / "out"),
    )
    command = f"exec {Path(sys.executable).with_name('d2m')} submit {config} --local {closed}"
    ended = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert b"error" not in ended.stdout + ended.stderr
    assert (tmp_path / "out" / "00000.parquet").is_file()
