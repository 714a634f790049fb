"""The state of each shard of a run: the records compared with the output folder.

Status, submit, verify, select, export and every exit code use this module, so all agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.run import fingerprints
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest, Outcome
from d2m_hpc.run.outputs import NPZ, PARQUET, SUFFIXES, OutputDir
from d2m_hpc.run.shards import read_stems
from d2m_hpc.storage.mounts import keeps_names
from d2m_hpc.storage.texts import few

State = Literal["done", "outdated", "failed", "given up", "pending"]


@dataclass
class Standings:
    """The shards of a plan, by state.

    A shard is done if it is done on record by the fingerprint asked for, or by one with derived
    columns besides, its parquet is in place, and its npz where the config asks for features, and no
    failure was recorded since. `standings` takes one as done, too, that lacks derived columns alone
    as they could not be computed.

    Attributes:
        stems: the stems of all shards, in the plan's order.
        asked: the fingerprint asked for.
        done: the records of done shards, by stem.
        outdated: the records of shards whose pairs another fingerprint made, by stem.
        failed: the failures of shards that are not done, oldest first, by stem.
        given_up: stems of `failed` and `underived` that failed too often to be tried again.
        underived: the failures of shards that are done but for derived columns, by stem.
        removed: the records of shards that are done on record and lack a file, by stem.
        bare: stems of parquets whose npz is missing.
        unrecorded: stems of parquets without a record.
        odd: stems with a folder, a pipe or a device in place of a parquet.
    """

    stems: list[str]
    asked: str
    done: dict[str, Outcome] = field(default_factory=dict)
    outdated: dict[str, Outcome] = field(default_factory=dict)
    failed: dict[str, list[Outcome]] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)
    underived: dict[str, list[Outcome]] = field(default_factory=dict)
    removed: dict[str, Outcome] = field(default_factory=dict)
    bare: Collection[str] = ()
    unrecorded: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether all shards have all that is asked for, derived columns as well."""
        return len(self.done) == len(self.stems) and not self.underived

    def has_all(self, stem: str) -> bool:
        """Whether a shard has all that is asked for, derived columns as well."""
        return stem in self.done and stem not in self.underived

    @property
    def unfinished(self) -> list[str]:
        if self.is_complete:
            return []
        return [stem for stem in self.stems if stem not in self.done]

    def require_finished(self, allow_missing: bool) -> None:
        """Raise a `D2MError` if shards are not finished, unless that is allowed."""
        if (missing := self.unfinished) and not allow_missing:
            raise D2MError(
                f"{len(missing)} of {len(self.stems)} shards are not finished ({few(missing)}); "
                "finish them with `d2m submit`, or leave them out with --allow-missing"
            )

    def require_rows(self, run: RunDir) -> None:
        """Raise a `D2MError` if no finished shard has rows."""
        if any(outcome.rows for outcome in self.done.values()):
            return
        why = "no finished shard has rows; `d2m status` says how far it is"
        if not self.unfinished:
            why = "all shards are finished, and none has a row; `d2m status` says what was rejected"
        raise D2MError(f"{run.root}: {why}")

    def state(self, stem: str) -> State:
        """The state of one shard; failed, if it has failed and its pair is outdated."""
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
    bare: Collection[str] = (),
) -> Standings:
    """Sort the shards of a plan by state.

    Args:
        present: the stems of all parquets in the output folder.
        asked: the fingerprint asked for.
        max_attempts: the number of failures by that fingerprint after which a shard is given up.
        odd: stems of folders, pipes and devices that are named as parquets.
        bare: of `present`, stems whose npz is missing, though the config asks for features.
    """
    known, wider = manifest.done.get, fingerprints.wider(asked)
    found = Standings(list(stems), asked, bare=bare)
    for stem in found.stems:
        outcome = known(stem)
        if stem not in present or (outcome and stem in bare):
            if outcome:
                found.removed[stem] = outcome
        elif outcome is None:
            found.unrecorded.append(stem)
        elif outcome.fingerprint == asked or outcome.fingerprint.startswith(wider):
            found.done[stem] = outcome
        else:
            found.outdated[stem] = outcome
    found.odd = [stem for stem in found.stems if stem in odd] if odd else []
    _set_failed_apart(found, manifest.failures, max_attempts)
    return found


