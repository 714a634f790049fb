"""What of a config is left to do; changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.gc_paused import uncollected
from d2m_hpc.plan import changed, patterns
from d2m_hpc.plan.forget import Forgotten
from d2m_hpc.plan.standing import Standings, stand
from d2m_hpc.plan.workload import Workload
from d2m_hpc.run import fingerprints, nodes
from d2m_hpc.run.attempts import Attempts
from d2m_hpc.run.extension import only_new
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest, Outcome
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import DIED, Job, Record, Shard
from d2m_hpc.run.shards import read_shards


class Tried(NamedTuple):
    """The last fields of a `Job`."""

    attempt: int = 0
    failures: int = 0
    alone: bool = False
    again: bool = False


UNTRIED = Tried()


@dataclass
class Decision:
    """What a submit would do.

    Attributes:
        shards: all of the run, done or not.
        is_planned: the run folder has this plan already.
        done: stems of finished shards.
        extends: stems of shards that lack only what was added to the config since they were
            finished, with the fingerprints of their pairs.
        earlier: those fingerprints' values, by their short hashes.
        tried: of stems that were tried before, what a `Job` says of that.
        exhausted: stems that failed `max_attempts` times.
        lost: records that are missing and were read back from finished parquets.
        in_flight: stems that pending or running array tasks will do.
        left_out: stems that are not to be tried this time.
        shard_seconds: mean time of the finished shards; None where there are none.
        last_finished: when each node last finished a shard, in seconds since the epoch.
    """

    workload: Workload
    shards: list[Shard]
    is_planned: bool = False
    done: set[str] = field(default_factory=set)
    extends: dict[str, str] = field(default_factory=dict)
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    tried: dict[str, Tried] = field(default_factory=dict)
    exhausted: set[str] = field(default_factory=set)
    lost: list[Record] = field(default_factory=list)
    in_flight: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)
    shard_seconds: float | None = None
    last_finished: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @cached_property
    def pending(self) -> list[Job]:
        """Computed once: all else has to be known before it is asked for."""
        settled = self.done | self.exhausted | self.in_flight | self.left_out
        return jobs([s for s in self.shards if s.stem not in settled], self.extends, self.tried)

    def gains(self) -> list[tuple[int, Config]]:
        """How many of the pending shards are to be extended, and the config of what they lack."""
        config, names = self.workload.config, self.workload.custom.registry
        pairs = Counter(j.extends for j in self.pending if j.extends)
        return [(n, only_new(config, self.earlier[b], names)) for b, n in pairs.items()]


@uncollected()
def decide(workload: Workload, in_flight: Collection[str] = ()) -> Decision:
    """Compare what is asked for with records and outputs.

    Args:
        in_flight: stems in the hands of live array tasks.

    Raises:
        ConfigError: the run was made by a config that this one does not only add to, or the output
            folder by another program.
    """
    known, sizes = read_shards(workload.run.shards), workload.sizes
    if gone := (forgotten := Forgotten.of(workload.run)).by_url:
        sizes = {url: size for url, size in sizes.items() if url not in gone}
        known = [s for s in known if s.url not in gone]
    planned = known
    shards = patterns.plan_shards(sizes, known, gone.values())
    if len(shards) > max(len(known), len(sizes)) and (places := _moved(workload, known, shards)):
        known = [places.get(s.url, s)._replace(stem=s.stem) for s in known]
        shards = patterns.plan_shards(sizes, known, gone.values())
    notices = [*workload.notices, *forgotten.notices(workload.sizes)]
    decision = Decision(workload, shards, notices=notices)
    if left := len(shards) - len(sizes):
        decision.notices.append(
            f"{left} shards of earlier submits match no pattern now; they are kept"
        )
    _read_state(decision, known, set(in_flight))
    decision.in_flight = set(in_flight) - decision.done
    decision.is_planned = decision.shards == planned
    if not workload.config.reprocess:
        decision.earlier = _earlier(decision)
    return decision


def _moved(workload: Workload, known: list[Shard], shards: list[Shard]) -> dict[str, Shard]:
    """Where planned tars lie now, by their old URLs, if the user says so.

    Raises:
        ConfigError: it looks so, and the user has not said.
    """
    places = changed.moved(known, shards[len(known) :], workload.sizes)
    if not places or workload.moved is not None:
        return places if workload.moved else {}
    old, new = next(iter(places.items()))
    mistake = (
        f"input_tars: {len(places)} new tars have the names and sizes of planned ones that are no "
        f"longer where they were: {old} may be {new.url} now; say which: --moved if they are the "
        "same tars, --not-moved if they are others and get names of their own"
    )
    raise ConfigError(workload.where, [mistake])


def _see_changed(
    decision: Decision, found: Standings, output: OutputDir, known: list[Shard], busy: set[str]
) -> None:
    """Tell tars that are others now; those that are to be computed again are pending."""
    workload = decision.workload
    most = None if workload.recompute_changed else changed.LOOKED_AT
    other = changed.find(known, found, output, most, workload.sizes, workload.times)
    if workload.recompute_changed:
        again = [stem for stem in other.stems if stem not in busy]
        decision.done.difference_update(again)
        decision.exhausted.difference_update(again)
        for stem in again:
            decision.extends.pop(stem, None)
            decision.tried[stem] = replaced(decision.tried.get(stem), changed.made(found, stem))
        if again:
            tars = "1 tar has" if len(again) == 1 else f"{len(again):,} tars have"
            decision.notices.append(f"{tars} changed and will be computed again")
        else:
            decision.notices.append("no tar has changed since it was computed")
    elif other.stems:
        decision.notices += other.notices()
        as_made = {s.stem: s for s in known if s.stem in {*other.stems}}
        decision.shards = [as_made.get(s.stem, s) for s in decision.shards]


def _earlier(decision: Decision) -> dict[str, dict[str, Any]]:
    """The fingerprints that other shards have, or will have once their live tasks have ended.

    Raises:
        ConfigError: the config does not only add to one of them; with what differs.
    """
    workload, run = decision.workload, decision.workload.run
    stems: dict[str, list[str]] = {}
    for stem, name in decision.extends.items():
        stems.setdefault(name, []).append(stem)
    live = fingerprints.of_local_submits(run)
    if decision.in_flight:
        live.add(fingerprints.newest(run))
    for name in live - {"", workload.fingerprint_id}:
        stems.setdefault(name, [])
    return {
        name: fingerprints.require_growth(run, name, made, workload.document, workload.where)
        for name, made in stems.items()
    }


def _read_state(decision: Decision, known: list[Shard], busy: set[str]) -> None:
    """Fill in how far each shard is, by the records and by what lies in the output."""
    workload = decision.workload
    config, ours = workload.config, workload.fingerprint_id
    manifest, output = Manifest.load(workload.run), OutputDir(config.output_metadata_dir)
    stems = [s.stem for s in decision.shards]
    odd = set[str]()
    present = output.stems(odd=odd)
    found = stand(stems, manifest, present, ours, config.max_attempts, odd)
    _refuse_odd(workload, output, found.odd)
    foreign = _take_back(decision, found, output)
    decision.done.update(found.done)
    decision.exhausted = found.given_up - decision.done
    if not config.reprocess:
        decision.extends |= fingerprints.extendable(found.outdated, config)
        _refuse_foreign(workload, foreign)
    if decision.done:
        seconds = sum(o.finished - o.started for o in found.done.values())
        seconds += sum(r.finished - r.started for r in decision.lost if r.shard in decision.done)
        decision.shard_seconds = seconds / len(decision.done)
    decision.last_finished = nodes.last_finished(manifest)
    decision.tried = tried(manifest, found.removed, workload.run, ours)
    _see_changed(decision, found, output, known, busy)


def _take_back(decision: Decision, found: Standings, output: OutputDir) -> list[str]:
    """Read the records of finished pairs back that killed tasks could not write any more.

    Returns:
        The stems of parquets that are not ours.
    """
    workload, foreign = decision.workload, []
    for stem in found.unrecorded:
        pair = Pair(output, stem)
        if (record := pair.record()) is None:
            foreign.append(stem)
            continue
        decision.lost.append(pair.restored(record))
        if record.fingerprint == workload.fingerprint_id:
            decision.done.add(stem)
        elif not workload.config.reprocess:
            decision.extends[stem] = record.fingerprint
    return foreign


def _refuse_odd(workload: Workload, output: OutputDir, stems: list[str]) -> None:
    if stems:
        others = f", nor are {len(stems) - 1} more" if stems[1:] else ""
        mistake = (
            f"output_metadata_dir: {output.path(f'{stems[0]}.parquet')} is no regular file, but "
            f"a folder, a pipe or a device{others}; move it away"
        )
        raise ConfigError(workload.where, [mistake])


def _refuse_foreign(workload: Workload, stems: list[str]) -> None:
    if stems:
        mistake = (
            f"output_metadata_dir: {workload.config.output_metadata_dir} holds {len(stems)} "
            f"parquets that this program did not write ({', '.join(stems[:3])}); move them, or "
            "set `reprocess: true` to replace them"
        )
        raise ConfigError(workload.where, [mistake])


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
