"""Models that take their process down, in real runs: what becomes of the shards."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from kit import STATS, custom_config, custom_file, d2m, submit, write_config, write_shards

from d2m_hpc.run.attempts import Attempts
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.run.records import DIED, Record, read_records
from d2m_hpc.worker import death
from d2m_hpc.worker.board import Board, Entry, Scene
from d2m_hpc.worker.cores import OF_SLURM, cores
from d2m_hpc.worker.death import memory_limit, oom_kills

FATAL = """
import ctypes, os, signal, sys, threading, time
for text in texts:
    shard, sample = divmod(int(text.split()[-1]), 1000)
    if sample == 3 and shard in {shards!r}:
        exec({how!r})
"""


def fatal(how: str, shards: set[int]) -> str:
    """A custom file that runs a statement at the fourth sample of some shards."""
    return custom_file("fatal", before=FATAL.format(how=how, shards=shards))


def fatal_config(folder: Path, how: str, shards: set[int], count: int = 5, **more: Any) -> Path:
    write_shards(folder / "tars", count)
    return custom_config(folder, fatal(how, shards), "fatal", **more)


def records(folder: Path) -> list[Record]:
    run = RunDir(folder / "out" / ".d2m")
    return [r for path in sorted(run.records.iterdir()) for r in read_records(path)]


def done(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "out").glob("*.parquet")}


def test_a_crash_is_counted_at_once_and_costs_no_other_shard(tmp_path: Path) -> None:
    """And it is given up after max_attempts, by numbers that only grow."""
    config = fatal_config(tmp_path, "ctypes.string_at(8)", {1, 3}, max_attempts=2)
    ended = submit(config)
    assert ended.returncode == 1
    assert "SIGSEGV" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert done(tmp_path) == {"00000", "00002", "00004"}
    submit(config)
    failures = Manifest.load(RunDir(tmp_path / "out" / ".d2m")).failures
    assert failures.keys() == {"00001", "00003"}
    for failed in failures.values():
        numbers = [f.attempt for f in failed]
        assert len(failed) >= 2
        assert numbers == sorted(set(numbers))
        assert {f.kind for f in failed} == {DIED}
        assert "was killed by SIGSEGV" in failed[-1].error
    last = submit(config)
    assert "2 given up" in last.stdout
    assert last.returncode == 1
    assert list((tmp_path / "out" / ".d2m" / "leases").iterdir()) == []


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("os._exit(0)", "was ended with exit code 0 by the code it ran"),
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("ctypes.PyDLL(None).sleep(1000)", "stalled: nothing happened for"),
    ],
)
def test_how_a_process_ended_is_on_record(tmp_path: Path, how: str, said: str) -> None:
    config = fatal_config(tmp_path, how, {1}, count=2, stall_seconds=4)
    assert submit(config).returncode == 1
    assert done(tmp_path) == {"00000"}
    assert all(said in r.error for r in records(tmp_path) if r.kind == DIED)
    assert "00001" in {r.shard for r in records(tmp_path) if r.kind == DIED}


@pytest.mark.parametrize("how", ["sys.exit(0)", "raise KeyboardInterrupt", "raise GeneratorExit"])
def test_what_is_raised_to_end_the_process_fails_its_shard_only(tmp_path: Path, how: str) -> None:
    ended = submit(fatal_config(tmp_path, how, {0}, count=2))
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert done(tmp_path) == {"00001"}
    [failed] = [r for r in records(tmp_path) if r.state == "failed"]
    assert (failed.shard, failed.kind) == ("00000", "ShardError")
    assert "a model or preprocessor raised" in failed.error


def test_a_preprocessor_that_ends_the_process_fails_its_shard_only(tmp_path: Path) -> None:
    config = fatal_config(tmp_path, "", {9}, count=2)
    custom = (
        (tmp_path / "fatal.py").read_text().replace('["identity"]', '["ends"]')
        + """
def ends(text):
    if text == "caption 3":
        raise SystemExit(0)
    return text

