"""What Slurm's commands are run with, and what becomes of those that fail or hang."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from d2m_hpc.errors import SlurmError
from d2m_hpc.launch import commands, slurm
from d2m_hpc.run.folder import RunDir


def script(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that come before the machine's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


ALLOCATION = {
    "SLURM_JOB_ID": "71",
    "SLURM_MEM_PER_NODE": "900",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURMD_NODENAME": "n9",
    "SBATCH_TIMELIMIT": "1",
    "SRUN_CPUS_PER_TASK": "7",
    "SALLOC_PARTITION": "debug",
    "SQUEUE_STATES": "PD",
    "SCANCEL_INTERACTIVE": "1",
    "CUDA_VISIBLE_DEVICES": "3",
    "ROCR_VISIBLE_DEVICES": "3",
    "TMPDIR": "/scratch/job.71",
}
KEPT = {"SLURM_CONF": "/x/slurm.conf", "SLURM_JWT": "t", "SLURM_CLUSTERS": "a", "SLURMP_X": "mine"}


def test_of_the_callers_allocation_nothing_reaches_slurm(
    bin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**ALLOCATION, **KEPT, "HOME_OF": "71"}.items():
        monkeypatch.setenv(name, value)
    script(bin_dir, "sinfo", "env -0")
    shown = dict(pair.split("=", 1) for pair in commands.ask("sinfo").split("\0") if pair)
    assert shown.keys() & ALLOCATION.keys() == set()
    assert {name: shown[name] for name in KEPT} == KEPT
    assert shown["HOME_OF"] == "71"


def test_outside_of_an_allocation_devices_and_folders_are_the_users() -> None:
    mine = {"CUDA_VISIBLE_DEVICES": "1", "TMPDIR": "/big/71", "SBATCH_QOS": "low"}
    assert commands.callers(mine) == {"SBATCH_QOS"}
    assert "TMPDIR" not in commands.callers({"TMPDIR": "/big/171", "SLURM_JOB_ID": "71"})


def test_a_command_that_does_not_answer_is_given_up(bin_dir: Path) -> None:
    script(bin_dir, "squeue", "exec sleep 60")
    with pytest.raises(SlurmError, match=r"not answer within 0\.5 s; `scontrol ping`"):
        commands.ask("squeue", seconds=0.5)


AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def test_a_controller_that_is_away_is_asked_again_and_that_is_told_once(
    bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(commands, "PAUSE", 0.05)
    calls = tmp_path / "calls"
    script(
        bin_dir,
        "squeue",
        f'echo >> {calls}; [ $(wc -l < {calls}) -gt 3 ] || {{ echo "{AWAY}" >&2; exit 1; }}\n'
        "echo '7|0|RUNNING|None|n1|a'",
    )
    [element] = slurm.queue(RunDir(bin_dir), patience=60).all
    assert element.job_id == "7"
    [told] = caplog.messages
    assert told == f"squeue failed: {AWAY}; {commands.PING}; asking again for up to 60 s"


@pytest.mark.parametrize(("words", "patience"), [(AWAY, 0.2), ("Invalid user", 60), (AWAY, 0)])
def test_only_a_controller_that_is_away_is_waited_for_and_not_for_ever(
    bin_dir: Path, monkeypatch: pytest.MonkeyPatch, words: str, patience: float
) -> None:
    monkeypatch.setattr(commands, "PAUSE", 0.05)
    script(bin_dir, "squeue", f'echo "{words}" >&2; exit 1')
    with pytest.raises(SlurmError, match=words[:12]):
        slurm.queue(RunDir(bin_dir), patience)


def test_an_error_says_more_only_where_the_controller_is_away(bin_dir: Path) -> None:
    script(bin_dir, "scontrol", 'echo "$1" >&2; exit 1')
    with pytest.raises(SlurmError, match=r"\(connect failure\); slurmctld does not answer; `scon"):
        commands.ask("scontrol", AWAY)
    with pytest.raises(SlurmError, match=r"failed: Invalid user$"):
        commands.ask("scontrol", "Invalid user")


def test_words_too_long_for_the_system_are_an_error_of_slurms(bin_dir: Path) -> None:
    script(bin_dir, "scancel", "true")
    with pytest.raises(SlurmError, match="scancel cannot be started"):
        commands.ask("scancel", "7" * 3_000_000)


def test_what_is_no_utf8_is_read_all_the_same(bin_dir: Path) -> None:
    script(bin_dir, "squeue", r"printf '7|0|RUNNING|None|n1|caf\xe9\n'")
    [element] = slurm.queue(RunDir(bin_dir)).all
    assert (element.job_id, element.name) == ("7", "caf\N{REPLACEMENT CHARACTER}")


def test_any_number_of_jobs_is_cancelled(bin_dir: Path, tmp_path: Path) -> None:
    """Each command line stays short of what the system takes, 2 MB or less."""
    script(bin_dir, "scancel", f'printf "%s\\n" "$@" >> {tmp_path}/seen; echo >> {tmp_path}/calls')
    jobs = [f"9{i:06d}_{i % 977}" for i in range(130_000)]
    slurm.cancel(jobs)
    assert (tmp_path / "seen").read_text().split() == jobs
    assert len((tmp_path / "calls").read_text().splitlines()) < 1000


def test_the_clusters_nodes_are_asked_for_once_each(bin_dir: Path) -> None:
    script(bin_dir, "sinfo", "printf 'a1\\na1\\nb-2\\n'")
    assert slurm.node_names() == {"a1", "b-2"}
    script(bin_dir, "sinfo", "exit 1")
    assert slurm.node_names() == set()