def _set_failed_apart(
    found: Standings, failures: Mapping[str, list[Outcome]], max_attempts: int
) -> None:
    """Move shards that failed since they were done from `done` to `failed`."""
    planned = set(found.stems) if failures else ()
    wider = fingerprints.wider(found.asked)
    for stem, failed in failures.items():
        # A derived column that cannot be computed makes no pair worse.
        failed = [f for f in failed if not f.fingerprint.startswith(wider)]
        if failed and stem in planned:
            found.done.pop(stem, None)
            found.failed[stem] = failed
            if sum(f.fingerprint == found.asked for f in failed) >= max_attempts:
                found.given_up.add(stem)


@gc_paused()
def standings(
    run: RunDir,
    config: Config,
    known: Manifest | None = None,
    there: Mapping[str, set[str]] | None = None,
    asked: str = "",
) -> Standings:
    """Find the state of every shard of a run, by its newest submission.

    Args:
        asked: another fingerprint, by which to find them.
        known: the run's manifest, if it was read before.
        there: the stems of all outputs by suffix, if the output folder was listed before.

    Raises:
        ConfigError: there is no such run.
        D2MError: the plan is missing or damaged, or the output cannot be listed.
    """
    if not run.shards.exists():
        if not run.config.exists():
            what = f"there is no run in {run.root}; start one with `d2m-submit CONFIG`"
            raise ConfigError("config", [what])
        raise D2MError(f"{run.shards} is missing; submit again, and the plan is made anew")
    manifest = known or Manifest.load(run)
    odd = set[str]()
    present, bare = present_and_bare(config, manifest.done, odd, there)
    asked = asked or fingerprints.newest(run)
    stems = read_stems(run.shards)
    found = stand(stems, manifest, present, asked, config.max_attempts, odd, bare)
    _keep_underived(found)
    return found


def _keep_underived(found: Standings) -> None:
    """Take shards as done whose pairs are good, as nothing failed but their derived columns."""
    base = fingerprints.base(found.asked)
    wider = fingerprints.wider(base)
    for stem, failed in [*found.failed.items()] if base != found.asked else ():
        made = found.outdated.get(stem)
        is_good = made is not None and fingerprints.meets(made.fingerprint, base)
        if is_good and all(f.fingerprint.startswith(wider) for f in failed):
            found.underived[stem] = found.failed.pop(stem)
    if found.underived:  # in the plan's order
        kept = {stem: found.outdated.pop(stem) for stem in found.underived}
        done = found.done | kept
        found.done = {stem: done[stem] for stem in found.stems if stem in done}


def present_and_bare(
    config: Config,
    done: Mapping[str, Outcome],
    odd: set[str],
    there: Mapping[str, set[str]] | None = None,
) -> tuple[set[str], set[str]]:
    """List the stems of all parquets, and of those without an npz where features are asked for.

    Args:
        done: the records of pairs that should be there. Where one is not, and the folder's listing
            may be an old one, the folder is listed once more.
        odd: receives the stems of folders, pipes and devices that are named as parquets.
        there: as `standings` takes it.
    """
    suffixes = SUFFIXES if config.postprocess_features else (PARQUET,)
    output = OutputDir(config.output_metadata_dir)
    there = there or output.pairs(suffixes, odd)
    lacks = any(not done.keys() <= there[suffix] for suffix in suffixes)
    if lacks and output.is_local and keeps_names(Path(output.root)):
        output.ask_anew()
        there = output.pairs(suffixes, odd)
    present = there[PARQUET]
    return present, present - there[NPZ] if NPZ in suffixes else set()