preprocessor_lookup = {"ends": ends}
"""
    )
    (tmp_path / "fatal.py").write_text(custom)
    ended = submit(config)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert done(tmp_path) == {"00001"}
    [failed] = [r for r in records(tmp_path) if r.state == "failed"]
    assert (failed.shard, failed.kind) == ("00000", "ShardError")
    assert "a model or preprocessor raised SystemExit" in failed.error


def test_an_output_that_is_removed_in_mid_run_is_no_complete_run(tmp_path: Path) -> None:
    parquet = str(tmp_path / "out" / "00000.parquet")
    how = f"while not os.path.exists({parquet!r}): time.sleep(0.05)\nos.unlink({parquet!r})"
    config = fatal_config(tmp_path, how, {1}, count=2)
    ended = submit(config)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert done(tmp_path) == {"00001"}
    told = json.loads(d2m("status", config, "--json").stdout)
    assert (told["done"], told["removed"]) == (1, 1)
    assert submit(config).returncode == 0
    assert done(tmp_path) == {"00000", "00001"}


@pytest.mark.parametrize(("deadly", "name"), [(0, "SEGV"), (1, "KILL")])
def test_a_death_while_a_tar_is_copied_is_its_shards(
    tmp_path: Path, deadly: int, name: str
) -> None:
    """The other shards are done, also one that was in hand beside it."""
    tars = write_shards(tmp_path / "tars", 3)
    urls = [f"pipe:cat {tar}" for tar in tars]
    urls[deadly] = f"pipe:kill -{name} $PPID; sleep 60; cat {tars[deadly]}"
    values = {**STATS, "input_tars": urls, "output_metadata_dir": str(tmp_path / "out")}
    ended = submit(write_config(tmp_path / "c.yml", values))
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert done(tmp_path) == {"00000", "00001", "00002"} - {f"{deadly:05d}"}
    died = [r for r in records(tmp_path) if r.kind == DIED]
    assert f"{deadly:05d}" in {r.shard for r in died}
    assert all(f"was killed by SIG{name}" in r.error for r in died)


def test_a_thread_that_a_model_left_does_not_keep_the_run(tmp_path: Path) -> None:
    how = "threading.Thread(target=time.sleep, args=(10_000,)).start()"
    assert submit(fatal_config(tmp_path, how, {0}, count=1), timeout=120).returncode == 0
    assert done(tmp_path) == {"00000"}


def test_an_array_task_goes_on_after_a_crash_and_its_neighbour_does_not_steal_it(
    tmp_path: Path,
) -> None:
    config = fatal_config(tmp_path, "os.abort()", {1}, shards_per_task=2, count=4)
    assert d2m("submit", config, "--no-sbatch", "--no-preflight").returncode == 0
    run = RunDir(tmp_path / "out" / ".d2m")
    command = [sys.executable, "-m", "d2m_hpc.worker", str(run.root), "000", "0", "1"]
    codes = []
    for index in range(2):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(index)}
        environment["SLURM_JOB_END_TIME"] = str(time.time() + 3600)
        codes.append(subprocess.run(command, env=environment, check=False).returncode)
    # The first one had stolen it. Where it had another one in hand too, its owner tries it again.
    assert sorted(codes) == [0, 1]
    assert done(tmp_path) == {"00000", "00002", "00003"}
    guilty = codes.index(1)
    assert "Fatal Python error: Aborted" in run.log_of("000", guilty).read_text()
    died = [r.task for r in records(tmp_path) if (r.shard, r.kind) == ("00001", DIED)]
    assert len(died) <= 2
    assert died[-1] == f"000-{guilty}-0"


def test_a_run_that_is_killed_with_its_watcher_is_found_by_the_next(tmp_path: Path) -> None:
    config = fatal_config(tmp_path, "os.kill(os.getppid(), 9); time.sleep(60)", {0}, count=2)
    assert submit(config).returncode == -signal.SIGKILL
    run = RunDir(tmp_path / "out" / ".d2m")
    assert Attempts(run.attempts).unended().keys() >= {"00000"}
    (tmp_path / "fatal.py").write_text(fatal("", {9}))
    assert submit(config, "--set", "reprocess=true").returncode == 0
    assert done(tmp_path) == {"00000", "00001"}
    assert list(run.attempts.iterdir()) == []


ASKING = """
import signal, sys, time
from d2m_hpc.worker import supervise

def main(board, past):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    if sys.argv[1] == "left":
        board.leave()
    print("ready", flush=True)
    signal.sigwait({signal.SIGUSR2})
    time.sleep(1.5)
    return 7

