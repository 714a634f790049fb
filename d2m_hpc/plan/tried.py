"""What is known of earlier attempts at shards that are not done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from d2m_hpc.run.attempts import Attempts
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import DIED, Job, Manifest, Outcome, Shard


class Tried(NamedTuple):
    """The last fields of a `Job`."""

    attempt: int = 0
    failures: int = 0
    alone: bool = False
    again: bool = False


UNTRIED = Tried()


def tried(
    manifest: Manifest, removed: Mapping[str, Outcome], run: RunDir, ours: str
) -> dict[str, Tried]:
    """Of shards that failed, at which a process died, or whose pair is gone.

    A pair by the config at hand that lies there in spite of a later failure is to be replaced.

    An attempt that is under way looks as one that never ended does; its shard is in flight.

    Args:
        removed: what the records say of shards whose pair is gone.
        ours: the fingerprint of which failures count.
    """
    found = {stem: Tried(outcome.attempt) for stem, outcome in removed.items()}
    for stem, failed in manifest.failures.items():
        counted = [f for f in failed if f.fingerprint == ours]
        alone = any(f.kind == DIED for f in counted)
        again = stem in manifest.done and manifest.done[stem].fingerprint == ours
        found[stem] = Tried(max(f.attempt for f in failed), len(counted), alone, again)
    for stem, attempt in Attempts(run.attempts).unended().items():
        known = found.get(stem, UNTRIED)
        number = max(known.attempt, attempt.number)
        found[stem] = known._replace(attempt=number, alone=True)
    return found


def replaced(known: Tried | None, made: Outcome | None) -> Tried:
    """Of a shard whose pair is of another tar: it stays until a later attempt replaces it."""
    known = known or UNTRIED
    return known._replace(attempt=max(known.attempt, made.attempt if made else 0), again=True)


def jobs(
    shards: Sequence[Shard], extends: Mapping[str, str], tried: Mapping[str, Tried]
) -> list[Job]:
    """What tasks are to do with some shards.

    Args:
        extends: the fingerprints of the pairs that are to be extended, by stem.
    """
    if not extends and not tried:
        return list(map(Job, shards))
    return [Job(s, extends.get(s.stem, ""), *tried.get(s.stem, UNTRIED)) for s in shards]
