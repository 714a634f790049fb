"""A disk that takes nothing more ends a task in one line, and is held against no shard.

Disks are small ones in memory, which take root to mount.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from kit import STATS, d2m, submit, write_config, write_shards

from d2m_hpc import config as configs
from d2m_hpc.errors import DiskError, NodeError
from d2m_hpc.launch.flow import commit, submitting
from d2m_hpc.plan.decide import decide
from d2m_hpc.plan.standing import standings
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run.attempts import Attempt, Attempts
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.run.records import Record, Recorder, Shard, read_records
from d2m_hpc.run.tasks import Progress
from d2m_hpc.worker.progress import Listener
from d2m_hpc.worker.read.scratch import Scratch, scratch
from d2m_hpc.worker.read.stage import stage
from d2m_hpc.worker.task import run_task

SHARDS = 3


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB and 400 files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=400", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    package = logging.getLogger("d2m_hpc")
    before, level = list(package.handlers), package.level
    yield
    for handler in [h for h in package.handlers if h not in before]:
        package.removeHandler(handler)
    package.setLevel(level)


def _planned(folder: Path, **places: Any) -> RunDir:
    write_shards(folder / "tars", SHARDS, 4)
    common = {
        "input_tars": f"{folder}/tars/*.tar",
        "output_metadata_dir": f"{folder}/out",
        "run_dir": f"{folder}/run",
    }
    path = write_config(folder / "c.yml", {**STATS, **common, **places})
    workload = inspect(configs.load(path), str(path))
    with submitting(workload):
        commit(decide(workload), [decide(workload).pending])
    return workload.run


def _fill(disk: Path) -> None:
    with suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def _take_all_inodes(disk: Path) -> None:
    (disk / "many").mkdir()
    with suppress(OSError):
        for number in range(1000):
            (disk / "many" / str(number)).touch()


def _make_read_only(disk: Path) -> None:
    """Though files are open on it, as a disk in error does by itself."""
    done = subprocess.run(
        ["mount", "-o", "remount,ro", str(disk)], capture_output=True, check=False
    )
    if done.returncode:  # the log is open for writing
        pytest.skip("cannot be made read-only while files are open")


def _mend(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], capture_output=True, check=False)
    (disk / "filler").unlink(missing_ok=True)
    shutil.rmtree(disk / "many", ignore_errors=True)


class Once:
    """Does something when a task has computed its first rows."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action, self.done = action, False

    def __call__(self, progress: Progress) -> None:
        if progress.rows and not self.done:
            self.done = True
            self._action()


def _task(run: RunDir, listener: Listener) -> None:
    run_task(run.root, "000", 0, listener=listener)


FAULTS = {"full": _fill, "out of inodes": _take_all_inodes}


@pytest.mark.parametrize("fault", FAULTS)
def test_outputs_that_cannot_be_written_are_no_failure_of_a_shard(
    fault: str, disk: Path, tmp_path: Path
) -> None:
    run = _planned(tmp_path, output_metadata_dir=f"{disk}/out")
    with pytest.raises(DiskError, match=f"{disk}/out.*No space left.*make room") as ended:
        _task(run, Once(lambda: FAULTS[fault](disk)))
    assert "\n" not in str(ended.value)
    assert not [r for p in run.records.iterdir() for r in read_records(p) if r.state == "failed"]
    assert Attempts(run.attempts).unended() == {}
    assert list(run.leases.iterdir()) == []
    _mend(disk)
    _finishes(tmp_path, run)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_folder_that_takes_nothing_ends_the_task_and_fails_no_shard(
    fault: str, disk: Path, tmp_path: Path
) -> None:
    run = _planned(tmp_path, run_dir=f"{disk}/run")
    with pytest.raises((DiskError, OSError), match="No space left") as ended:
        _task(run, Once(lambda: FAULTS[fault](disk)))
    assert f"{disk}/run/" in str(ended.value)
    assert not [r for p in run.records.iterdir() for r in read_records(p) if r.state == "failed"]
    assert Attempts(run.attempts).unended() == {}
    assert list(run.leases.iterdir()) == []
    _mend(disk)
    _finishes(tmp_path, run)


def _finishes(folder: Path, run: RunDir) -> None:
    """The same command again does the rest, and no attempt was held against a shard."""
    again = submit(folder / "c.yml", "--set", "max_attempts=1")
    assert again.returncode == 0, again.stdout + again.stderr
    config = configs.load(run.config, frozen=True)
    assert len(standings(run, config, Manifest.load(run)).done) == SHARDS


