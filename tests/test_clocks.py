"""Tasks whose machines' clocks are wrong, jump, or stand still, beside others in one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from kit import custom_config, custom_file, d2m, submit, write_shards

from d2m_hpc.run.attempts import Attempts
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import read_records

SHIFTED = """
import os, time

def shifted(real=time.time, path=os.environ["WRONG_CLOCK"]):
    return real() + os.stat(path).st_mtime - 1e6

time.time, time.time_ns = shifted, lambda: int(shifted() * 1e9)
"""
"""Read by Python at its start; the clock is wrong by what a file's time tells, at any moment.

Nothing that a task does asks `datetime`, whose class C code of libraries wants to be Python's own.
"""
LEASE = 3.0


def slow_config(folder: Path, first: str, shards: int, **more: Any) -> Path:
    """A run of which the first shard does something before it goes on."""
    write_shards(folder / "tars", shards)
    code = custom_file("slow", before=f'import os, time\nif "caption 0" in texts:\n    {first}')
    values = {"models": ["text-stats", "slow"], "postprocess_features": [], **more}
    return custom_config(folder, code, "slow", **values)


def clock(folder: Path, index: int, seconds: float) -> dict[str, str]:
    """The environment of a process whose clock is wrong by so much."""
    path = folder / f"site{index}" / "sitecustomize.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(SHIFTED)
    os.utime(path, (1e6 + seconds, 1e6 + seconds))
    return {"PYTHONPATH": str(path.parent), "WRONG_CLOCK": str(path)}


def tasks(folder: Path, submission: str, *clocks: float) -> list[int]:
    """The exit codes of array tasks that run beside each other under these clocks."""
    run, started = RunDir(folder / "out" / ".d2m"), []
    for index, seconds in enumerate(clocks):
        command = [sys.executable, "-P", "-m", "d2m_hpc.worker", str(run.root), submission, "0"]
        environment = {**os.environ, **clock(folder, index, seconds)}
        environment["SLURM_ARRAY_TASK_ID"] = str(index)
        environment["SLURM_JOB_END_TIME"] = str(time.time() + 7200)
        started.append(subprocess.Popen([*command, "1"], env=environment))
    return [process.wait(300) for process in started]


def records(folder: Path) -> Counter[tuple[str, str]]:
    run = RunDir(folder / "out" / ".d2m")
    found = [r for path in run.records.iterdir() for r in read_records(path)]
    return Counter((r.shard, r.state) for r in found)


def test_clocks_that_differ_and_jump_double_nothing_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the config gains a column under other clocks, and a lease is held in a jump."""
    # No Slurm: one that is here, and may be down, would be asked for the tasks of each submit.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    jump = f"os.utime(os.environ['WRONG_CLOCK'], (1e6 + 3600, 1e6 + 3600)); time.sleep({2 * LEASE})"
    more = {"lease_seconds": LEASE, "shards_per_task": 2}
    config = slow_config(tmp_path, jump, 4, **more)
    submitted = d2m("submit", config, "--no-sbatch", "--no-preflight")
    assert submitted.returncode == 0, submitted.stderr
    assert tasks(tmp_path, "000", -900.0, 600.0) == [0, 0]
    stems = [f"{i:05d}" for i in range(4)]
    assert records(tmp_path) == {(stem, "done"): 1 for stem in stems}
    run = RunDir(tmp_path / "out" / ".d2m")
    assert "took it over" not in "".join(p.read_text() for p in run.logs.glob("*.log"))

    grown = ["slow-length", "text-words"]
    slow_config(tmp_path, jump, 4, **more, postprocess_columns=grown)
    assert d2m("submit", config, "--no-sbatch", "--no-preflight").returncode == 0
    assert tasks(tmp_path, "001", 1200.0, -1800.0) == [0, 0]
    told = json.loads(d2m("status", config, "--json").stdout)
    assert (told["done"], told["pending"], told["failed"], told["running"]) == (4, 0, 0, 0)
    assert records(tmp_path) == {(stem, "done"): 2 for stem in stems}
    for stem in stems:
        names = pq.read_schema(tmp_path / "out" / f"{stem}.parquet").names
        assert set(grown) <= set(names)
    assert list(run.leases.iterdir()) == []
    assert Attempts(run.attempts).unended() == {}
    assert submit(config).returncode == 0
    assert sum(records(tmp_path).values()) == 8


def test_a_task_that_is_suspended_for_longer_than_a_stall_goes_on(tmp_path: Path) -> None:
    """It is silent for longer than both who watch look once before, and for a while after that."""
    stall = 6.0
    begun = tmp_path / "begun"
    first = f"time.sleep(1.8); open({str(begun)!r}, 'w').close(); "
    first += "[time.sleep(0.1) for _ in range(6)]"
    config = slow_config(tmp_path, first, 2, stall_seconds=stall, lease_seconds=LEASE)
    command = [str(Path(sys.executable).with_name("d2m")), "submit", str(config), "--local"]
    task = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        while not begun.exists():
            assert task.poll() is None
            time.sleep(0.05)
        os.killpg(task.pid, signal.SIGSTOP)
        time.sleep(2 * stall + 1)  # past the limits of both who watch
        os.killpg(task.pid, signal.SIGCONT)
        said = task.communicate(timeout=300)[1]
    finally:
        if task.poll() is None:
            os.killpg(task.pid, signal.SIGKILL)
    assert task.returncode == 0, said
    assert records(tmp_path) == {("00000", "done"): 1, ("00001", "done"): 1}
