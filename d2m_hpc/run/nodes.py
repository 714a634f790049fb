"""Nodes that failed to start tasks, and the choice of nodes to leave out."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest

FORGOTTEN_SECONDS = 86400.0
"""The age at which a failure does not count any more: its node may have been mended."""


@dataclass(frozen=True)
class NodeFailure:
    """A task that ended before it touched a shard.

    Attributes:
        time: seconds since the epoch, by the node's clock.
        written: seconds since the epoch, by the filesystem's clock.
    """

    node: str
    why: str
    time: float
    written: float

    @property
    def earliest(self) -> float:
        """The earlier of the two times, which other nodes' clocks are compared with."""
        return min(self.time, self.written)


def failures(run: RunDir) -> list[NodeFailure]:
    """Read all failures that tasks wrote down, oldest first."""
    found = []
    for path in run.node_failures.glob("*.json") if run.node_failures.is_dir() else ():
        try:
            values, written = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime
            node, why, when = str(values["node"]), str(values["why"]), float(values["time"])
        except (ValueError, KeyError, TypeError, OSError):
            continue  # the file is being written, or damaged
        found.append(NodeFailure(node, why, when, written))
    return sorted(found, key=lambda f: f.time)


def last_finished(manifest: Manifest) -> dict[str, float]:
    """The time at which each node last finished a shard, in seconds since the epoch."""
    last: dict[str, float] = {}
    for outcome in manifest.done.values():
        last[outcome.host] = max(last.get(outcome.host, 0.0), outcome.finished)
    return last


def in_a_row(run: RunDir, finished: Mapping[str, float]) -> dict[str, list[NodeFailure]]:
    """Each node's failures of the last day, since a shard was last finished there.

    Older failures do not count: a mended node that is left out cannot finish a shard.
    """
    rows: dict[str, list[NodeFailure]] = defaultdict(list)
    oldest = time.time() - FORGOTTEN_SECONDS
    for failure in failures(run):
        if failure.written > oldest and failure.time > finished.get(failure.node, 0.0):
            rows[failure.node].append(failure)
    return dict(rows)


def broken(run: RunDir, manifest: Manifest) -> dict[str, str]:
    """The reason of the last failure of each node that has finished nothing since."""
    return {n: row[-1].why for n, row in in_a_row(run, last_finished(manifest)).items()}


def to_exclude(
    run: RunDir, finished: Mapping[str, float], most: int, known: Collection[str] = ()
) -> list[str]:
    """Choose the nodes that failed more than `most` tasks in a row while others finished shards.

    If no other node finished one, the config is rather at fault, and some node has to run it. A
    broken node's clock may be ahead by hours; the filesystem's bounds it. One that is behind leaves
    out its own node at most, for the day after which a failure is forgotten.

    Args:
        finished: when each node last finished a shard.
        known: the cluster's nodes, as sbatch refuses other names; empty if they are not known.
    """
    return sorted(
        node
        for node, row in in_a_row(run, finished).items()
        if len(row) > most
        and (not known or node in known)
        and any(when > row[0].earliest for other, when in finished.items() if other != node)
    )
