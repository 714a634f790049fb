"""Chunks to arrays, options to sbatch's, shell lines, and what squeue's words mean."""

from __future__ import annotations

import json
import shlex
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch.scripted import commands_of

from d2m_hpc.config import Slurm
from d2m_hpc.errors import SlurmError
from d2m_hpc.launch import commands, sbatch, slurm
from d2m_hpc.launch.slurm import Array, Element
from d2m_hpc.run.folder import RunDir


def split(
    chunks: int, limit: int, tasks_per_node: int = 1, max_parallel: int | None = None
) -> list[Array]:
    return slurm.split([(chunks, slurm.Need())], limit, tasks_per_node, max_parallel, "d2m-x")


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


@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 4), st.integers(1, 3))
def test_each_kind_of_nodes_has_its_share_of_the_elements(
    chunks: int, limit: int, tasks_per_node: int, count: int
) -> None:
    kinds = [slurm.Kind(f"gpu:{i}:1") for i in range(count)]
    arrays = slurm.split([(chunks, slurm.Need("1G"))], limit, tasks_per_node, None, "d2m-x", kinds)
    numbers = [n for a in arrays for e in range(a.elements) for n in a.chunks_of(e)]
    elements = -(-chunks // tasks_per_node)
    assert numbers == [*range(elements * tasks_per_node)]
    shares = [sum(a.elements for a in arrays if a.gres == kind.gres) for kind in kinds]
    assert shares == sorted(shares, reverse=True)
    assert max(shares) - min(shares) <= 1
    assert {a.mem for a in arrays} == {"1G"}


def test_lists_of_devices_and_features_are_kinds_of_nodes() -> None:
    one = Slurm.model_validate({"gres": "gpu:1", "constraint": "a100|h100"})
    assert sbatch.kinds(one) == [slurm.Kind()]
    assert sbatch.options(one)["constraint"] == "a100|h100"
    two = Slurm.model_validate({"gres": ["gpu:a100:1", "gpu:h100:1"], "constraint": "ib"})
    assert sbatch.kinds(two) == [slurm.Kind("gpu:a100:1"), slurm.Kind("gpu:h100:1")]
    assert sbatch.options(two)["constraint"] == "ib"
    assert "gres" not in sbatch.options(two)
    both = Slurm.model_validate({"gres": ["gpu:2", "gpu:1"], "constraint": ["v100", "h100"]})
    assert sbatch.kinds(both) == [slurm.Kind("gpu:2", "v100"), slurm.Kind("gpu:1", "h100")]


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


def test_an_option_that_is_false_is_not_given() -> None:
    """`--exclusive=False` would be another wish, and no sbatch knows it."""
    chosen = sbatch.options(Slurm(extra={"exclusive": False, "overcommit": True, "nice": 0}))
    assert "exclusive" not in chosen
    assert (chosen["overcommit"], chosen["nice"]) == (True, 0)


@pytest.mark.parametrize(
    ("said", "broken", "expected"),
    [(None, [], None), ("a", [], "a"), (None, ["b", "c"], "b,c"), ("a", ["b"], "a,b")],
)
def test_broken_nodes_are_excluded_with_the_users_own(
    said: str | None, broken: list[str], expected: str | None
) -> None:
    assert sbatch.options(Slurm(exclude=said), broken).get("exclude") == expected


def run_script(
    folder: Path, setup: list[str], task: str = 'echo "DONE $GREETING"'
) -> subprocess.CompletedProcess[str]:
    """The script of an element, run by bash as Slurm would, with a task that says DONE."""
    script = sbatch.filled(setup, folder / "nodes", task)
    for name in ("nodes", "bin"):
        (folder / name).mkdir(exist_ok=True)
    if not (squeue := folder / "bin" / "squeue").exists():
        squeue.symlink_to("/bin/true")
    environment = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "SLURMD_NODENAME": "n7",
        "SLURM_JOB_NAME": "d2m-0a1b2c3d-001-2",
        "SLURM_JOB_ID": "12",
        "SLURM_SUBMIT_DIR": str(folder),
    }
    return subprocess.run(
        ["bash", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_setup_lines_reach_the_task_whatever_their_quotes(awkward_path: Path) -> None:
    greeting = """it's "döner" & $HOME; `no` \\ %d @task@"""
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
    assert ran.stderr.endswith("setup line 2 failed\n")
    said = json.loads((awkward_path / "nodes" / "12-0.json").read_text())
    assert (said["node"], said["why"]) == ("n7", "setup line 2 failed")
    assert said["time"] > 1.7e9


BEGIN = 'rm "nodes/.$SLURM_JOB_ID-0.tmp"; '
"""What a task does when it has begun."""


@pytest.mark.parametrize(
    ("task", "code", "marked"),
    [
        ("exit 0", 0, False),
        ("exit 127", 4, True),  # no such Python
        ("exit 1", 4, True),  # a Python without this package
        ("kill -ILL $$", 4, True),  # a library for another processor
        ("kill -KILL $$", 137, False),
        ("kill -USR2 $$", 140, False),
        (BEGIN + "exit 1", 1, False),  # a shard failed
        (BEGIN + "exit 127", 127, False),
        ("kill -TERM $PPID; exit 1", 1, False),  # cancelled before it began
        (BEGIN + "kill -SEGV $$", 139, False),
    ],
)
def test_a_node_on_which_the_task_does_not_begin_is_written_down(
    awkward_path: Path, task: str, code: int, marked: bool
) -> None:
    ran = run_script(awkward_path, [], f"d2m_task bash -c {shlex.quote(task)}")
    assert ran.returncode == code, ran.stderr
    left = [p.name for p in (awkward_path / "nodes").iterdir()]
    assert left == (["12-0.json"] if marked else [])
    if marked:
        said = json.loads((awkward_path / "nodes" / "12-0.json").read_text())
        assert said["node"] == "n7"
        assert said["why"].startswith("the task did not start there (srun ended with code ")


@pytest.mark.parametrize(
    ("then", "code", "left"), [("exit 0", 0, []), ("exit 1", 4, ["12-0.json"])]
)
def test_a_task_that_slurmctlds_absence_keeps_from_starting_waits_for_it(
    then: str, code: int, left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun cannot start a step without it; that says nothing of the node."""
    is_back = "[ $(cat asked 2> /dev/null | wc -l) -ge 3 ]"
    squeue = f"cd {tmp_path}; echo >> asked; {is_back}"
    commands_of(tmp_path / "bin", monkeypatch, squeue=squeue, sleep="true")
    ran = run_script(
        tmp_path, [], f"d2m_task bash -c {shlex.quote(f'{is_back} || exit 1; {then}')}"
    )
    assert ran.returncode == code, ran.stderr
    assert [p.name for p in (tmp_path / "nodes").iterdir()] == left


def test_a_task_that_is_cancelled_while_it_waits_for_slurmctld_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands_of(tmp_path / "bin", monkeypatch, squeue="exit 1", sleep="kill -TERM $PPID")
    assert run_script(tmp_path, [], "d2m_task bash -c 'exit 9'").returncode == 9
    assert list((tmp_path / "nodes").iterdir()) == []


def test_a_node_on_which_the_task_is_aborted_is_written_down(awkward_path: Path) -> None:
    """Where a GPU fails, C++ may abort the process that frees its memory."""
    ran = run_script(awkward_path, [], f"d2m_task bash -c {shlex.quote(BEGIN + 'kill -ABRT $$')}")
    assert ran.returncode == 4, ran.stderr
    said = json.loads((awkward_path / "nodes" / "12-0.json").read_text())
    assert said["why"] == "the task was aborted (SIGABRT), as where a GPU fails"


QUEUE = """
d2m-0a1b2c3d-001-2|70|RUNNING||{works}|2026-11-26T00:00:00
d2m-0a1b2c3d-001-2|70|PENDING|||N/A
d2m-0a1b2c3d-001-3|71|PENDING|n1,n2||N/A
d2m-0a1b2c3d-000-0|72|PENDING|n1,n7||N/A
d2m-0a1b2c3d-next|73|PENDING|||N/A
d2m-ffffffff-001-0|74|PENDING|||N/A
"""


@pytest.mark.parametrize("works", ["n5", "n7"])
def test_a_node_that_fails_is_left_out_for_all_pending_elements_of_the_run(
    works: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all arrays, but for what another run or a round waits for; if another node works."""
    queue, asked = tmp_path / "queue", tmp_path / "asked"
    queue.write_text(QUEUE.format(works=works))
    update = f"echo $2 $3 >> {asked}"
    commands_of(tmp_path / "bin", monkeypatch, squeue=f"cat {queue}", scontrol=update)
    (tmp_path / "nodes").mkdir()
    for number in range(3):
        failure = {"node": "n7", "why": "", "time": 4102444800 + number}
        (tmp_path / "nodes" / f"{number}.json").write_text(json.dumps(failure))
    assert run_script(tmp_path, ["false"]).returncode == 4
    told = asked.read_text().splitlines() if asked.exists() else []
    expected = ["jobid=70 ExcNodeList=n7", "jobid=71 ExcNodeList=n1,n2,n7"]
    assert told == (expected if works == "n5" else [])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Submitted batch job 4242\n", "4242"),
        ("Submitted batch job 4242 on cluster alpha\n", "4242"),
        ("4242\n", "4242"),
        ("4242;alpha\n", "4242"),
        ("welcome to alpha\n4242;alpha\n", "4242"),
    ],
)
def test_a_job_id_is_found_in_what_sbatch_says(said: str, expected: str) -> None:
    assert sbatch.job_id(said) == expected


@pytest.mark.parametrize("said", ["", "ok\n", "queued, thank you\n"])
def test_an_answer_without_a_job_is_told(said: str) -> None:
    with pytest.raises(SlurmError, match="which names no job: see whether `squeue --me`"):
        sbatch.job_id(said)


def test_the_command_survives_the_shell(awkward_path: Path) -> None:
    run = RunDir(awkward_path)
    array = Array("d2m-x-1", first=40, elements=3, tasks_per_node=2)
    words = shlex.split(sbatch.command(run, run.submission("007"), Slurm(), array, {}))
    assert words[-6:] == ["-m", "d2m_hpc.worker", str(awkward_path), "007", "40", "2"]
    assert not [w for w in words if w.startswith("--cpus-per-task")]


def test_a_step_gets_the_cores_of_its_job(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    options = sbatch.options(Slurm(cpus_per_task=8))
    words = shlex.split(
        sbatch.command(run, run.submission("000"), Slurm(), Array("a", 0, 1), options)
    )
    assert "--cpus-per-task=8" in words


def test_max_array_size_is_read_from_scontrol() -> None:
    shown = "MailProg = /bin/true\nMaxArraySize            = 4\nMaxJobCount = 10\n"
    assert slurm.parse_max_array_size(shown) == 4
    assert slurm.parse_max_array_size("nothing") == 1001
    with pytest.raises(SlurmError, match="takes no job arrays: its MaxArraySize is 0"):
        slurm.parse_max_array_size("MaxArraySize = 0\n")


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
        commands.ask("scontrol" if script else "squeue")


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


def test_lines_that_are_no_jobs_are_left_out() -> None:
    shown = "CLUSTER: alpha\n" + SQUEUE + "slurm_load_jobs: retrying\n"
    assert slurm.parse_queue(shown) == slurm.parse_queue(SQUEUE)


def test_a_task_that_was_requeued_is_live_in_its_epilog_already() -> None:
    """Of one that is over squeue gives the end that it had, of others the one to come."""
    rows = {0: "COMPLETING", 1: "COMPLETING", 2: "COMPLETING", 3: "COMPLETING", 4: "RUNNING"}
    shown = "\n".join(f"7|{i}|{state}|None|n1|a" for i, state in rows.items())
    ends = [
        "7|0|COMPLETING|2026-03-01T11:59:58",
        "7|1|COMPLETING|2026-03-01T13:00:00",
        "7|2|COMPLETING|N/A",
        "7|3|PENDING|2026-03-02T12:00:00",  # the epilog ended between the two questions
        "7|4|COMPLETING|2026-03-01T11:59:59",
        "7|N/A|RUNNING|2026-03-01T13:00:00",
    ]
    now = datetime(2026, 3, 1, 12)
    found = slurm.with_requeued(slurm.parse_queue(shown), "\n".join(ends), now)
    states = {e.index: e.state for e in found.all}
    assert states == {0: "COMPLETING", 1: "REQUEUED", 2: "REQUEUED", 3: "PENDING", 4: "RUNNING"}
    assert found.elements(Array("a", 0, 5, job_id="7")) == [1, 2, 3, 4]


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
