"""A task's own disk space: bounded, and swept after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from d2m_hpc.errors import ShardError
from d2m_hpc.worker.read.scratch import Scratch, scratch

HOLD = """
import sys, tempfile, time
from d2m_hpc.worker.read.scratch import scratch
with scratch() as room:
    (room.folder / "a.tar").write_bytes(b"x" * 1000)
    print(room.folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a site's Slurm gives a job as its own folder."""
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    return tmp_path


def holder() -> subprocess.Popen[str]:
    """Another task on this node, with something in its scratch."""
    command = [sys.executable, "-c", HOLD]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def folder_of(process: subprocess.Popen[str]) -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def test_it_is_gone_when_the_task_ends_whatever_lies_there(disk: Path) -> None:
    room = scratch()
    folder = room.__enter__().folder
    (folder / "sub").mkdir()
    (folder / "sub" / "f").write_text("x")
    assert list(disk.iterdir()) == [folder]
    assert not room.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert list(disk.iterdir()) == []


def test_what_a_killed_task_left_is_removed_and_what_a_live_one_has_is_not(disk: Path) -> None:
    with holder() as dead, holder() as live:
        left, kept = folder_of(dead), folder_of(live)
        dead.kill()
        assert dead.wait() == -signal.SIGKILL
        with scratch() as room:
            assert set(disk.iterdir()) == {kept, room.folder}
            assert (kept / "a.tar").stat().st_size == 1000
        assert not left.exists()


def test_what_others_have_in_the_same_place_is_left_alone(disk: Path) -> None:
    names = ["other", "d2m-another-host-abc", f"d2m-{os.uname().nodename}-file"]
    (disk / names[0]).mkdir()
    (disk / names[1]).mkdir()
    (disk / names[2]).write_text("not a folder")
    with scratch():
        assert {p.name for p in disk.iterdir()} > set(names)


def test_tasks_that_begin_at_once_do_not_sweep_each_other(disk: Path) -> None:
    """Between its making and its lock, a folder looks like one that was left."""
    wrong: list[Path] = []
    start = threading.Barrier(8)

    def begin() -> None:
        start.wait()
        for _ in range(50):
            with scratch(limit=1) as room:
                wrong.extend([] if room.folder.is_dir() else [room.folder])

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert list(disk.iterdir()) == []


def test_the_default_is_a_share_of_what_is_free(disk: Path) -> None:
    with scratch(sharers=4) as room:
        assert room.limit == pytest.approx(shutil.disk_usage(disk).free / 8, rel=0.1)
    with scratch(limit=10, sharers=4) as room:
        assert room.limit == 10


def test_a_copy_that_can_never_fit_is_an_error(tmp_path: Path) -> None:
    with (
        Scratch(tmp_path, 100).copy("a.tar") as copy,
        pytest.raises(ShardError, match=r"a\.tar has 101 bytes or more.*scratch_bytes"),
    ):
        copy.reserve(101)


def test_a_copy_waits_for_the_room_that_another_has(tmp_path: Path) -> None:
    room = Scratch(tmp_path, 100)
    fits = threading.Event()

    def second() -> None:
        with room.copy("b.tar") as copy:
            copy.reserve(30)
            copy.reserve(60)
            fits.set()

    thread = threading.Thread(target=second)
    with room.copy("a.tar") as first:
        first.reserve(60)
        thread.start()
        assert not fits.wait(0.2)
    assert fits.wait(10)
    thread.join()
    with room.copy("c.tar") as third:
        third.reserve(100)
