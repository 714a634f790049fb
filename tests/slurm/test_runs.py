"""Whole runs on the devcluster, and the commands around them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import STATS, d2m, write_config
from slurm.cluster import Cluster, wait_until
from slurm.runs import Run, Tars


@pytest.fixture
def small_cluster(started_cluster: None, tmp_path: Path) -> Iterator[Cluster]:
    """Arrays of four elements at most, and two GPUs a node."""
    cluster = Cluster(tmp_path)
    cluster.up("--max-array-size", 4, "--gpus-per-node", 2)
    yield cluster
    cluster.cancel_all()


def test_four_tasks_on_two_nodes_make_what_one_process_makes(
    cluster: Cluster, tars: Tars, awkward_path: Path
) -> None:
    run = Run(cluster, tars, 12, awkward_path, shards_per_task=3, slurm={"cpus_per_task": 2})
    run.hold()
    run.submit("--preflight")
    assert {h.node for h in run.wait_held(4)} == {"n1", "n2"}
    found = json.loads(d2m("status", run.config, "--json").stdout)
    assert found["tasks"] == {"running": 4}
    assert found["done"] == 0
    assert found["running"] >= 4

    # Live tasks are known even where the user's own settings would hide them from squeue.
    again = run.submit(env={**os.environ, "SQUEUE_PARTITION": "high", "SQUEUE_STATES": "PD"})
    assert "12 shards: 0 done, 0 to do, 12 with live tasks" in again.stdout
    assert len(run.live()) == 4

    run.let_go()
    run.wait_over()
    run.assert_complete()
    logs = d2m("logs", run.config, "00000")
    assert "00000: 10 rows, 0 rejected" in logs.stdout
    assert "12 done, 0 to do" in run.submit().stdout
    assert len(run.submissions()) == 1


def test_more_chunks_than_an_array_may_have(small_cluster: Cluster, tars: Tars) -> None:
    run = Run(small_cluster, tars, 11, shards_per_task=1, slurm={"max_parallel": 2})
    run.submit()
    [arrays] = run.submissions()
    assert [a["elements"] for a in arrays] == [4, 4, 3]
    most = 0

    def over() -> bool:
        nonlocal most
        live = run.live()
        most = max(most, sum(line.endswith("RUNNING") for line in live))
        return not live

    wait_until(over)
    assert most == 2
    run.assert_complete()


def test_five_thousand_chunks_are_five_arrays(cluster: Cluster) -> None:
    folder = cluster.folder / "tars"
    folder.mkdir()
    for i in range(5000):
        (folder / f"{i:05d}.tar").touch()
    config = write_config(
        cluster.folder / "c.yml",
        STATS,
        input_tars=str(folder / "{00000..04999}.tar"),
        output_metadata_dir=str(cluster.folder / "out"),
        shards_per_task=1,
    )
    said = d2m("submit", config, "--dry-run").stdout
    assert "5,000 shards: 0 done, 5,000 to do" in said
    ranges = [line.split("elements ")[1] for line in said.splitlines() if "elements" in line]
    assert ranges == ["0-1000"] * 4 + ["0-995"]
    assert not (cluster.folder / "out").exists()


def test_tasks_of_one_element_have_devices_and_logs_of_their_own(
    small_cluster: Cluster, tars: Tars
) -> None:
    options = {"tasks_per_node": 2, "cpus_per_task": 2, "gres": "gpu:2"}
    run = Run(small_cluster, tars, 4, shards_per_task=2, steal=False, slurm=options)
    run.hold()
    run.submit()
    first, second = run.wait_held(2)
    assert first.element == second.element
    assert (first.rank, second.rank) == (0, 1)
    said = [json.loads(p.read_bytes()) for p in sorted((run.run_dir / "progress").iterdir())]
    assert [t["device"] for t in said] == ["cpu of 0", "cpu of 1"]
    step = small_cluster.run("scontrol", "show", "step", f"{first.element}.0").stdout
    assert "CPUs=4" in step.split()
    run.finish()
    assert len(run.submissions()) == 1
    shards = [run.computed_by(f"000-{i}-0") for i in range(2)]
    assert [len(s) for s in shards] == [2, 2]
    assert shards[0] & shards[1] == set()
    for i in range(2):
        log = (run.run_dir / "logs" / f"000-{i}.log").read_text()
        assert {stem for stem in shards[0] | shards[1] if f"{stem}: 10 rows" in log} == shards[i]


def test_a_node_whose_setup_fails_is_left_out(cluster: Cluster, tars: Tars) -> None:
    setup = ["export GREETING='it''s set up'", 'test "$SLURMD_NODENAME" != n1']
    run = Run(
        cluster,
        tars,
        4,
        shards_per_task=2,
        steal=False,
        max_node_failures=0,
        slurm={"setup": setup},
    )
    run.submit()
    run.wait_over()
    assert run.status()["done"] == 2
    assert run.status()["failed"] == 0
    [job] = run.job_ids()
    codes = {cluster.field(f"{job}_{i}", "ExitCode") for i in range(2)}
    assert codes == {"0:0", "4:0"}
    shown = d2m("status", run.config).stdout
    assert "node n1 could not start tasks: setup line 2 failed" in shown

    assert "done" in run.submit("--wait", code=0).stdout
    assert cluster.field(run.job_ids()[-1], "ExcNodeList") == "n1"
    run.assert_complete()


def test_a_kind_of_nodes_that_is_never_free_keeps_nothing_waiting(
    cluster: Cluster, tars: Tars
) -> None:
    for node in ("n1", "n2"):
        busy = cluster.submit("sleep 1000", "--gres=gpu:1", "--time=60", f"--nodelist={node}")
        cluster.wait_state(busy, "RUNNING")
    # By the walltime, Slurm lets the free kind go first.
    slurm = {"gres": ["gpu:1", "gpu:0"], "cpus_per_task": 1, "time": 10}
    run = Run(cluster, tars, 4, shards_per_task=1, slurm=slurm)
    run.submit("--wait")
    free, taken = run.job_ids()[::-1]
    assert cluster.field(taken, "JobState") == "CANCELLED"
    assert "COMPLETED" in cluster.field(f"{free}_0", "JobState")
    run.assert_complete()


def test_a_broken_node_fails_no_shard(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 2, device=0)
    run.submit()
    run.wait_over()
    assert cluster.field(f"{run.job_ids()[0]}_0", "ExitCode") == "4:0"
    found = run.status()
    assert (found["pending"], found["failed"]) == (2, 0)
    [(node, why)] = found["broken_nodes"].items()
    assert node in ("n1", "n2")
    assert why.startswith("device 0 is not usable")
    run.finish("--set", "device=cpu")


def test_a_shard_that_fails_makes_wait_exit_1_and_is_tried_once(
    cluster: Cluster, tars: Tars
) -> None:
    broken = cluster.folder / "broken.tar"
    broken.write_bytes(b"not a tar" * 100)
    patterns = [str(tars.folder / "{00000..00001}.tar"), str(broken)]
    run = Run(cluster, tars, 2, shards_per_task=2, input_tars=patterns)
    ended = run.submit("--wait", code=1)
    assert "broken.tar is no tar: it is text" in ended.stdout
    found = run.status()
    assert (found["done"], found["failed"], found["pending"]) == (2, 1, 0)
    records = [p.read_text() for p in (run.run_dir / "records").iterdir()]
    assert "".join(records).count('"state":"failed"') == 1


def test_a_refusal_is_told_in_slurms_words_and_loses_nothing(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 2)
    run.hold()
    refused = run.submit("--partition", "nope", code=3)
    assert "invalid partition specified: nope" in refused.stderr
    assert "check slurm.partition against `sinfo`" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert run.live() == []
    assert "2 to do" in run.submit().stdout
    assert len(run.live()) == 1


def test_slurm_says_when_tasks_would_start_and_a_launcher_starts_them(
    cluster: Cluster, tars: Tars
) -> None:
    wrapped = ["env", "--chdir=/", "D2M_LAUNCHED=1"]
    slurm = {"srun": {"label": True, "comment": "it's"}, "launcher": wrapped}
    run = Run(cluster, tars, 2, slurm=slurm)
    said = run.submit("--test-only").stdout
    assert "to start at" in said
    assert "in partition low" in said
    assert "is not available" in run.submit("--test-only", "--mem=9T", code=3).stderr
    assert not run.run_dir.exists()
    run.submit("--wait")
    run.assert_complete()


def test_a_task_that_took_all_shards_cancels_the_elements_that_wait(
    cluster: Cluster, tars: Tars
) -> None:
    run = Run(cluster, tars, 12, shards_per_task=1, slurm={"max_parallel": 1})
    run.submit("--wait")
    run.assert_complete()
    assert [p.name for p in (run.run_dir / "logs").glob("*.log")] == ["000-0.log"]


def test_the_plain_template_runs_the_same_tasks(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 4, shards_per_task=2, slurm={"cpus_per_task": 2})
    said = d2m("submit", run.config, "--no-sbatch", "--no-preflight").stdout
    command = next(line for line in said.splitlines() if line.startswith("sbatch "))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(command, shell=True, check=True, cwd=root, env=environment)
    assert "0 to do, 4 with live tasks" in run.submit().stdout
    run.wait_over()
    run.assert_complete()


def test_the_command_line_wins_over_the_users_sbatch_variables(
    cluster: Cluster, tars: Tars
) -> None:
    run = Run(cluster, tars, 1)
    run.hold()
    run.submit("--partition", "low", env={**os.environ, "SBATCH_PARTITION": "high"})
    assert cluster.field(f"{run.job_ids()[0]}_0", "Partition") == "low"


CLOSING = """
import subprocess

