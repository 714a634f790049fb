"""Where a task stands in its array, and which device is its own."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from kit import STATS, d2m, write_config, write_shards
from launch.scripted import commands_of
from submitit import JobEnvironment

from d2m_hpc.config import Slurm
from d2m_hpc.config.load import load
from d2m_hpc.errors import D2MError
from d2m_hpc.launch import sbatch, slurm
from d2m_hpc.launch.slurm import Array
from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage.files import make_folder
from d2m_hpc.worker import __main__ as main
from d2m_hpc.worker.board import Board
from d2m_hpc.worker.left import Left


def own(rank: int, tasks_per_node: int) -> str | None:
    """What a rank then sees; the variable is put back."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    main._own_device(rank, tasks_per_node)
    seen = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if before is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before
    return seen


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, 0, ["0", "1", "2"]),
        (None, 8, ["0", "1", "2"]),
        (None, 2, ["0", "1", "0"]),
        ("", 8, ["", "", ""]),
        ("5,7", 8, ["5", "7", "5"]),
        ("MIG-a,MIG-b,MIG-c", 1, ["MIG-a", "MIG-b", "MIG-c"]),
    ],
)
def test_each_rank_has_a_gpu_of_its_own_while_there_are_enough(
    visible: str | None, gpus: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(main, "_gpu_count", lambda: gpus)
    assert [own(rank, 3) for rank in range(3)] == expected


def test_a_task_alone_keeps_all_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert own(0, 1) is None


@pytest.mark.parametrize("name", ["json", "torch", "logging", "tokenizers"])
def test_a_strangers_file_in_the_folder_is_not_imported(name: str, tmp_path: Path) -> None:
    """Where sbatch was called."""
    write_shards(tmp_path / "tars", 1, 2)
    tars, out = str(tmp_path / "tars" / "*.tar"), str(tmp_path / "out")
    config = write_config(tmp_path / "c.yml", STATS, input_tars=tars, output_metadata_dir=out)
    assert d2m("submit", config, "--no-sbatch", "--no-preflight").returncode == 0
    here = tmp_path / "here"
    here.mkdir()
    (here / f"{name}.py").write_text("open('RAN', 'w').close()\nraise SystemExit('shadowed')\n")
    run = RunDir(tmp_path / "out" / ".d2m")
    words = shlex.split(sbatch.command(run, run.submission("000"), Slurm(), Array("a", 0, 1), {}))
    python = words[words.index("-m") - 3 :]
    environment = {**os.environ, "SLURM_JOB_END_TIME": "4102444800"}
    ended = subprocess.run(python, cwd=here, env=environment, capture_output=True, text=True)
    assert (ended.returncode, (here / "RAN").exists()) == (0, False), ended.stderr
    assert (tmp_path / "out" / "00000.parquet").exists()


def test_a_rank_of_an_element_finds_its_chunk_and_its_name(tmp_path: Path) -> None:
    """By the whole script; by Slurm's variables alone, whatever is left of a parent's submitit."""
    write_shards(tmp_path / "tars", 4, 2)
    tars, out = str(tmp_path / "tars" / "*.tar"), str(tmp_path / "out")
    config = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=tars,
        output_metadata_dir=out,
        shards_per_task=1,
        steal=False,
        slurm={"tasks_per_node": 2},
    )
    assert d2m("submit", config, "--no-sbatch", "--no-preflight").returncode == 0
    told, folder = tmp_path / "told", tmp_path / "bin"
    folder.mkdir()
    commands = {
        "scontrol": f'echo "$@" >> {shlex.quote(str(told))}',
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    run = RunDir(tmp_path / "out" / ".d2m")
    array = Array("a", 0, 2, tasks_per_node=2)
    slurm = {
        "SLURM_JOB_ID": "19",
        "SLURM_ARRAY_JOB_ID": "17",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_LOCALID": "1",
        "SUBMITIT_EXECUTOR": "local",
    }
    ended = subprocess.run(
        ["bash", "-c", sbatch.script(run, run.submission("000"), Slurm(), array, {})],
        cwd=tmp_path,
        env={**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert [p.name for p in (tmp_path / "out").glob("*.parquet")] == ["00003.parquet"]
    assert told.read_text() == "show job --oneliner 17_1\n"
    assert list(run.node_failures.iterdir()) == []


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A submission of four tasks that nobody has started, and an scancel that says what it did."""
    write_shards(tmp_path / "tars", 4, 2)
    tars, out = str(tmp_path / "tars" / "*.tar"), str(tmp_path / "out")
    config = write_config(
        tmp_path / "c.yml", STATS, input_tars=tars, output_metadata_dir=out, shards_per_task=1
    )
    assert d2m("submit", config, "--no-sbatch", "--no-preflight").returncode == 0
    commands_of(tmp_path / "bin", monkeypatch, scancel=f'echo "$@" >> {tmp_path}/cancelled')
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "torch.py").write_text("raise ImportError('this node has no torch')\n")
    return RunDir(tmp_path / "out" / ".d2m")


def element(run: RunDir, index: int, **more: str) -> int:
    """The exit code of an element's task."""
    words = shlex.split(sbatch.command(run, run.submission("000"), Slurm(), Array("a", 0, 4), {}))
    slurm = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": str(index), "SLURM_LOCALID": "0"}
    environment = {**os.environ, "SLURM_JOB_END_TIME": "4102444800", **slurm, **more}
    python = words[words.index("-m") - 3 :]
    return subprocess.run(python, env=environment, capture_output=True).returncode


def test_an_element_without_work_loads_no_torch_and_the_pending_ones_are_cancelled(
    four: RunDir,
) -> None:
    folder = four.root.parents[1]
    lacking = {"PYTHONPATH": str(folder / "lacking")}
    assert element(four, 3, **lacking) == 4  # as on a node that lacks a library
    assert not (folder / "cancelled").exists()
    arrays = slurm.read_arrays(four.submission("000"))
    slurm.write_arrays(four.submission("000"), [*arrays, Array("another kind", 4, 1, job_id="18")])
    assert element(four, 0) == 0
    assert (folder / "cancelled").read_text() == "--state=PENDING 17 18\n"
    assert element(four, 3, **lacking) == 0
    assert "no shard is left for this task" in four.log_of("000", 3).read_text()
    (folder / "out" / "00002.parquet").unlink()
    assert element(four, 3, **lacking) == 4  # it would take that shard
    assert element(four, 3) == 0
    assert (folder / "out" / "00002.parquet").exists()


SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGTERM)
    os.getpid()
except BaseException:
    {then}
"""


@pytest.mark.parametrize(
    "then", ["raise ImportError('no multiarray')", "raise SystemError", "pass"]
)
def test_a_stop_that_a_library_swallows_as_it_is_loaded_blames_no_node(
    four: RunDir, then: str
) -> None:
    """As libraries in C do: they know no error but their own."""
    folder = four.root.parents[1] / "lacking"
    (folder / "torch.py").write_text(SWALLOWS.format(then=then))
    assert element(four, 0, PYTHONPATH=str(folder)) == 143
    assert list(four.node_failures.iterdir()) == []


def test_an_element_leaves_shards_to_others_where_it_may_not_steal(four: RunDir) -> None:
    folder = four.root.parents[1]
    config = four.submission("000").config
    config.write_text(config.read_text().replace("steal: true", "steal: false"))
    assert element(four, 1) == 0
    assert not (folder / "cancelled").exists()
    assert element(four, 1, PYTHONPATH=str(folder / "lacking")) == 0
    assert sorted(p.name for p in (folder / "out").glob("*.parquet")) == ["00001.parquet"]


def test_a_failed_shard_is_not_left_and_one_to_compute_again_is(four: RunDir) -> None:
    config = load(four.submission("000").config, frozen=True)
    for suffix in ("npz", "parquet"):
        (four.root.parents[1] / "out" / f"00000.{suffix}").touch()
    make_folder(four.submission("000").failed(""))
    four.submission("000").failed("00001").touch()
    left = Left(four, "000", config.model_copy(update={"steal": False}))
    assert [left.nothing_for(i) for i in range(5)] == [True, True, False, False, True]
    again = config.model_copy(update={"steal": False, "reprocess": True})
    assert [Left(four, "000", again).nothing_for(i) for i in range(2)] == [False, True]


@pytest.mark.parametrize("line", ["echo 'slurmctld is away' >&2; exit 1", "exit 1", None])
def test_pending_elements_that_stay_are_no_failure(
    four: RunDir, monkeypatch: pytest.MonkeyPatch, line: str | None
) -> None:
    folder = four.root.parents[1] / "bin"
    if line is None:
        (folder / "scancel").unlink()
        monkeypatch.setenv("PATH", str(folder))
    else:
        commands_of(folder, monkeypatch, scancel=line)
    assert element(four, 0) == 0
    assert "pending elements of the submission stay" in four.log_of("000", 0).read_text()


def test_a_task_asks_for_its_requeue_unhurried_and_says_once_why_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """slurmctld may be away for longer than the process that watches waits for one that stops."""
    asked, record, pauses = tmp_path / "asked", tmp_path / "record", list[float]()
    away = f'echo "$@" >> {asked}; [ $(wc -l < {asked}) = 5 ] || {{ echo away >&2; exit 1; }}'
    commands_of(tmp_path / "bin", monkeypatch, scontrol=away)
    monkeypatch.setattr(main.time, "sleep", pauses.append)
    slurm = {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1"}
    for name, value in {**slurm, "SUBMITIT_EXECUTOR": "slurm"}.items():
        monkeypatch.setenv(name, value)
    board = Board()
    with pytest.raises(D2MError, match="no shard was finished in this walltime"):
        main._requeue(JobEnvironment(), record, board)
    record.touch()
    main._requeue(JobEnvironment(), record, board)
    assert board.left
    assert asked.read_text() == 5 * "requeue 17_1\n"
    assert pauses == [1.0, 2.0, 4.0, 5.0]
    said = capsys.readouterr().out
    assert said == "slurmctld does not take the requeue; asking again: away\n"
