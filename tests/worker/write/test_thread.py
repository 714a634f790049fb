"""The writer thread hands its error to the task, whichever of the two comes first."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from kit import STATS, write_config

from d2m_hpc import config as configs
from d2m_hpc.errors import ShardError
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.records import Job, Record, Recorder, Shard
from d2m_hpc.worker.work import Work
from d2m_hpc.worker.write.table import Table
from d2m_hpc.worker.write.thread import Result, Settler
from d2m_hpc.worker.write.writer import Committer

UNUSED: Any = None
"""Claims and reports come after the record, which cannot be written here."""


def test_an_error_of_the_writer_ends_the_task_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    """A `put` that waits for room goes on; the error comes from a later one, and at the end."""
    values = {**STATS, "input_tars": "0.tar", "output_metadata_dir": str(tmp_path / "out")}
    config = configs.load(write_config(tmp_path / "c.yml", values))
    (tmp_path / "records").write_bytes(b"a file where the folder should be")
    recorder = Recorder(tmp_path / "records" / "000-0-0.jsonl")
    committer = Committer(OutputDir(str(tmp_path / "out")), tmp_path)
    work, error = Work(Job(Shard("0", "0.tar"))), ShardError("cut off")
    settler = Settler(committer, recorder, UNUSED, UNUSED)
    told = []

    def task() -> None:
        with settler:
            try:
                for _ in range(100_000):
                    settler.put(Result(work, Record("0", "done"), Table(config), error))
            except OSError as raised:
                told.append(raised)

    with pytest.raises(OSError, match="records") as left:
        task()
    assert told == [left.value]
    assert "writer" not in {thread.name for thread in threading.enumerate()}
