"""Claims between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from d2m_hpc.storage.lease import Lease, _duration, held

HOLDER = """
import sys
from pathlib import Path
from d2m_hpc.storage.lease import Lease

lease = Lease(Path(sys.argv[1]))
print(lease.claim(), flush=True)
sys.stdin.readline()
lease.release()
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed the shard until it reads a line or dies."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "True\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def path(awkward_path: Path) -> Path:
    return awkward_path / "00000.lock"


def test_one_object_claims_and_another_must_wait(path: Path) -> None:
    first, second = Lease(path), Lease(path)
    assert first.claim()
    assert not second.claim()
    first.release()
    assert second.claim()
    second.release()


def test_release_leaves_no_file(path: Path) -> None:
    lease = Lease(path)
    assert lease.claim()
    assert path.exists()
    assert not lease.lost
    lease.release()
    assert list(path.parent.iterdir()) == []
    lease.release()


def test_a_folder_that_is_gone_is_told_and_not_made_anew(path: Path) -> None:
    gone = path.parent / "gone" / path.name
    with pytest.raises(FileNotFoundError, match="gone"):
        Lease(gone).claim()
    assert not gone.parent.exists()


def test_shards_are_claimed_apart(path: Path) -> None:
    leases = [Lease(path.with_name(f"{i}.lock")) for i in range(3)]
    assert all(lease.claim() for lease in leases)
    for lease in leases:
        lease.release()


def test_a_live_process_keeps_its_shard_and_lets_go_of_it(path: Path) -> None:
    lease = Lease(path)
    with holder(path) as process:
        assert not lease.claim()
        assert not lease.claim()
        process.communicate("done\n")
        assert process.returncode == 0
        assert lease.claim()
    lease.release()
    assert list(path.parent.iterdir()) == []


def test_a_killed_process_of_this_host_loses_its_shard_at_once(path: Path) -> None:
    lease = Lease(path)
    with holder(path) as process:
        assert not lease.claim()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert path.exists()
        assert lease.claim()
    lease.release()
    assert list(path.parent.iterdir()) == []


def test_of_two_processes_one_gets_what_a_dead_one_left(path: Path) -> None:
    with holder(path) as process:
        process.kill()
        process.wait()
    with holder(path):
        assert not Lease(path).claim()


def test_a_lease_file_is_not_world_writable(path: Path) -> None:
    old = os.umask(0)
    lease = Lease(path)
    try:
        assert lease.claim()
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o002 == 0
    lease.release()


def lost_holder(path: Path, seconds: float) -> None:
    """What a holder on a machine that is gone leaves."""
    path.write_text(
        f"filelock/2\npid=77\nhost=gone\nmode=lease\ntoken={'0f' * 16}\nduration={seconds}\n"
    )


@pytest.mark.parametrize("before", [0.5, 1e-1, 2.0])
def test_a_lease_of_another_length_is_taken_over_when_its_own_time_is_up(
    path: Path, before: float
) -> None:
    lost_holder(path, before)
    lease, began = Lease(path, 60.0), time.monotonic()
    while not lease.claim():
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    assert time.monotonic() - began >= before
    lease.release()


def test_a_live_lease_of_another_length_is_kept(path: Path) -> None:
    holder, other = Lease(path, 1.5), Lease(path, 0.3)
    assert holder.claim()
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        assert not other.claim()
        time.sleep(0.1)
    holder.release()
    assert other.claim()
    other.release()


