"""What keeps tasks from starting, and what a cluster does besides: told, and lived through."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import d2m
from slurm.cluster import PATIENCE, Cluster, wait_until
from slurm.runs import Run, Tars

SUBMIT = Path(sys.executable).with_name("d2m-submit")


def test_a_run_that_is_held_is_told_and_not_waited_for(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 4, shards_per_task=2)
    ended = run.submit("--extra", "hold", "--wait", code=3)
    [job] = run.job_ids()
    said = f"2 array tasks do not run (JobHeldUser): held by their user; `scontrol release {job}`"
    assert f"error: nothing that is left can start: {said}" in ended.stderr
    assert said in d2m("status", run.config).stdout
    assert said in run.submit().stdout
    assert len(run.submissions()) == 1
    cluster.run("scontrol", "release", job)
    assert run.submit("--wait").returncode == 0
    run.assert_complete()


def test_what_no_node_has_and_what_never_comes_is_told(cluster: Cluster, tars: Tars) -> None:
    failed = cluster.submit("false")
    cluster.wait_state(failed, "FAILED")
    run = Run(cluster, tars, 1)
    ended = run.submit("--extra", f"dependency=afterok:{failed}", "--wait", code=3)
    assert "(DependencyNeverSatisfied): the job that they wait for did not end" in ended.stderr
    [job] = run.job_ids()
    assert f"`scontrol update jobid={job} dependency=`" in ended.stderr
    cluster.run("scontrol", "update", f"jobid={job}", "dependency=")
    run.wait_over()
    run.assert_complete()


def test_nodes_that_are_drained_are_told_and_waited_for(cluster: Cluster, tars: Tars) -> None:
    for node in ("n1", "n2"):
        cluster.set_node(node, "drain")
    run = Run(cluster, tars, 1)
    run.submit()
    waiting = wait_until(lambda: [w for w in run.status()["waiting"] if "drained" in w["what"]])
    assert (waiting[0]["tasks"], waiting[0]["never"]) == (1, False)
    for node in ("n1", "n2"):
        cluster.set_node(node, "resume")
    run.wait_over()
    run.assert_complete()


def test_a_submit_from_inside_of_an_allocation_is_like_any_other(
    cluster: Cluster, tars: Tars
) -> None:
    """Of one core and little memory; its variables would bind the tasks to both."""
    run = Run(cluster, tars, 2, slurm={"cpus_per_task": 3, "mem": 2000})
    command = f"{SUBMIT} {shlex.quote(str(run.config))} --no-preflight"
    options = ["--partition=low", "--ntasks=1", "--mem-per-cpu=300", "--gres=gpu:1"]
    run.hold()
    cluster.run("env", "SBATCH_TIMELIMIT=1", "srun", *options, "bash", "-c", command)
    [held] = run.wait_held()
    environ = Path(f"/proc/{held.pid}/environ").read_bytes().split(b"\0")
    seen = dict(pair.split(b"=", 1) for pair in environ if b"=" in pair)
    assert seen[b"SLURM_CPUS_PER_TASK"] == b"3"
    assert b"SLURM_MEM_PER_CPU" not in seen
    assert b"CUDA_VISIBLE_DEVICES" not in seen
    assert cluster.field(held.element, "TimeLimit") == "01:00:00"
    run.finish()
    assert len(run.submissions()) == 1


@pytest.mark.parametrize("why", ["no-such-python", "no-package"])
def test_a_node_on_which_no_task_begins_is_left_out(cluster: Cluster, tars: Tars, why: str) -> None:
    python = {
        "no-such-python": "/mnt/lost/bin/python",
        "no-package": "/usr/bin/env -i /usr/bin/python3 -I -m d2m_hpc.worker",
    }[why]
    broken = f'test "$SLURMD_NODENAME" != n2 || srun() {{ command srun {python}; }}'
    run = Run(
        cluster,
        tars,
        8,
        shards_per_task=1,
        steal=False,
        max_node_failures=1,
        slurm={"setup": [broken]},
    )
    run.pace(1)  # each batch, so that a task takes longer than several failures
    run.submit()
    run.wait_over()
    found = run.status()
    # Not for all but the other node's first.
    assert found["done"] > 2
    assert list(found["broken_nodes"]) == ["n2"]
    assert found["broken_nodes"]["n2"].startswith("the task did not start there (srun ended with")
    assert found["failed"] == 0
    assert found["done"] < 8
    assert {e["cause"] for e in found["ended"]} == {"not begun"}
    assert "node n2 is left out for the pending elements of array" in run.logs()
    run.pace(0)
    run.submit("--wait")
    assert cluster.field(run.job_ids()[-1], "ExcNodeList") == "n2"
    run.assert_complete()


def test_a_node_that_left_the_cluster_is_forgotten(cluster: Cluster, tars: Tars) -> None:
    """sbatch refuses the name of a node that it does not know."""
    run = Run(cluster, tars, 2, max_node_failures=0, shards_per_task=1)
    run.submit("--extra", "hold")
    mark = run.run_dir / "nodes" / "1-0.json"
    mark.write_text('{"node": "n77", "why": "setup line 1 failed", "time": 1}')
    d2m("cancel", run.config)
    run.wait_over()
    run.submit("--wait")
    run.submit("--wait", "--set", "reprocess=true", "--set", "resize=exact")
    assert run.status()["done"] == 2


def test_a_walltime_that_ends_while_slurmctld_is_away(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 3)
    run.hold(after=1)
    run.submit()
    [victim] = run.wait_held()
    cluster.crash_controller(victim.element)
    victim.signal(signal.SIGUSR2)
    wait_until(lambda: "slurmctld does not take the requeue; asking again" in run.logs())
    cluster.up()
    cluster.wait_state(victim.element, "PENDING", "COMPLETED")
    run.finish()
    assert len(run.submissions()) == 1
    assert int(cluster.field(victim.element, "Restarts")) == 1


def test_a_task_that_starts_while_slurmctld_is_away_blames_no_node(
    cluster: Cluster, tars: Tars
) -> None:
    go = cluster.folder / "go"
    wait = f"echo ready; until [ -e {go} ]; do sleep 0.1; done"
    run = Run(cluster, tars, 2, shards_per_task=2, max_node_failures=0, slurm={"setup": [wait]})
    run.submit()
    wait_until(lambda: "ready" in run.logs())
    cluster.crash_controller(f"{run.job_ids()[0]}_0")
    go.touch()
    wait_until(lambda: "Unable to confirm allocation" in run.logs())
    cluster.up()
    run.wait_over()
    assert "slurmctld was away; the task is started again" in run.logs()
    assert run.status()["broken_nodes"] == {}
    assert len(run.submissions()) == 1
    run.assert_complete()


@pytest.fixture
def slow_epilog(cluster: Cluster) -> Iterator[Cluster]:
    """On a node of which a job is not gone before its epilog has ended."""
    script, conf = cluster.folder / "epilog", Path("/etc/slurm/slurm.conf").resolve()
    script.write_text("#!/bin/sh\nsleep 15\n")
    script.chmod(0o755)
    before = conf.read_text()
    conf.write_text(f"{before}Epilog={script}\n")
    cluster.run("scontrol", "reconfigure")
    yield cluster
    conf.write_text(before)
    cluster.run("scontrol", "reconfigure")
    cluster.cancel_all()


def test_a_requeued_task_is_live_while_its_epilog_runs(slow_epilog: Cluster, tars: Tars) -> None:
    run = Run(slow_epilog, tars, 2)
    run.hold()
    run.submit()
    [victim] = run.wait_held()
    waiting = run.start_submit("--wait")
    slow_epilog.run("scontrol", "requeue", victim.element)
    slow_epilog.wait_state(victim.element, "COMPLETING")
    assert "0 to do, 2 with live tasks" in run.submit().stdout
    assert run.status()["tasks"] == {"requeued": 1}
    run.let_go()
    assert "complete" in waiting.communicate(timeout=PATIENCE)[0]
    assert waiting.returncode == 0
    run.assert_complete()
    assert len(run.submissions()) == 1


def test_a_cancelled_task_is_over_while_its_epilog_runs(slow_epilog: Cluster, tars: Tars) -> None:
    run = Run(slow_epilog, tars, 2)
    run.hold()
    run.submit()
    [victim] = run.wait_held()
    assert d2m("cancel", run.config).stdout == "cancelled 1 array task\n"
    slow_epilog.wait_state(victim.element, "COMPLETING")
    time.sleep(1)
    run.let_go()
    assert "2 to do" in run.submit().stdout
    run.wait_over()
    run.assert_complete()


def test_a_live_run_follows_its_config(cluster: Cluster, tars: Tars) -> None:
    """In the tasks that may run at once, and the nodes to leave out."""
    slurm = {"cpus_per_task": 1, "max_parallel": 1}
    run = Run(cluster, tars, 3, shards_per_task=1, steal=False, slurm=slurm)
    run.hold()
    run.submit()
    run.wait_held(1)
    assert run.status()["tasks"] == {"running": 1, "pending": 2}
    said = run.submit("--max-parallel", 2).stdout
    assert "note: at most 2 tasks may run at once now, in 1 live array\n" in said
    run.wait_held(2)
    assert run.status()["tasks"] == {"running": 2, "pending": 1}
    # A node that failed long ago, and that an element has left out, is mended or gone since.
    [job] = run.job_ids()
    cluster.run("scontrol", "update", f"jobid={job}_2", "excnodelist=n2")
    (run.run_dir / "nodes" / "1-0.json").write_text('{"node": "n2", "why": "x", "time": 1}')
    assert "may run at once" not in run.submit("--max-parallel", 2, "--exclude", "n1").stdout
    assert cluster.field(f"{job}_2", "ExcNodeList") == "n1"
    told = run.submit("--set", "slurm.max_parallel=").stdout
    assert "note: all tasks may run at once now" in told
    assert cluster.field(f"{job}_2", "ExcNodeList") == "(null)"
    run.wait_held(3)
    run.finish()
