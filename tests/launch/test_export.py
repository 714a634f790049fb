"""An export by tasks, on a scripted Slurm; tests/slurm has it on a real one."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from kit import d2m as command
from launch.scripted import commands_of, six_tasks

import d2m_hpc as d2m
from d2m_hpc.errors import ConfigError, D2MError, SlurmError
from d2m_hpc.launch import export


class Site:
    """A scripted Slurm; its jobs run when the test says so, and its srun drops its options."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, **slurm: Any) -> None:
        self.folder, self.patch = folder, patch
        self.config = six_tasks(folder, slurm=slurm)
        self.run = d2m.submit(self.config, local=True)
        self.lists, self.out = folder / "kept.jsonl", folder / "kept"
        self.run.select(self.lists, "caption LIKE '%1'")
        asked = f'printf "%s\\n" "$*" >> {folder}/asked; cat > {folder}/script; echo 71'
        srun = 'while [[ $1 == -* ]]; do shift; done; exec "$@"'
        commands_of(folder / "bin", patch, scontrol="true", sbatch=asked, srun=srun)
        self.lists_tasks()

    def lists_tasks(self, *shares: int, state: str = "RUNNING") -> None:
        name = self.asked()[-1].partition("--job-name=")[2].split()[0] if shares else ""
        lines = "".join(f"71|{i}|{state}|None||{name}\\n" for i in shares)
        commands_of(self.folder / "bin", self.patch, squeue=f"printf '{lines}'")

    def asked(self) -> list[str]:
        """The words of each sbatch."""
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def array(self) -> str:
        """The elements that the last sbatch asked for."""
        return self.asked()[-1].partition("--array=")[2].split()[0]

    def start(self, tasks: int = 3, **slurm: Any) -> export.ExportTasks:
        return self.run.export_tasks(self.out, self.lists, tasks, slurm)

    def work(self, share: int) -> subprocess.CompletedProcess[str]:
        """Do what Slurm does for an element."""
        words = ["bash", str(self.folder / "script")]
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(share)}
        return subprocess.run(words, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_the_same_command_starts_the_tasks_that_are_needed(site: Site, tmp_path: Path) -> None:
    found = site.start()
    assert (found.started, found.live, found.job, site.array()) == ({1, 2, 3}, set(), "71", "1,2,3")
    # Tasks that wait or run are not started twice.
    site.lists_tasks(1, 3)
    again = site.start()
    assert (again.started, again.live, site.array()) == ({2}, {1, 3}, "2")
    done = site.work(1)
    assert done.returncode == 0, done.stderr
    assert "2 rows of 2 shards, 2 parts written" in done.stdout
    # An element that failed or ended is no live one; nor is one whose part is done started.
    site.lists_tasks(1, 2, 3, state="FAILED")
    assert site.start().started == {2, 3}
    for share in (2, 3):
        assert site.work(share).returncode == 0
    site.run.export("subset-tars", tmp_path / "at-once", lists=site.lists)
    for path in (tmp_path / "at-once").glob("*.tar"):
        assert (site.out / path.name).read_bytes() == path.read_bytes()
    before = len(site.asked())
    assert (site.start().started, site.start().job) == (set(), "")
    assert len(site.asked()) == before


def test_a_queued_task_works_by_the_lists_of_its_command(site: Site) -> None:
    site.start(1)
    site.run.select(site.lists, "key < '00002'")
    site.lists_tasks(1, state="PENDING")
    with pytest.raises(
        D2MError, match="with other lists or another --tasks, wait or run; wait for"
    ):
        site.start(1)
    with pytest.raises(D2MError, match="tasks of an earlier command"):
        site.start(2)
    site.lists.unlink()
    assert "6 rows of 6 shards, 6 parts written" in site.work(1).stdout


def test_a_queued_task_leaves_a_folder_that_was_given_to_another_export(site: Site) -> None:
    site.start(1)
    site.run.export("subset-tars", site.out, lists=site.lists)
    late = site.work(1)
    assert late.returncode == 1
    assert "is not, or no longer, of these lists and --tasks 1" in late.stderr
    assert "Traceback" not in late.stderr


def test_the_options_are_the_users_then_the_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = {"partition": "cpu", "mem": "8G", "time": 5}
    config = {
        "partition": "gpu",
        "gres": "gpu:1",
        "time": "2:00:00",
        "cpus_per_task": 16,
        "exclude": "n9",
        "tasks_per_node": 4,
    }
    more = {"setup": ["export SET=yes"], "launcher": ["env", "IN=box"], "srun": {"mpi": "none"}}
    site = Site(tmp_path, monkeypatch, rounds=rounds, max_parallel=2, **config, **more)
    site.start()
    options = {"--partition=cpu", "--mem=8G", "--time=2:00:00", "--cpus-per-task=4", "--requeue"}
    assert options | {"--exclude=n9", "--array=1,2,3%2", "--open-mode=append"} <= {
        *site.asked()[-1].split()
    }
    assert not {"gres", "ntasks"} & {*re.split(r"\W+", site.asked()[-1])}
    assert "--signal" not in site.asked()[-1]
    script = (tmp_path / "script").read_text().splitlines()
    assert script[1].startswith("eval 'export SET=yes' || ")
    assert script[2].startswith("srun -n1 --cpus-per-task=4 --mpi=none env IN=box ")
    assert script[2].endswith(' --tasks 3 --part "$SLURM_ARRAY_TASK_ID"')
    assert site.work(1).returncode == 0
    site.start(time="9:00", partition="big", gres=["gpu:2"], cpus_per_task=2)
    users = {"--partition=big", "--time=9:00", "--gres=gpu:2", "--cpus-per-task=2", "--mem=8G"}
    assert users <= {*site.asked()[-1].split()}
    site.start(setup=["export SET=yes", "[ $SET = no ]"])
    failed = site.work(2)
    assert (failed.returncode, failed.stderr) == (4, "setup line 2 failed\n")
    with pytest.raises(ConfigError, match=r"slurm.partitio: unknown key"):
        site.start(partitio="x")
    with pytest.raises(ConfigError, match=r"time: found 'soon'"):
        site.start(time="soon")


def test_wait_names_the_parts_that_are_not_complete_and_their_logs(site: Site) -> None:
    site.start()
    site.work(1)
    log = next(word for word in site.asked()[-1].split() if "--output=" in word).partition("=")[2]
    ended = command(
        *("export", "subset-tars", site.config, "-o", site.out, "--lists", site.lists),
        *("--tasks", 3, "--wait"),
    )
    assert ended.returncode == 1
    assert ended.stdout.splitlines() == [
        "array 71: 2 tasks started",
        *(
            f"part {i} of 3 is not complete; see {site.run.path}/logs/{log.replace('%a', str(i))}"
            for i in (2, 3)
        ),
    ]
    for share in (2, 3):
        site.work(share)
    again = command(
        *("export", "subset-tars", site.config, "-o", site.out, "--lists", site.lists),
        *("--tasks", 3, "--wait"),
    )
    assert again.returncode == 0
    assert again.stdout.splitlines() == [
        "all tars are there",
        f"6 rows of 6 shards, 0 parts written, 6 were there: {site.out}",
    ]


def test_a_refused_array_leaves_the_folder_to_the_same_command(site: Site) -> None:
    commands_of(
        site.folder / "bin",
        site.patch,
        sbatch="echo 'sbatch: error: invalid partition' >&2; exit 1",
    )
    with pytest.raises(SlurmError, match="invalid partition"):
        site.start()
    site.run.export("subset-tars", site.out, lists=site.lists)
    assert site.start().started == set()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "-1"], "--tasks: found -1; valid is 1 or more"),
        (["--tasks", "0"], "--tasks: found 0; valid is 1 or more"),
        (["--tasks", "2", "--part", "3"], "--part: found 3 of 2 tasks; valid is 1 to 2"),
        (["--part", "1"], "--part is of array tasks; add --tasks N"),
        (["--wait"], "--wait is of array tasks; add --tasks N"),
        (["--cpus-per-task", "2"], "--cpus-per-task is of array tasks; add --tasks N"),
        (["--tasks", "2", "--partition", "no\nline"], "partition"),
        *(
            (["--tasks", "2", "--extra", f"{name}=x"], f"slurm.extra: found '{name}', which is")
            for name in ("array", "arr", "job-name", "output", "chdir", "signal", "ntasks-per-node")
        ),
        (["--tasks", "2", "--tasks-per-node", "1"], "slurm.tasks_per_node: found '1'; it is of a"),
        (["--tasks", "2", "--max-mem", "9G"], "slurm.max_mem: found '9G'; it is of a submit alone"),
        (["--tasks", "2", "--gres", "a", "--gres", "b"], "slurm.gres: found several kinds of"),
        (["--tasks", "2", "--rounds", "begin=now"], "slurm.rounds: found 'begin', which is set"),
    ],
)
def test_mistakes_are_told_in_a_line(site: Site, words: list[str], told: str) -> None:
    base = ["export", "subset-tars", site.config, "-o", site.out, "--lists", site.lists]
    ended = command(*base, *words)
    assert ended.returncode == 2, ended.stdout
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr
    assert site.asked() == []


def test_without_slurm_it_says_so(site: Site) -> None:
    site.patch.setenv("PATH", "/nowhere")
    with pytest.raises(
        SlurmError, match="no sbatch here; go to a login node, or leave out --tasks"
    ):
        site.start()
