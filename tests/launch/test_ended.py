"""Why array tasks ended, by squeue, sacct and their logs; tests/slurm has it on a real Slurm."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest
from kit import d2m as command
from launch.scripted import commands_of, six_tasks

import d2m_hpc as d2m
from d2m_hpc.launch import ended, slurm
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.tasks import Progress

SACCT = """
71_0|FAILED|9:0|0:9||200M|n1
71_0.batch|FAILED|9:0||12168K||n1
71_0.0|CANCELLED by 0|0:9||423028K||n1
71_1|TIMEOUT|15:0|0:15||200M|n1
71_1.batch|FAILED|15:0||12340K||n1
71_1.0|CANCELLED|0:15||1660K||n1
71_2|COMPLETED|0:0|0:0||200M|n2
71_2.batch|COMPLETED|0:0||12296K||n2
71_3|FAILED|9:0|0:9||4Gc|n2
71_3.0|CANCELLED|0:9||||n2
71_4|CANCELLED by 0|0:0|0:0||200M|None assigned
71_5|NODE_FAIL|0:0|0:0||200M|n2
"""
"""Of a real sacct 22.05, shortened."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of six array tasks, of which squeue and sacct know nothing."""
    commands_of(
        tmp_path / "bin",
        monkeypatch,
        sbatch="cat > /dev/null; echo 71",
        squeue="true",
        scontrol="true",
        sacct="echo Slurm accounting storage is disabled >&2; exit 1",
    )
    ended._sacct.cache_clear()
    return RunDir(d2m.submit(six_tasks(tmp_path), preflight=False).path)


def causes(run: RunDir) -> dict[str, list[str]]:
    return {e.cause: [t[3:] for t in e.tasks] for e in d2m.open(run.root).status().ended}


def lists(run: RunDir, monkeypatch: pytest.MonkeyPatch, *rows: str) -> None:
    [array] = slurm.arrays_of(run)["000"]
    text = "".join(f"71|{row}|{array.name}\\n" for row in rows)
    commands_of(run.root.parents[1] / "bin", monkeypatch, squeue=f"printf '{text}'")