def test_a_run_folder_that_is_removed_under_a_task_is_told_and_not_made_anew(
    tmp_path: Path,
) -> None:
    run = _planned(tmp_path)
    with pytest.raises((DiskError, OSError)) as ended:
        # At once: a removal file by file fails where the task's other thread claims a shard.
        _task(run, Once(lambda: shutil.rmtree(run.root.rename(tmp_path / "gone"))))
    assert f"{run.root}/" in str(ended.value)
    assert not run.leases.exists()


@pytest.mark.parametrize("fault", [*FAULTS, "read-only", "removed"])
def test_a_task_says_it_in_one_line(fault: str, disk: Path, tmp_path: Path) -> None:
    """As Slurm starts it; the log, which may lie on the full disk, is not needed for that."""
    run = _planned(tmp_path, run_dir=f"{disk}/run")
    if fault == "read-only":
        _make_read_only(disk)
    elif fault == "removed":
        shutil.rmtree(run.records)
    else:
        FAULTS[fault](disk)
    command = [sys.executable, "-P", "-u", "-m", "d2m_hpc.worker", str(run.root), "000", "0", "1"]
    environment = {**os.environ, "SLURM_JOB_END_TIME": "4e9"}
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    log = run.log_of("000", 0)
    told = ended.stdout + ended.stderr + (log.read_text() if log.exists() else "")
    assert ended.returncode == 2, told
    assert "Traceback" not in told
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, told
    assert all(f"{disk}/run" in line for line in errors), told


@pytest.mark.parametrize("fault", [*FAULTS, "read-only", "removed"])
def test_a_local_run_says_it_in_one_line(fault: str, disk: Path, tmp_path: Path) -> None:
    _planned(tmp_path, run_dir=f"{disk}/run", output_metadata_dir=f"{disk}/out")
    if fault == "read-only":
        _make_read_only(disk)
    elif fault == "removed":
        (disk / "run" / "records").rename(disk / "elsewhere")
        (disk / "run" / "records").write_bytes(b"")
    else:
        FAULTS[fault](disk)
    for ended in (submit(tmp_path / "c.yml"), d2m("status", tmp_path / "c.yml")):
        told = ended.stdout + ended.stderr
        assert "Traceback" not in told
        assert "unexpected" not in told
        if ended.returncode:
            assert ended.stderr.startswith("error: ")
            assert str(disk) in ended.stderr
            assert ended.returncode == 2


def test_a_limit_of_a_files_size_is_told_with_the_file(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as told:
            recorder.append(Record("a", "done"))
        with pytest.raises(OSError, match="File too large") as begun:
            Attempts(tmp_path).begin("a", Attempt(1), anew=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.value.filename == str(tmp_path / "r.jsonl")
    assert begun.value.filename == str(tmp_path / "a.json")


def test_no_record_is_lost_without_a_word(tmp_path: Path) -> None:
    """Not even where the folder of records is gone."""
    with pytest.raises(FileNotFoundError, match=r"gone/r\.jsonl"):
        Recorder(tmp_path / "gone" / "r.jsonl").append(Record("a", "done"))


def test_an_attempt_ends_on_a_full_disk(disk: Path) -> None:
    """What never ended would count as a failure of the shard."""
    attempts = Attempts(disk)
    attempts.begin("a", Attempt(7, "000-0-0", "host"), anew=True)
    _fill(disk)
    attempts.end("a", Attempt(7, "000-0-0", "host"))
    assert attempts.unended() == {}
    assert attempts.last("a") == Attempt(7, "000-0-0", "host", ended=True)


def test_a_node_whose_own_disk_is_full_is_to_blame_and_no_shard(disk: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1, 200)
    shard = Shard("00000", f"pipe:cat {tmp_path}/tars/00000.tar; sleep 0")
    _fill(disk)
    os.truncate(disk / "filler", os.path.getsize(disk / "filler") - 8192)
    with (
        pytest.raises(NodeError, match=rf"{disk}/00000\.tar.*No space left"),
        stage(shard, Scratch(disk, 10**9)),
    ):
        pass
    assert not (disk / "00000.tar").exists()


def test_a_node_without_any_place_for_copies_is_broken(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(disk))
    _take_all_inodes(disk)
    with pytest.raises(NodeError, match=rf"no room for copies.*{disk}.*TMPDIR"), scratch():
        pass


def test_a_temporary_folder_that_is_not_there_is_told_and_another_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with scratch() as room:
        assert room.folder.parent == tmp_path
    assert f"SLURM_TMPDIR is {tmp_path}/job, which is no folder here" in caplog.text
