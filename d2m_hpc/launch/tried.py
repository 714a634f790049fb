"""What is known of earlier attempts at shards that are not done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from d2m_hpc.state.attempts import Attempts
from d2m_hpc.state.manifest import DIED, Manifest, Outcome, Shard
from d2m_hpc.state.rundir import RunDir


class Tried(NamedTuple):
    """The last fields of a `Shard`."""

    attempt: int = 0
    failures: int = 0
    alone: bool = False


UNTRIED = Tried()


def tried(
    manifest: Manifest, removed: Mapping[str, Outcome], run: RunDir, ours: str
) -> dict[str, Tried]:
    """Of shards that failed, at which a process died, or whose pair is gone.

    An attempt that is under way looks as one that never ended does; its shard is in flight.

    Args:
        removed: what the records say of shards whose pair is gone.
        ours: the fingerprint of which failures count.
    """
    found = {stem: Tried(outcome.attempt) for stem, outcome in removed.items()}
    for stem, failed in manifest.failures.items():
        counted = [f for f in failed if f.fingerprint == ours]
        alone = any(f.kind == DIED for f in counted)
        found[stem] = Tried(max(f.attempt for f in failed), len(counted), alone)
    for stem, attempt in Attempts(run.attempts).unended().items():
        known = found.get(stem, UNTRIED)
        found[stem] = Tried(max(known.attempt, attempt.number), known.failures, True)
    return found


def told(shards: list[Shard], bases: Mapping[str, str], tried: Mapping[str, Tried]) -> list[Shard]:
    """Shards with what their tasks have to know: the base of each, and what was tried."""
    if not bases and not tried:
        return shards
    return [Shard(*s[:3], bases.get(s.stem, ""), *tried.get(s.stem, UNTRIED)) for s in shards]
