"""Chunks to arrays, options to sbatch's, shell lines, and what squeue's words mean."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2m_hpc.config import Slurm
from d2m_hpc.errors import SlurmError
from d2m_hpc.launch import sbatch, slurm
from d2m_hpc.launch.slurm import Array, Element
from d2m_hpc.state.rundir import RunDir


def split(
    chunks: int, limit: int, tasks_per_node: int = 1, max_parallel: int | None = None
) -> list[Array]:
    return slurm.split(chunks, limit, tasks_per_node, max_parallel, "d2m-x")


def test_five_thousand_chunks_are_five_arrays_with_every_index_below_1001() -> None:
    arrays = split(5000, 1001)
    assert [a.elements for a in arrays] == [1001, 1001, 1001, 1001, 996]
    assert [a.name for a in arrays] == [f"d2m-x-{i}" for i in range(5)]


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 8), st.none() | st.integers(1, 100))
def test_every_chunk_is_in_one_element(
    chunks: int, limit: int, tasks_per_node: int, max_parallel: int | None
) -> None:
    arrays = split(chunks, limit, tasks_per_node, max_parallel)
    told = [i for a in arrays for e in range(a.elements) for i in a.chunks_of(e)]
    assert told[:chunks] == list(range(chunks))
    assert len(told) - chunks < tasks_per_node
    assert all(0 < a.elements <= limit for a in arrays)


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 8), st.integers(1, 100))
def test_no_more_than_max_parallel_tasks_can_run(
    chunks: int, limit: int, tasks_per_node: int, max_parallel: int
) -> None:
    arrays = split(chunks, limit, tasks_per_node, max_parallel)
    # An array may run beside all others but those of its own lane, which wait for one another.
    lanes: dict[int, list[int]] = {}
    lane_of: dict[int, int] = {}
    for i, array in enumerate(arrays):
        assert array.after is None or array.after < i
        lane_of[i] = i if array.after is None else lane_of[array.after]
        lanes.setdefault(lane_of[i], []).append(array.parallel)
    assert all(p > 0 for lane in lanes.values() for p in lane)
    at_once = sum(max(lane) for lane in lanes.values()) * tasks_per_node
    assert at_once <= max(max_parallel, tasks_per_node)  # an element is the least there is
    followers = [a.after for a in arrays if a.after is not None]
    assert len(followers) == len(set(followers))


def test_without_max_parallel_all_arrays_run_freely() -> None:
    assert [(a.parallel, a.after) for a in split(9, 4)] == [(0, None)] * 3


def test_options_are_sbatchs_and_leave_out_what_was_not_said() -> None:
    config = Slurm(partition="gpu", gres="gpu:1", cpus_per_task=8, mem="32G", time="4:00:00")
    assert sbatch.options(config) == {
        "partition": "gpu",
        "gres": "gpu:1",
        "cpus-per-task": 8,
        "mem": "32G",
        "time": "4:00:00",
        "ntasks-per-node": 1,
        "requeue": True,
        "open-mode": "append",
        "signal": "USR2@120",
    }


def test_extra_options_win_and_null_takes_one_away() -> None:
    extra: dict[str, Any] = {"signal": "USR2@30", "nice": 100, "open-mode": None}
    chosen = sbatch.options(Slurm(requeue=False, extra=extra))
    assert (chosen["signal"], chosen["nice"], chosen["no-requeue"]) == ("USR2@30", 100, True)
    assert not {"open-mode", "requeue"} & chosen.keys()


@pytest.mark.parametrize(
    ("said", "broken", "expected"),
    [(None, [], None), ("a", [], "a"), (None, ["b", "c"], "b,c"), ("a", ["b"], "a,b")],
)
def test_broken_nodes_are_excluded_with_the_users_own(
    said: str | None, broken: list[str], expected: str | None
) -> None:
    assert sbatch.options(Slurm(exclude=said), broken).get("exclude") == expected


def run_script(folder: Path, setup: list[str]) -> subprocess.CompletedProcess[str]:
    """The lines before the task, run by bash as an element would, and a task that says DONE."""
    lines = [*sbatch.script_lines(Slurm(setup=setup), folder / "nodes"), 'echo "DONE $GREETING"']
    (folder / "nodes").mkdir(exist_ok=True)
    environment = {
        "PATH": "/usr/bin:/bin",
        "SLURMD_NODENAME": "n7",
        "SLURM_JOB_ID": "12",
        "SLURM_SUBMIT_DIR": str(folder),
    }
    return subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_setup_lines_reach_the_task_whatever_their_quotes(awkward_path: Path) -> None:
    greeting = """it's "döner" & $HOME; `no` \\ %d"""
    ran = run_script(awkward_path, [f"export GREETING={shlex.quote(greeting)}", "test -d nodes"])
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"DONE {greeting}\n", "")
    assert list((awkward_path / "nodes").iterdir()) == []


