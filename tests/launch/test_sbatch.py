"""What sbatch is given by a submit, and what becomes of its answers; the command is a script."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from kit import d2m as d2m_command
from kit import submit as submit_command
from launch.scripted import commands_of, six_tasks

import d2m_hpc as d2m
from d2m_hpc.config import Slurm
from d2m_hpc.errors import SlurmError
from d2m_hpc.launch import sbatch, slurm
from d2m_hpc.launch.slurm import Array, Proposal
from d2m_hpc.run.folder import RunDir

TOLD = """\
#!{python}
import json, os, sys
script = open(sys.argv[-1]).read()
mode = os.stat(sys.argv[-1]).st_mode & 0o777
json.dump([sys.argv[1:], dict(os.environ), script, mode], open({told!r}, "w"))
{then}
"""


FAILED = "Batch job submission failed: "
REFUSALS = {
    "AssocMaxSubmitJobLimit": "the account or QOS takes no more jobs",
    FAILED + "Job violates accounting/QOS policy .job submit limit, user.s size and/or time "
    "limits.": "the account or QOS takes no more jobs",
    FAILED + "Invalid account or account/partition combination specified": "check slurm.account",
    FAILED + "Invalid partition name specified": "check slurm.partition",
    FAILED + "Invalid qos specification": "check slurm.qos",
    FAILED + "Requested time limit is invalid .missing or exceeds some limit.": "check slurm.time",
    FAILED + "Invalid generic resource .gres. specification": "check slurm.gres",
    FAILED + "Invalid feature specification": "check slurm.gres and slurm.constraint",
    FAILED + "Invalid license specification": "check slurm.extra",
    FAILED + "Invalid job array specification": "`scontrol show config` says what MaxArraySize",
    FAILED + "Requested node configuration is not available": "no node has what",
    FAILED + "Unable to contact slurm controller .connect failure.": "slurmctld does not answer",
    FAILED + "Access/permission denied": "ask the administrators",
    FAILED + "Job dependency problem": "check the dependency in slurm.extra: it names jobs",
    FAILED + "Something new": "see `man sbatch`",
}
"""Words of sbatch, each with the start of what helps."""


@pytest.fixture
def run(awkward_path: Path) -> RunDir:
    run = RunDir(awkward_path / "run")
    run.create()
    return run


def submit(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, then: str, array: Array, **slurm: Any
) -> Any:
    """Hand an array to an sbatch that does `then`; returns what it was told."""
    folder = run.root.parent / "bin"
    folder.mkdir()
    told = folder / "told.json"
    (folder / "sbatch").write_text(TOLD.format(python=sys.executable, told=str(told), then=then))
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    config = Slurm(**slurm)
    first = Array("d2m-x-0", 0, 5, job_id="41")
    proposal = Proposal([], 1, [first, array], sbatch.options(config))
    command = sbatch.prepared(run, run.submission("007"), config, array, proposal)
    array.job_id = sbatch.submit(command)
    return json.loads(told.read_text())


def test_all_options_stand_on_the_command_line(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = Array("d2m-x-1", 40, 1000, 2, parallel=3, after=0)
    then = "print('Submitted batch job 4242')"
    words, _, script, _ = submit(
        run, monkeypatch, then, array, partition="gpu", extra={"comment": "it's %j"}
    )
    assert array.job_id == "4242"
    assert words == [
        f"--chdir={run.logs}",
        "--partition=gpu",
        "--ntasks-per-node=1",
        "--requeue",
        "--open-mode=append",
        "--signal=USR2@120",
        "--comment=it's %j",
        "--job-name=d2m-x-1",
        "--array=0-999%3",
        "--output=slurm-%A_%a.out",
        "--dependency=afterany:41",
        f"{run.logs}/d2m-x-1.sh",
    ]
    lines = script.splitlines()
    assert [line for line in lines if line.startswith("#SBATCH")] == ["#SBATCH --nodes=1"]
    assert lines[-1].startswith("d2m_task srun ")


def test_a_site_chooses_sruns_options_the_launcher_and_the_python(run: RunDir) -> None:
    config = Slurm(
        cpus_per_task=4,
        srun={"container-image": "it's.sqsh", "no-container-mount-home": True, "unbuffered": False},
        launcher=["apptainer", "exec", "--nv", "a b.sif"],
        python="/opt/venv/bin/python3",
    )
    array = Array("a", 0, 1)
    told = sbatch.command(run, run.submission("000"), config, array, sbatch.options(config))
    assert shlex.split(told) == [
        "d2m_task",
        "srun",
        "--kill-on-bad-exit=0",
        "--cpus-per-task=4",
        "--container-image=it's.sqsh",
        "--no-container-mount-home",
        "apptainer",
        "exec",
        "--nv",
        "a b.sif",
        "/opt/venv/bin/python3",
        *("-P", "-u", "-m", "d2m_hpc.worker"),
        *(str(run.root), "000", "0", "1"),
    ]


def test_a_thousand_elements_leave_one_file_which_no_task_needs(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A submit that is killed right after sbatch has left all that an element starts with."""
    before = {p for p in run.root.rglob("*") if p.is_file()}
    submit(run, monkeypatch, "print(7)", Array("d2m-x-1", 0, 1000))
    made = {p for p in run.root.rglob("*") if p.is_file()} - before
    assert made == {run.logs / "d2m-x-1.sh"}