supervise.STOP_SECONDS = 0.0
code = supervise.supervised(main, lambda why: 4)
supervise.leave(code)
sys.exit(code)
"""


@pytest.mark.parametrize(("how", "code"), [("left", 7), ("working", 128 + signal.SIGUSR2)])
def test_a_stopped_task_has_its_time_only_while_it_holds_shards(how: str, code: int) -> None:
    """Its walltime ends while slurmctld is away: it asks for its requeue for up to 20 minutes."""
    command = [sys.executable, "-c", ASKING, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as task:
        assert task.stdout is not None
        assert task.stdout.readline() == "ready\n"
        task.send_signal(signal.SIGUSR2)
        assert task.wait(60) == code


# --- the board ---


def test_a_board_tells_what_is_held_and_what_is_begun() -> None:
    board = Board()
    first, second = board.claim("a[1]", 7), board.claim("d\udcff", 1)
    board.begin(second)
    assert board.entries() == [Entry("a[1]", 7, False), Entry("d\udcff", 1, True)]
    board.free(first)
    assert board.entries() == [Entry("d\udcff", 1, True)]
    assert board.claim("next", 2) == first
    board.clear()
    assert (board.entries(), board.beats, board.scene, board.left) == ([], 0, None, False)


def test_a_full_board_tells_of_no_more() -> None:
    board = Board()
    slots = [board.claim(str(i), 1) for i in range(70)]
    assert slots[-1] == -1
    board.begin(-1)
    board.free(-1)
    assert len(board.entries()) == 64


def test_a_scene_is_read_back_and_taken_down() -> None:
    board, scene = Board(), Scene("/r", "000", 3, 0, "n1", "f", 120.0, 1800.0)
    board.set_scene(scene)
    assert board.scene == scene
    board.set_scene(None)
    assert board.scene is None


KILLED = """
import os, pickle, sys

code = "import os; x = b'1' * 10**8; os.kill(os.getpid(), 9)"
pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", code])
sys.stdout.buffer.write(pickle.dumps(os.wait4(pid, 0)[1:]))
"""
"""Watched from a small process: a child's figure begins at what its parent holds."""


def test_a_death_for_memory_is_told_with_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the figures of a control group, in both versions' files."""
    group = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)
    folder = tmp_path / ("memory" if group[1] else "") / group[2].lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(death, "CGROUPS", tmp_path)
    for events, limit in (("memory.events", "max"), ("memory.oom_control", "limit_in_bytes")):
        (folder / events).write_text("low 0\noom 3\noom_kill 2\n")
        (folder / f"memory.{limit}").write_text("3000000000\n")
        assert (oom_kills(), memory_limit()) == (2, 3_000_000_000)
        watched = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, check=True)
        status, usage = pickle.loads(watched.stdout)
        told = death.told(status, usage, oom_kills(), 0)
        assert re.fullmatch(
            r"was killed by SIGKILL, out of memory: it took 0\.[1-9] GB of 3\.0 GB", told
        )
        unsure = death.told(status, usage, 0, 0)
        assert unsure.startswith("was killed by SIGKILL, as where memory runs out: it took 0.")
        (folder / events).unlink()
        (folder / f"memory.{limit}").unlink()


def test_what_the_system_says_of_memory_is_a_figure_or_nothing() -> None:
    assert memory_limit() >= 0
    assert oom_kills() >= 0


@pytest.mark.parametrize("asked", ["", "ACTIVE"])
def test_threads_of_torch_wait_without_spinning_unless_a_user_wants_that(asked: str) -> None:
    code = """
import os
from d2m_hpc.worker.supervise import leave, supervised
code = supervised(lambda *_: print(os.environ["OMP_WAIT_POLICY"]) or 0, lambda why: 4)
leave(code)
print(os.environ.get("OMP_WAIT_POLICY"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": asked} if asked else {}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [asked or "PASSIVE", asked or "None"]


def test_a_task_uses_the_cores_that_slurm_and_quotas_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(64)})
    monkeypatch.setattr(death, "cgroups", lambda: [tmp_path, tmp_path / "parent"])
    monkeypatch.delenv(OF_SLURM, raising=False)
    assert cores(in_slurm=True) == 64
    monkeypatch.setenv(OF_SLURM, "8")
    assert (cores(in_slurm=True), cores(in_slurm=False)) == (8, 64)
    for quota, expected in (("max 100000", 64), ("250000 100000", 2), ("10000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota)
        assert cores(in_slurm=False) == expected
