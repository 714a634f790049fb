"""Nodes that could not start their tasks, and which of them to leave out."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest

FORGOTTEN_SECONDS = 86400.0
"""After which a failure says no more of its node, which may have been mended or replaced."""


@dataclass(frozen=True)
class NodeFailure:
    """A task that ended before it touched a shard.

    Attributes:
        time: in seconds since the epoch, by the node's clock.
        written: the same by the filesystem's.
    """

    node: str
    why: str
    time: float
    written: float


def failures(run: RunDir) -> list[NodeFailure]:
    """All that tasks wrote down, oldest first."""
    found = []
    for path in run.node_failures.glob("*.json") if run.node_failures.is_dir() else ():
        try:
            values, written = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime
            node, why, when = str(values["node"]), str(values["why"]), float(values["time"])
        except (ValueError, KeyError, TypeError, OSError):
            continue  # it is being written, or damaged
        found.append(NodeFailure(node, why, when, written))
    return sorted(found, key=lambda f: f.time)


def last_finished(manifest: Manifest) -> dict[str, float]:
    """When each node last finished a shard, in seconds since the epoch."""
    last: dict[str, float] = {}
    for outcome in manifest.done.values():
        last[outcome.host] = max(last.get(outcome.host, 0.0), outcome.finished)
    return last


def in_a_row(run: RunDir, finished: Mapping[str, float]) -> dict[str, list[NodeFailure]]:
    """For each node its failures since a shard was last finished there, of the last day.

    A node that was mended has finished nothing, as nobody was sent there.
    """
    rows: dict[str, list[NodeFailure]] = defaultdict(list)
    oldest = time.time() - FORGOTTEN_SECONDS
    for failure in failures(run):
        if failure.written > oldest and failure.time > finished.get(failure.node, 0.0):
            rows[failure.node].append(failure)
    return dict(rows)


def broken(run: RunDir, manifest: Manifest) -> dict[str, str]:
    """Why each node that finished nothing since could not start its last task."""
    return {n: row[-1].why for n, row in in_a_row(run, last_finished(manifest)).items()}


def to_exclude(
    run: RunDir, finished: Mapping[str, float], most: int, known: Collection[str] = ()
) -> list[str]:
    """Nodes that failed more than `most` tasks in a row, while another node finished shards.

    Where none did, the fault is rather the config's, and no node would be left to try it on.

    Args:
        finished: when each node last finished a shard.
        known: the cluster's nodes, where it could be asked: sbatch refuses the name of another.
    """
    return sorted(
        node
        for node, row in in_a_row(run, finished).items()
        if len(row) > most
        and (not known or node in known)
        and any(time > row[0].time for other, time in finished.items() if other != node)
    )