def test_variables_that_are_for_others_stay_here(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    monkeypatch.setenv("MINE", "kept")
    _, environment, _, _ = submit(run, monkeypatch, "print(7)", Array("a", 0, 1))
    assert not {"SBATCH_PARTITION", "SLURM_CPUS_PER_TASK"} & environment.keys()
    assert (environment["SLURM_CONF"], environment["MINE"]) == ("/etc/other.conf", "kept")


@pytest.mark.parametrize(("setup", "mode"), [("export A_TOKEN=hush", 0o600), ("true", 0o644)])
def test_a_script_with_a_secret_is_for_its_owner_alone(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, setup: str, mode: int
) -> None:
    before = os.umask(0o022)
    try:
        told = submit(run, monkeypatch, "print(7)", Array("a", 0, 1), setup=[setup])
    finally:
        os.umask(before)
    assert told[3] == mode


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (
            "sys.exit('sbatch: error: invalid partition specified: x\\nsbatch: error: Batch job')",
            r"invalid partition specified: x; Batch job \(check slurm.partition against `sinfo`",
        ),
        *(
            (f"sys.exit('sbatch: error: {words}')", rf"{words} \({hint}".replace("/", "."))
            for words, hint in REFUSALS.items()
        ),
        (
            "sys.exit('sbatch: unrecognized option \\'--no\\'\\nTry \"sbatch --help\" for more')",
            r"Slurm refused: unrecognized option '--no' \(see `man sbatch`",
        ),
        ("print('no array jobs here'); sys.exit(1)", "Slurm refused: no array jobs here"),
        ("sys.exit(3)", "sbatch ended with exit code 3 and said nothing"),
    ],
)
def test_a_refusal_is_told_in_sbatchs_words(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, then: str, said: str
) -> None:
    array = Array("a", 0, 1)
    with pytest.raises(SlurmError, match=said):
        submit(run, monkeypatch, then, array)
    assert array.job_id == ""


def test_a_refusal_after_some_arrays_says_how_many_slurm_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a limit of the account is reached in between; the first array is on record."""
    calls, limit = tmp_path / "calls", "echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2; exit 1"
    commands_of(
        tmp_path / "bin",
        monkeypatch,
        squeue="true",
        scontrol="echo MaxArraySize = 2",
        sbatch=f"echo >> {calls}; [ $(wc -l < {calls}) -lt 2 ] || {{ {limit}; }}; echo 71",
    )
    config = six_tasks(tmp_path)
    with pytest.raises(SlurmError, match=r"JobLimit .*; Slurm took 1 of 3 arrays, which go on"):
        d2m.submit(config)
    [run] = (tmp_path / "out").glob(".d2m")
    assert [a.job_id for a in slurm.arrays_of(RunDir(run))["000"]] == ["71", "", ""]


def test_the_script_is_shown_and_nothing_is_written(tmp_path: Path) -> None:
    config = six_tasks(tmp_path)
    own = ["--partition=gpu", "--launcher=env", "--srun=container-image=/x=1", "--srun=mpi"]
    shown = submit_command(config, "--print-sbatch", *own)
    assert shown.returncode == 0
    first, second, *_, last = shown.stdout.splitlines()
    assert "--partition=gpu" in first
    assert second == "#!/bin/bash"
    assert last.startswith("d2m_task srun ")
    assert " --container-image=/x=1 --mpi env " in last
    assert not (tmp_path / "out").exists()


def test_each_kind_of_nodes_gets_an_array(tmp_path: Path) -> None:
    kinds = ["--gres=gpu:a100:1", "--gres=gpu:h100:1", "--constraint=ib"]
    shown = d2m_command("submit", six_tasks(tmp_path), "--no-sbatch", "--no-preflight", *kinds)
    assert shown.returncode == 0, shown.stderr
    commands = [line for line in shown.stdout.splitlines() if line.startswith("sbatch ")]
    assert [re.findall(r"--(?:gres|array|constraint)=(\S+)", line) for line in commands] == [
        ["ib", "0-2", "gpu:a100:1"],
        ["ib", "0-2", "gpu:h100:1"],
    ]


def test_slurm_is_asked_when_the_arrays_would_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real answers are in tests/slurm."""
    commands_of(
        tmp_path / "bin",
        monkeypatch,
        squeue="true",
        scontrol="echo MaxArraySize = 4",
        sbatch=f'echo "$@" >> {tmp_path}/words; cat >> {tmp_path}/scripts; echo "sbatch: Job 7 to '
        'start at noon" >&2; exit $REFUSED',
    )
    config = six_tasks(tmp_path)
    shown = submit_command(config, "--test-only")
    assert [line.partition(": ")[2] for line in shown.stdout.splitlines()] == [
        "Job 7 to start at noon"
    ] * 2
    words = (tmp_path / "words").read_text().splitlines()
    assert all(w.startswith("--test-only ") for w in words)
    assert (tmp_path / "scripts").read_text().count("#!/bin/bash") == 2
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("REFUSED", "1")
    assert submit_command(config, "--test-only").returncode == 3
