"""Array tasks that end before their shards are done: told with cause, log and what helps."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest
from kit import d2m
from slurm.cluster import Cluster, wait_until
from slurm.runs import Held, Run, Tars
from slurm.test_faults import parent

LOST = 'test "$SLURM_ARRAY_TASK_ID" != 0 || srun() { command srun /mnt/lost/bin/python; }'
GONE = 'test "$SLURM_ARRAY_TASK_ID" != 1 || kill -9 $$'


def kill(held: Held) -> None:
    """With the process that watches it, as where a node runs out of memory."""
    watching = parent(held.pid)
    os.kill(watching, signal.SIGKILL)


def causes(run: Run) -> dict[str, set[int]]:
    """The elements by cause, in the words of `d2m status --json`."""
    told = json.loads(d2m("status", run.config, "--json").stdout)["ended"]
    return {e["cause"]: {int(t.partition("_")[2]) for t in e["tasks"]} for e in told}


def test_each_end_is_told_with_its_cause_and_its_log(cluster: Cluster, tars: Tars) -> None:
    run = Run(
        cluster,
        tars,
        6,
        shards_per_task=1,
        steal=False,
        slurm={"cpus_per_task": 1, "requeue": False, "setup": [LOST, GONE]},
    )
    run.hold()
    run.submit()
    [job] = run.job_ids()
    held = {h.index: h for h in run.wait_held(4)}
    kill(held[2])
    held[3].signal(signal.SIGUSR2)  # what Slurm sends before the walltime ends
    cluster.run("scancel", f"{job}_4")
    for killed in (held[2], held[3]):
        states = ("FAILED", "PENDING", "COMPLETED")
        assert cluster.wait_state(killed.element, *states) == "FAILED"
    cluster.wait_state(held[4].element, "CANCELLED")
    cluster.set_node(held[5].node, "down")
    cluster.wait_state(held[5].element, "NODE_FAIL")
    wait_until(lambda: not run.live())
    found = run.status()
    assert (found["running"], found["tasks"]) == (0, {})  # though their leases look alive
    expected = {"not begun": {0}, "killed": {1, 2}, "walltime": {3}, "cancelled": {4}, "node": {5}}
    assert causes(run) == expected
    said = d2m("status", run.config).stdout
    walltime = "1 array task ended with 1 shard left (out of walltime); raise slurm.time, or set"
    walltime += " slurm.max_time; `d2m logs CONFIG"
    assert f"{walltime} --task {job}_3`: no shard was finished in this walltime" in said
    assert "/mnt/lost/bin/python: No such file or directory" in said
    log = d2m("logs", run.config, "--task", f"{job}_3").stdout
    assert f"slurm-{job}_3.out" in log
    assert "no shard was finished in this walltime" in log
    cluster.set_node(held[5].node, "resume")
    run.let_go()
    again = run.submit("--wait", "--set", "slurm.setup=[]").stdout
    told = [line for line in said.splitlines() if " ended with " in line and " left (" in line]
    assert len(told) == 5
    assert all(f"note: {line}" in again for line in told)
    assert causes(run) == {}
    assert len(run.submissions()) == 2
    run.assert_complete()


def test_memory_is_told_from_accounting(accounting: Cluster, tars: Tars) -> None:
    run = Run(accounting, tars, 1, slurm={"mem": 400})
    ended = run.submit("--wait", code=1)
    assert "1 array task ended with 1 shard left (out of memory" in ended.stdout
    # slurmdbd hears of it some seconds later.
    wait_until(lambda: " of 0.4 GB); raise slurm.mem" in d2m("status", run.config).stdout)
    assert causes(run) == {"memory": {0}}
    more = ("--wait", "--max-mem", "1600M")
    while (ended := run.submit(*more, code=None)).returncode:
        assert "out of memory" in ended.stdout
    memory = [array["mem"] for [array] in run.submissions()]
    assert len(memory) > 1
    assert memory == ["400", *(f"{400 << i}M" for i in range(1, len(memory)))]
    assert f"ran out of memory or walltime: 1 get --mem={memory[-1]}" in ended.stdout
    run.assert_complete()


@pytest.fixture
def accounting(cluster: Cluster) -> Iterator[Cluster]:
    cluster.up("--accounting")
    yield cluster
    cluster.cancel_all()
    cluster.up()


def test_a_script_whose_output_file_cannot_be_made_is_told_as_such(
    cluster: Cluster, tars: Tars
) -> None:
    """As where the run folder is on the login node alone."""
    run = Run(cluster, tars, 1)
    run.submit("--extra", "hold")
    element, logs = f"{run.job_ids()[0]}_0", run.run_dir / "logs"
    logs.rename(run.run_dir / "elsewhere")
    cluster.run("scontrol", "release", element)
    assert cluster.wait_state(element, "FAILED", "COMPLETED") == "FAILED"
    (run.run_dir / "elsewhere").rename(logs)
    assert causes(run) == {"not launched": {0}}
    run.submit("--wait")
    run.assert_complete()