@pytest.mark.parametrize("line", ["false", "test 1 = '2'", "no-such-command-d2m", "(exit 7)"])
def test_a_failed_setup_line_ends_the_element_and_is_written_down(
    awkward_path: Path, line: str
) -> None:
    ran = run_script(awkward_path, ["true", line, "export GREETING=late"])
    assert ran.returncode == 4
    assert "DONE" not in ran.stdout
    said = json.loads((awkward_path / "nodes" / "12-0.json").read_text())
    assert (said["node"], said["why"]) == ("n7", "setup line 2 failed")
    assert said["time"] > 1.7e9


def test_the_command_survives_the_shell(awkward_path: Path) -> None:
    run = RunDir(awkward_path)
    array = Array("d2m-x-1", first=40, elements=3, tasks_per_node=2)
    words = shlex.split(sbatch.command(run, run.submission("007"), array, {}))
    assert words[-6:] == ["-m", "d2m_hpc.worker", str(awkward_path), "007", "40", "2"]
    assert not [w for w in words if w.startswith("--cpus-per-task")]


def test_a_step_gets_the_cores_of_its_job(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    options = sbatch.options(Slurm(cpus_per_task=8))
    words = shlex.split(sbatch.command(run, run.submission("000"), Array("a", 0, 1), options))
    assert "--cpus-per-task=8" in words


def test_max_array_size_is_read_from_scontrol() -> None:
    shown = "MailProg = /bin/true\nMaxArraySize            = 4\nMaxJobCount = 10\n"
    assert slurm.parse_max_array_size(shown) == 4
    assert slurm.parse_max_array_size("nothing") == 1001


@pytest.mark.parametrize("script", [None, "#!/bin/sh\necho no controller >&2\nexit 1\n"])
def test_without_a_controller_a_plan_has_slurms_own_limit(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands are missing, or here without a cluster."""
    if script:
        (tmp_path / "scontrol").write_text(script)
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.max_array_size() == 1001
    with pytest.raises(SlurmError, match="no controller" if script else "no squeue here"):
        slurm._ask("scontrol" if script else "squeue")


SQUEUE = """\
17|0|RUNNING|None|n1|d2m-x-0
17|1|PENDING|Resources||d2m-x-0
17|2|COMPLETING|None|n2|d2m-x-0
18|0|PENDING|Dependency||d2m-x-1
19|N/A|RUNNING|None|n1|my | own | job
20|3|PENDING|Priority||a|b

"""


def test_the_queue_holds_array_elements_whatever_other_jobs_are_called() -> None:
    queue = slurm.parse_queue(SQUEUE)
    assert queue.all[0] == Element("17", 0, "RUNNING", "d2m-x-0", "None", "n1")
    assert queue.all[-1] == Element("20", 3, "PENDING", "a|b", "Priority", "")
    assert len(queue.all) == 5


def test_an_array_is_found_by_its_id_or_by_its_name() -> None:
    queue = slurm.parse_queue(SQUEUE)
    assert queue.elements(Array("d2m-x-0", 0, 3, job_id="17")) == [0, 1]
    assert queue.elements(Array("d2m-x-0", 0, 3)) == [0, 1]
    assert queue.elements(Array("d2m-x-0", 0, 3, job_id="16")) == []
    assert queue.elements(Array("d2m-x-2", 0, 3)) == []


def test_arrays_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    submission = RunDir(tmp_path).submission("000")
    assert slurm.read_arrays(submission) == []
    arrays = split(9, 4, 2, 4)
    slurm.write_arrays(submission, arrays)
    assert slurm.read_arrays(submission) == arrays


def test_runs_of_other_folders_have_other_names() -> None:
    assert slurm.token(Path("/a")) == slurm.token(Path("/a"))
    assert slurm.token(Path("/a")) != slurm.token(Path("/b"))
