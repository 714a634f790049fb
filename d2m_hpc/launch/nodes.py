"""Nodes that could not start their tasks, and which of them to leave out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from d2m_hpc.state.manifest import Manifest
from d2m_hpc.state.rundir import RunDir


@dataclass(frozen=True)
class NodeFailure:
    """A task that ended before it touched a shard. `time` is in seconds since the epoch."""

    node: str
    why: str
    time: float


def failures(run: RunDir) -> list[NodeFailure]:
    """All that tasks wrote down, oldest first."""
    found = []
    for path in run.node_failures.glob("*.json") if run.node_failures.is_dir() else ():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # it is being written
        found.append(NodeFailure(values["node"], values["why"], float(values["time"])))
    return sorted(found, key=lambda f: f.time)


def last_finished(manifest: Manifest) -> dict[str, float]:
    """When each node last finished a shard, in seconds since the epoch."""
    last: dict[str, float] = {}
    for outcome in manifest.done.values():
        last[outcome.host] = max(last.get(outcome.host, 0.0), outcome.finished)
    return last


def in_a_row(run: RunDir, finished: Mapping[str, float]) -> dict[str, list[NodeFailure]]:
    """For each node its failures since a shard was last finished there."""
    rows: dict[str, list[NodeFailure]] = defaultdict(list)
    for failure in failures(run):
        if failure.time > finished.get(failure.node, 0.0):
            rows[failure.node].append(failure)
    return dict(rows)


def broken(run: RunDir, manifest: Manifest) -> dict[str, str]:
    """Why each node that finished nothing since could not start its last task."""
    return {n: row[-1].why for n, row in in_a_row(run, last_finished(manifest)).items()}


def to_exclude(run: RunDir, finished: Mapping[str, float], most: int) -> list[str]:
    """Nodes that failed more than `most` tasks in a row, while another node finished shards.

    Where none did, the fault is rather the config's, and no node would be left to try it on.

    Args:
        finished: when each node last finished a shard.
    """
    return sorted(
        node
        for node, row in in_a_row(run, finished).items()
        if len(row) > most
        and any(time > row[0].time for other, time in finished.items() if other != node)
    )
