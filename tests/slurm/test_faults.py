"""Whatever becomes of tasks, nodes and submits: one result for each shard, as if nothing had been."""

from __future__ import annotations

import signal

from slurm.cluster import Cluster, wait_until
from slurm.runs import Run, Tars


def test_a_killed_process(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 4, shards_per_task=2)
    run.hold()
    run.submit()
    victim = run.wait_held(2)[0]
    victim.signal(signal.SIGKILL)
    assert cluster.wait_state(victim.element, "FAILED", "COMPLETED") == "FAILED"
    run.finish()


def test_a_cancelled_array(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 4, shards_per_task=2)
    run.hold()
    run.submit()
    run.wait_held(2)
    cluster.run("scancel", *run.job_ids())
    wait_until(lambda: not run.live())
    assert run.status()["done"] == 0
    run.finish()


def test_a_node_that_goes_down(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 4, shards_per_task=2)
    run.hold()
    run.submit()
    victim = run.wait_held(2)[0]
    cluster.set_node(victim.node, "down")
    wait_until(lambda: cluster.states().get(victim.element) != "RUNNING")
    cluster.set_node(victim.node, "resume")
    run.finish()


def test_a_preempted_task(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 4, shards_per_task=2)
    run.hold()
    run.submit()
    victim = run.wait_held(2)[0]
    high = cluster.submit("true", "--partition=high", "--exclusive", f"--nodelist={victim.node}")
    cluster.wait_state(high, "COMPLETED")
    run.let_go()
    run.wait_over()
    # Slurm's own requeue is enough.
    run.assert_complete()


def test_a_task_that_stands_still_until_its_lease_is_taken_over(
    cluster: Cluster, tars: Tars
) -> None:
    run = Run(cluster, tars, 4, shards_per_task=2, lease_seconds=4)
    run.hold(0)
    run.submit()
    [victim] = run.wait_held(1)
    victim.signal(signal.SIGSTOP)
    run.let_go()
    wait_until(lambda: run.status()["done"] == 4, 60)
    victim.signal(signal.SIGCONT)
    run.finish()
    assert len(run.submissions()) == 1
    assert "another task took it over; nothing was written" in run.logs()
