"""Shell lines in place of Slurm's commands, for answers that a real one rarely gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kit import STATS, write_config, write_shards


def commands_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Put commands before the machine's own."""
    folder.mkdir(exist_ok=True)
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    path = os.environ["PATH"]
    if not path.startswith(f"{folder}:"):
        monkeypatch.setenv("PATH", f"{folder}:{path}")


def six_tasks(folder: Path, **more: object) -> Path:
    """A config of six tars, each a task of its own."""
    write_shards(folder / "tars", 6)
    places = {"input_tars": f"{folder}/tars/*.tar", "output_metadata_dir": f"{folder}/out"}
    return write_config(folder / "c.yml", STATS, **places, shards_per_task=1, **more)