def test_whoever_stood_still_has_not_watched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tasks of a suspended job, of which one wakes before the other."""
    frozen = [0.0]
    monkeypatch.setattr("d2m_hpc.storage.lease.frozen_seconds", lambda: frozen[0])
    lost_holder(path, 0.5)
    lease = Lease(path, 0.5)
    assert not lease.claim()
    time.sleep(0.6)
    frozen[0] = 0.6
    assert not lease.claim()
    time.sleep(0.6)
    assert lease.claim()
    lease.release()


# --- asked once, by a command ---


@contextmanager
def closing_thread(target: Callable[[], None], over: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=target)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def aged(path: Path, seconds: float) -> None:
    """As if its last heartbeat had come so long ago, by the clock of the disk."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_what_a_lost_machine_left_is_watched_once_for_all_and_dropped(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = [path.with_name(f"{i}.lock") for i in range(3)]
    for each in left:
        lost_holder(each, 0.6)
        aged(each, 3600)
    began = time.monotonic()
    assert held([*left, path.with_name("none.lock")]) == set()
    assert 0.6 <= time.monotonic() - began < 1.7
    assert list(path.parent.iterdir()) == []
    told = capsys.readouterr().err
    assert told == (
        "note: 3 claims of other machines give no sign of life (0.lock, 1.lock, 2.lock); watching "
        "them for 1 s\n"
    )


def test_a_claim_with_a_recent_sign_of_life_is_held_and_costs_no_wait(path: Path) -> None:
    lost_holder(path, 60.0)
    began = time.monotonic()
    assert held([path]) == {path}
    assert time.monotonic() - began < 5
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_that_a_kill_left_without_a_name_is_nobodys(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between its making and its first byte."""
    path.touch()
    assert held([path]) == set()
    assert list(path.parent.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_name_that_comes_a_moment_later_is_a_live_ones(path: Path) -> None:
    path.touch()
    writer = threading.Timer(0.5, lost_holder, (path, 60.0))
    writer.start()
    assert held([path]) == {path}
    writer.join()
    assert b"host=gone" in path.read_bytes()


def test_whoever_stood_still_before_its_name_was_written_has_no_claim(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Lease(path), Lease(path)
    write = first._lock._write_lock_info

    def stand_still(fd: int) -> None:
        while not second.claim():
            time.sleep(0.1)
        write(fd)

    monkeypatch.setattr(first._lock, "_write_lock_info", stand_still)
    assert not first.claim()
    assert first.lost
    assert not second.lost
    second.release()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("skew", [-7200, 7200])
def test_a_live_claim_is_never_taken_whatever_the_clock_of_its_node(path: Path, skew: int) -> None:
    """Some filesystems take the time of a file from the node that writes it."""
    lost_holder(path, 1.0)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.3):
            aged(path, -skew)

    aged(path, -skew)
    with closing_thread(beat, over):
        assert held([path]) == {path}
    assert path.exists()


SUSPENDED = """
import sys, time
from d2m_hpc.storage.suspension import Awake, frozen_seconds
with Awake():
    print(frozen_seconds(), flush=True)
    sys.stdin.readline()
    time.sleep(1.5)
    print(frozen_seconds(), flush=True)
"""


def test_a_process_knows_how_long_it_was_stopped() -> None:
    command = [sys.executable, "-c", SUSPENDED]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0.0\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(7)
        process.send_signal(signal.SIGCONT)
        said = process.communicate("go on\n")[0]
    assert float(said) > 5


def test_a_lease_that_another_took_over_meanwhile_is_put_back(path: Path) -> None:
    """Between a look at a dead holder's file and its removal."""
    first = Lease(path)
    assert first.claim()
    assert not Lease(path)._set_aside(b"what a dead holder had left")
    assert not first.lost
    first.release()
    assert list(path.parent.iterdir()) == []


def test_a_lease_file_of_any_size_is_read_in_part(path: Path) -> None:
    """What a broken disk or another program leaves is watched and taken over like any other."""
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # read whole, it would end this process
    lease = Lease(path, 0.2)
    assert not lease.claim()
    time.sleep(0.3)
    assert lease.claim()
    assert not lease.lost
    lease.release()
    path.write_bytes(b"x" * 2000 + b"\nduration=7.0\n")
    os.truncate(path, 1 << 40)
    assert not Lease(path).claim()
    assert _duration(path) == 7.0