def test_sacct_tells_what_squeue_has_forgotten(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists(run, monkeypatch, "5|RUNNING|None|n1")
    folder = run.root.parents[1]
    calls = f'echo "$@" >> {folder}/asked'
    commands_of(folder / "bin", monkeypatch, sacct=f"{calls}; cat <<END{SACCT}END")
    assert causes(run) == {
        "memory": ["0"],
        "walltime": ["1"],
        "killed": ["3"],
        "cancelled": ["4"],
    }
    [cancelled] = (e for e in d2m.open(run.root).status().ended if e.cause == "cancelled")
    assert cancelled.what == "cancelled by root"
    [memory] = (e for e in d2m.open(run.root).status().ended if e.cause == "memory")
    assert memory.what == "out of memory, 0.4 GB of 0.2 GB"
    [asked] = (folder / "asked").read_text().splitlines()  # once a minute
    assert "--jobs=71_0,71_1,71_2,71_3,71_4 " in asked


@pytest.mark.parametrize(
    ("state", "batch", "task", "cause"),
    [
        ("OUT_OF_MEMORY|OutOfMemory", "", "", "memory"),
        ("TIMEOUT|TimeLimit", "srun: error: n1: task 0: Killed", "", "walltime"),
        ("DEADLINE|DeadLine", "", "", "walltime"),
        ("NODE_FAIL|NodeDown", "", "", "node"),
        ("PREEMPTED|None", "", "", "preempted"),
        ("FAILED|RaisedSignal:11(Segmentation_fault)", "", "", "crashed"),
        ("FAILED|NonZeroExitCode", "srun: error: n1: task 0: Killed", "", "killed"),
        ("FAILED|NonZeroExitCode", "error: Detected 1 oom_kill event in StepId=7.0", "", "memory"),
        ("FAILED|NonZeroExitCode", "x: Exited with exit code 2", "error: no such disk", "failed"),
        ("FAILED|NonZeroExitCode", "", "CUDA out of memory", "failed"),
        ("", "", "error: the process was killed by SIGKILL, out of memory: it took 4", "memory"),
        ("FAILED|NonZeroExitCode", "srun: error: n1: Exited with exit code 143", "", "stopped"),
        ("FAILED|NonZeroExitCode", "srun: error: n1: task 0: User defined signal 2", "", "stopped"),
        ("", "", "warning: scontrol requeue: slurm_load_jobs error: no such job", "unknown"),
        ("", "", "2026-11-26 20:21:09,401 WARNING asking again: error: timed out", "unknown"),
        ("", "", "", "unknown"),
    ],
)
def test_each_cause_is_found_by_slurms_word_or_a_log(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    batch: str,
    task: str,
    cause: str,
) -> None:
    others = [f"{i}|PENDING|Priority|" for i in range(1, 6)]
    lists(run, monkeypatch, *([f"0|{state}|n1"] if state else []), *others)
    (run.logs / "slurm-71_0.out").write_text(f"{batch}\n")
    run.log_of("000", 0).write_text(f"{task}\n")
    assert causes(run) == {cause: ["0"]}


def test_the_words_of_a_mistake_are_those_below_its_count(run: RunDir) -> None:
    what = f"output_metadata_dir: /{'x' * 150} cannot be written: no space left"
    said = f"error: config: 1 mistake\n  {what}\n"
    said += "srun: error: n2: task 0: Exited with exit code 2\n"
    (run.logs / "slurm-71_0.out").write_text(said)
    told = d2m.open(run.root).status().ended
    assert f"config: 1 mistake; {what}" in [e.said for e in told]


def test_what_found_nothing_to_do_and_what_never_began_are_no_ends(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists(run, monkeypatch, *(f"{i}|COMPLETED|None|n1" for i in range(1, 6)))
    run.log_of("000", 0).write_text(f"{ended.NOTHING_LEFT}\n")
    assert causes(run) == {}
    [submission] = run.submissions()
    [array] = slurm.read_arrays(submission)
    array.job_id = ""
    slurm.write_arrays(submission, [array])  # as of --no-sbatch, before somebody starts it
    lists(run, monkeypatch)
    assert causes(run) == {}


def test_logs_of_an_array_task(run: RunDir) -> None:
    run.log_of("000", 3).write_text("the task\n")
    shown = command("logs", run.root, "--task", "71_3")
    assert shown.stdout.splitlines() == [f"--- {run.logs}/000-3.log", "the task"]
    for wrong in ("71_4", "72_3", "71", "_", "71_x"):
        ended_ = command("logs", run.root, "--task", wrong)
        assert ended_.returncode == 2
        assert f"no array task '{wrong}' of this run has a log" in ended_.stderr
    assert command("logs", run.root).returncode == 2


def test_offline_nobody_is_asked(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.root.parents[1]
    commands_of(folder / "bin", monkeypatch, squeue=f"echo >> {folder}/asked")
    for options in (["--json"], []):
        said = command("status", run.root, "--offline", *options)
        assert said.returncode == 0
    assert not (folder / "asked").exists()
    command("status", run.root)
    assert (folder / "asked").exists()


def test_a_task_that_tells_nothing_for_minutes_is_told_and_leaves_no_time_to_be_believed(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs, or Slurm calls it running and its node has lost it. A second one has just begun:
    it may still tell something."""
    hung, fresh = (datetime.fromtimestamp(time.time() - s) for s in (900, 30))
    began = [f"{i}|RUNNING|None|n{i} {at:%Y-%m-%dT%H:%M:%S}" for i, at in enumerate((hung, fresh))]
    lists(run, monkeypatch, *began, "2|PENDING|Resources| N/A")
    found = d2m.open(run.root).status()
    assert found.silent == {"71_0": "n0"}
    shown = command("status", run.root)
    assert "array task 71_0 on n0 has told nothing for minutes" in shown.stdout
    assert "`d2m logs CONFIG --task 71_0`" in shown.stdout
    assert "`scancel 71_0` leaves its shards to the next submit" in shown.stdout
    for updated, silent in ((hung.timestamp() + 9, {"71_0": "n0"}), (time.time(), {})):
        told = Progress("000-0-0", shards=1, started=hung.timestamp() + 5, updated=updated)
        run.progress_of("000-0-0").write_text(json.dumps(asdict(told)))
        assert d2m.open(run.root).status().silent == silent


def test_the_last_words_of_a_batch_script_are_told_where_nothing_is_called_an_error(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists(run, monkeypatch, "0|FAILED|NonZeroExitCode|n1")
    words = "slurm_script: line 46: module: command not found"
    srun = "srun: error: n1: task 0: Exited with exit code 127"
    (run.logs / "slurm-71_0.out").write_text(f"{words}\n{srun}\n")
    assert causes(run)["not begun"] == ["0"]
    shown = command("status", run.root).stdout
    assert "`d2m logs CONFIG --task 71_0`: slurm_script: line 46: module: command not f" in shown


@pytest.mark.parametrize(
    ("before", "said"),
    [("", ""), ("slurm_script: line 46: module: command not found\n", "line 46: module: command ")],
)
def test_a_setup_line_that_failed_is_named_with_the_words_before(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, before: str, said: str
) -> None:
    lists(run, monkeypatch, "0|FAILED|NonZeroExitCode|n1")
    after = "setup line 2 failed\nnode n1 is left out for the pending elements of array 71\n"
    (run.logs / "slurm-71_0.out").write_text(before + after)
    assert causes(run)["not begun"] == ["0"]
    [told] = (e for e in d2m.open(run.root).status().ended if e.cause == "not begun")
    assert said in told.said
    assert told.said.endswith("setup line 2 failed")


def test_a_script_that_slurm_could_not_start_has_no_output_file(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a node does not reach the run folder; one that is killed has one."""
    lists(run, monkeypatch, "0|FAILED|JobLaunchFailure|n1", "1|FAILED|JobLaunchFailure|n1")
    (run.logs / "slurm-71_1.out").touch()
    found = causes(run)
    assert (found["not launched"], found["killed"]) == (["0"], ["1"])
    [told] = (e for e in d2m.open(run.root).status().ended if e.cause == "not launched")
    assert str(told) == (
        "1 array task ended with 1 shard left (Slurm could not start their script, on n1); see "
        "that each node reaches the run folder, and may write there"
    )


def test_elements_cancelled_before_they_began_are_told_as_such(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an array of which some had begun, squeue has one line for the others."""
    lists(run, monkeypatch, "N/A|CANCELLED|JobArrayTaskLimit| N/A", "0|RUNNING|None|n1 N/A")
    assert causes(run) == {"cancelled": ["1", "2", "3", "4", "5"]}
