"""Where each shard of a run stands: what is on record, against what lies in the output folder.

Status, submit, verify, select, export and every exit code ask here, so that all say the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from d2m_hpc.config import Config
from d2m_hpc.errors import D2MError
from d2m_hpc.gc_paused import uncollected
from d2m_hpc.run import fingerprints
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest, Outcome
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.shards import read_stems

State = Literal["done", "outdated", "failed", "given up", "pending"]


@dataclass
class Standings:
    """The shards of a plan by how far they are.

    A shard is done if a record says so with the fingerprint that was asked for, its parquet is in
    place, and no failure was recorded since.

    Attributes:
        stems: of all shards, in the plan's order.
        asked: the fingerprint of what is asked for.
        done: what the records say of finished shards, by stem.
        outdated: likewise of pairs that are in place and were made by another fingerprint.
        failed: the failures of shards that are not done, oldest first, by stem.
        given_up: stems of `failed` that failed too often to be tried again.
        removed: what the records say of shards that are done on record, and whose parquet is not
            there, by stem.
        unrecorded: stems whose parquet is there, and of which no record says that they are done.
        odd: stems whose parquet's name is that of a folder, a pipe or a device.
    """

    stems: list[str]
    asked: str
    done: dict[str, Outcome] = field(default_factory=dict)
    outdated: dict[str, Outcome] = field(default_factory=dict)
    failed: dict[str, list[Outcome]] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)
    removed: dict[str, Outcome] = field(default_factory=dict)
    unrecorded: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return len(self.done) == len(self.stems)

    @property
    def unfinished(self) -> list[str]:
        if self.is_complete:
            return []
        return [stem for stem in self.stems if stem not in self.done]

    def state(self, stem: str) -> State:
        """Where one shard stands; a failure says more than an outdated pair."""
        if stem in self.done:
            return "done"
        if stem in self.failed:
            return "given up" if stem in self.given_up else "failed"
        return "outdated" if stem in self.outdated else "pending"


def stand(
    stems: Iterable[str],
    manifest: Manifest,
    present: Collection[str],
    asked: str,
    max_attempts: int,
    odd: Collection[str] = (),
) -> Standings:
    """Sort the shards of a plan by how far they are.

    Args:
        present: the stems of all parquets in the output folder.
        asked: the fingerprint of what is asked for.
        max_attempts: so many failures by that fingerprint, and a shard is given up.
        odd: stems of folders, pipes and devices that are named as parquets.
    """
    recorded, known = manifest.done, manifest.done.get
    found = Standings(list(stems), asked)
    found.done = {
        stem: outcome
        for stem in found.stems
        if (outcome := known(stem)) and outcome.fingerprint == asked and stem in present
    }
    for stem in found.unfinished:
        if stem not in present:
            if stem in recorded:
                found.removed[stem] = recorded[stem]
        elif stem in recorded:
            found.outdated[stem] = recorded[stem]
        else:
            found.unrecorded.append(stem)
    found.odd = [stem for stem in found.stems if stem in odd] if odd else []
    _set_failed_apart(found, manifest.failures, max_attempts)
    return found


def _set_failed_apart(
    found: Standings, failures: Mapping[str, list[Outcome]], max_attempts: int
) -> None:
    """Take shards that failed since out of those that are done; few shards fail."""
    planned = set(found.stems) if failures else ()
    for stem, failed in failures.items():
        if stem in planned:
            found.done.pop(stem, None)
            found.failed[stem] = failed
            if sum(f.fingerprint == found.asked for f in failed) >= max_attempts:
                found.given_up.add(stem)


@uncollected()
def standings(
    run: RunDir,
    config: Config,
    known: Manifest | None = None,
    present: Collection[str] | None = None,
) -> Standings:
    """Where every shard of a run stands, as the newest submission asks; one listing of the output.

    Args:
        known: the run's manifest, where it was read already.
        present: the stems of all parquets, where the output was listed already.

    Raises:
        D2MError: the plan is missing or damaged, or the output cannot be listed.
    """
    if not run.shards.exists():
        raise D2MError(f"{run.shards} is missing; submit again, and the plan is made anew")
    manifest = known or Manifest.load(run)
    odd = set[str]()
    if present is None:
        present = OutputDir(config.output_metadata_dir).stems(odd=odd)
    asked = fingerprints.newest(run)
    return stand(read_stems(run.shards), manifest, present, asked, config.max_attempts, odd)
