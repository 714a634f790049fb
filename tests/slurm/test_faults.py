"""Whatever becomes of tasks, nodes and submits: one result for each shard, as undisturbed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from slurm.cluster import PATIENCE, Cluster, wait_until
from slurm.runs import Run, Tars


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def parent(pid: int) -> int:
    """The process that watches a task's own."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_killed_process_is_followed_by_another(cluster: Cluster, tars: Tars) -> None:
    """In the same element: a parent, which computes nothing, sees it die."""
    run = Run(cluster, tars, 2)
    run.hold()
    run.submit()
    [victim] = run.wait_held()
    victim.signal(signal.SIGKILL)
    wait_until(lambda: not is_alive(victim.pid))
    run.let_go()
    run.wait_over()
    run.assert_complete()
    assert len(run.submissions()) == 1
    assert "SIGKILL" in run.logs()


def test_a_cancelled_array(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 4, shards_per_task=2)
    run.hold()
    run.submit()
    run.wait_held(2)
    cluster.run("scancel", *run.job_ids())
    wait_until(lambda: not run.live())
    assert run.status()["done"] == 0
    assert not list((run.run_dir / "leases").iterdir())  # they were let go of, not left to expire
    run.finish()
    assert len(run.submissions()) == 2


def test_a_node_that_goes_down(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 2)
    run.hold()
    run.submit()
    [victim] = run.wait_held()
    cluster.set_node(victim.node, "down")
    cluster.wait_state(victim.element, "PENDING")
    # A machine that comes back has no processes of the time before.
    wait_until(lambda: not is_alive(victim.pid))
    cluster.set_node(victim.node, "resume")
    run.finish()
    assert len(run.submissions()) == 1


def test_a_preempted_task(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 2)
    run.hold()
    run.submit()
    [victim] = run.wait_held()
    high = cluster.submit("true", "--partition=high", "--exclusive", f"--nodelist={victim.node}")
    cluster.wait_state(high, "COMPLETED")
    run.finish()
    assert len(run.submissions()) == 1  # Slurm's own requeue is enough
    assert int(cluster.field(victim.element, "Restarts")) == 1


def test_a_task_that_stands_still_until_its_lease_is_taken_over(
    cluster: Cluster, tars: Tars
) -> None:
    run = Run(cluster, tars, 2, lease_seconds=4)
    run.hold(0)
    run.submit()
    [victim] = run.wait_held()
    victim.signal(signal.SIGSTOP)
    run.let_go()
    # Its element runs again elsewhere, as when Slurm lost sight of a node that lives on.
    worker = shlex.join([sys.executable, "-m", "d2m_hpc.worker", str(run.run_dir), "000", "0", "1"])
    again = cluster.submit(f"SLURM_RESTART_COUNT=1 {worker}")
    assert cluster.wait_state(again, "COMPLETED", "FAILED") == "COMPLETED"
    assert run.status()["done"] == 2
    victim.signal(signal.SIGCONT)
    run.finish()
    assert len(run.submissions()) == 1
    assert "another task took it over; nothing is written" in run.logs()


def test_a_walltime_that_ends_in_mid_run(cluster: Cluster, tars: Tars) -> None:
    """Slurm's signal comes 120 s before the end, and it looks twice a minute."""
    run = Run(cluster, tars, 3, slurm={"time": 60})
    run.hold(after=1)
    run.submit()
    [victim] = run.wait_held()
    cluster.set_time(victim.element, 1)
    cluster.wait_state(victim.element, "PENDING")
    cluster.set_time(victim.element, 60)
    run.finish()
    assert len(run.submissions()) == 1
    assert run.computed_by("000-0-0") == {"00000"}


def test_a_walltime_too_short_for_a_shard_ends_the_task(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 2, slurm={"time": 30, "max_time": 45})
    run.hold()
    run.submit()
    [victim] = run.wait_held()
    cluster.run("scancel", "--signal=USR2", victim.element)  # what Slurm sends before the end
    assert cluster.wait_state(victim.element, "FAILED", "PENDING", "COMPLETED") == "FAILED"
    assert "no shard was finished in this walltime; raise slurm.time" in run.logs()
    run.finish()
    assert [array["time"] for [array] in run.submissions()] == [
        "30",
        "45",
    ]  # doubled up to the bound


def test_a_task_begins_no_shard_that_its_walltime_has_no_room_for(
    cluster: Cluster, tars: Tars
) -> None:
    seconds = 45
    early = 'test -n "$SLURM_RESTART_COUNT" || '
    early += f"export SLURM_JOB_END_TIME=$(( $(date +%s) + {seconds} ))"
    run = Run(cluster, tars, 6, slurm={"setup": [early]})
    run.hold()
    run.submit()
    [victim] = run.wait_held()
    start = datetime.fromisoformat(cluster.field(victim.element, "StartTime")).timestamp()
    wait_until(lambda: time.time() > start + seconds + 1)
    run.let_go()
    cluster.wait_state(victim.element, "PENDING")
    assert 0 < run.status()["done"] < 6
    run.finish()
    assert len(run.submissions()) == 1


DYING = """
import os
import signal
import sys

from d2m_hpc import cli
from d2m_hpc.launch import slurm

write = slurm.write_arrays
calls = []


def write_or_die(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)


slurm.write_arrays = write_or_die
cli.main_submit()
"""


def test_a_submit_that_is_killed_before_it_wrote_down_the_job(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 2)
    run.hold()
    command = [sys.executable, "-c", DYING, str(run.config), "--no-preflight"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert run.job_ids() == [""]
    assert len(run.live()) == 1
    assert "0 to do, 2 with live tasks" in run.submit().stdout
    assert len(run.live()) == 1
    run.finish()
    assert run.job_ids() == [""]


def test_two_submits_at_once_are_one_array(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 2)
    run.hold()
    both = [run.start_submit() for _ in range(2)]
    said = [p.communicate(timeout=PATIENCE)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert sum("0 to do, 2 with live tasks" in words for words in said) == 1
    assert len(run.submissions()) == len(run.live()) == 1
    run.finish()
    assert len(run.submissions()) == 1
