"""Derived columns on the devcluster: the first steps in a job, then array tasks like a submit's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kit import STATS, d2m, write_config, write_shards
from slurm.cluster import Cluster, wait_until
from slurm.holding import write_holding

import d2m_hpc
from d2m_hpc.run.records import read_records

PATCH = """
def patch(derive):
    whole = derive.Deriver.__call__

    def call(self, stem, *given):
        stand(stem)
        return whole(self, stem, *given)

    derive.Deriver.__call__ = call
"""
SHARDS = 6


def config_of(folder: Path, tars: Path, **more: Any) -> Path:
    derive = {
        "cluster": {"kind": "clusters", "feature": "image-histogram", "count": 3},
        "weighed": {"kind": "sql", "expression": '"image-brightness" * cluster'},
    }
    places = {"input_tars": f"{tars}/*.tar", "output_metadata_dir": str(folder / "out")}
    return write_config(folder / "c.yml", STATS, derive=derive, **places, **more)


def kill_at(cluster: Cluster, stem: str) -> None:
    """Kill the task that stands at a shard, as Slurm's own last word, and let the shard go."""
    held = cluster.folder / f"held-{stem}"
    element = wait_until(lambda: held.exists() and held.read_text())
    jobs = (cluster.folder / "out" / ".d2m" / "submissions").glob("*/jobs.json")
    [array] = json.loads(max(jobs).read_bytes())
    cluster.run("scancel", "-f", "-s", "KILL", f"{array['job_id']}_{element}")
    wait_until(lambda: f"{array['job_id']}_{element}" not in cluster.states())
    held.with_name(f"hold-{stem}").unlink()


def test_a_derive_goes_on_after_its_tasks_are_killed(cluster: Cluster) -> None:
    """By the same command, and by itself with --until-done."""
    folder, tars = cluster.folder, cluster.folder / "tars"
    write_shards(tars, SHARDS, 10)
    expected = config_of(folder / "here", tars)
    d2m_hpc.submit(expected, local=True)
    table = d2m_hpc.derive(expected, local=True).table()

    setup = write_holding(folder, "d2m_hpc.worker.derive", PATCH)
    slurm = {"partition": "low", "cpus_per_task": 4, "setup": [setup]}
    config = config_of(folder, tars, slurm=slurm, shards_per_task=SHARDS, lease_seconds=2)
    run = d2m_hpc.submit(config, local=True)
    planned = d2m("derive", config, "--dry-run")
    assert f"{SHARDS} shards: 0 done, {SHARDS} to do" in planned.stdout
    assert "first steps are done before: cluster" in planned.stdout
    for stem in ("00001", "00004"):
        (folder / f"hold-{stem}").touch()

    d2m_hpc.derive(config)
    kill_at(cluster, "00001")
    again = d2m("derive", config, "--until-done", env={**os.environ, "D2M_REPORT": "false"})
    assert again.returncode == 0, again.stdout + again.stderr
    kill_at(cluster, "00004")
    run.wait()
    status = run.status()
    assert (status.done, status.failed) == (SHARDS, 0)
    assert run.table().equals(table)
    assert run.verify().faults == []
    records = [r for f in (run.path / "records").glob("*.jsonl") for r in read_records(f)]
    derived = sorted(r.shard for r in records if "+" in r.fingerprint)
    assert derived == [f"{i:05d}" for i in range(SHARDS)]