from d2m_hpc import cli
from d2m_hpc.launch import slurm

write = slurm.write_arrays
calls = []


def write_and_close(*arguments):
    write(*arguments)
    calls.append(arguments)
    if len(calls) == 2:
        command = ["scontrol", "update", "partitionname=low", "state=inactive"]
        subprocess.run(command, check=True)


slurm.write_arrays = write_and_close
cli.main_submit()
"""


def test_what_was_taken_before_a_refusal_stays_on_record(
    small_cluster: Cluster, tars: Tars
) -> None:
    run = Run(small_cluster, tars, 6, shards_per_task=1)
    run.hold()
    command = [sys.executable, "-c", CLOSING, str(run.config), "--no-preflight"]
    try:
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
    finally:
        small_cluster.run("scontrol", "update", "partitionname=low", "state=up")
    assert ended.returncode == 3, ended.stderr
    first, second = run.job_ids()
    assert first
    assert not second
    assert len(run.live()) == 4
    assert "6 shards: 0 done, 2 to do, 4 with live tasks" in run.submit().stdout
    assert len(run.live()) == 6


@pytest.mark.parametrize("steal", [True, False])
def test_a_fast_task_helps_a_slow_one_where_it_may(
    cluster: Cluster, tars: Tars, steal: bool
) -> None:
    run = Run(cluster, tars, 10, shards_per_task=5, steal=steal)
    run.hold(0)
    run.submit()
    [slow] = run.wait_held()
    cluster.wait_state(slow.element.replace("_0", "_1"), "COMPLETED")
    found = run.status()
    # A task holds the shards that it reads ahead of the one it computes, two at most.
    assert 1 <= found["running"] <= 3
    assert found["done"] == (10 - found["running"] if steal else 5)
    assert ("taken from a slower task" in run.logs()) == steal
    run.finish()
    assert len(run.submissions()) == 1


def test_a_task_that_stalls_says_where_and_lets_go(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 2, stall_seconds=6)
    run.hold()
    run.submit()
    [victim] = run.wait_held()
    assert cluster.wait_state(victim.element, "FAILED", "COMPLETED") == "FAILED"
    # The process ends with 5; the one that watches it goes on with the rest, and counts failures.
    assert cluster.field(victim.element, "ExitCode") == "1:0"
    failed = run.status()["failures"]
    assert [sorted(f["shards"]) for f in failed] == [["00000", "00001"]]
    assert "stalled: nothing happened for 6 s" in failed[0]["error"]
    assert "all stacks follow" in run.logs()
    assert f'File "{run.folder}/gated.py"' in run.logs()
    assert list((run.run_dir / "leases").iterdir()) == []
    run.finish("--set", "stall_seconds=600")


def test_cancel_and_resume_with_accounting(
    started_cluster: None, tmp_path: Path, tars: Tars
) -> None:
    cluster = Cluster(tmp_path)
    cluster.up("--accounting")
    run = Run(cluster, tars, 4, shards_per_task=2)
    run.hold()
    run.submit()
    run.wait_held(2)
    assert run.status()["tasks"] == {"running": 2}
    assert d2m("cancel", run.config).stdout == "cancelled 2 array tasks\n"
    wait_until(lambda: not run.live())
    assert run.status()["running"] == 0
    assert run.status()["pending"] == 4
    assert d2m("cancel", run.config).stdout == "cancelled 0 array tasks\n"
    run.finish()
    assert len(run.submissions()) == 2
