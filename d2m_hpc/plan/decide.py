"""Decide what is left to do for a config; changes nothing."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.plan import changed, patterns
from d2m_hpc.plan.forget import forgotten
from d2m_hpc.plan.standing import Standings, present_and_bare, stand
from d2m_hpc.plan.workload import Workload, hashed
from d2m_hpc.run import fingerprints, nodes
from d2m_hpc.run.attempts import Attempts
from d2m_hpc.run.extension import lacked, only_new
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest, Outcome
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import DERIVED, DIED, Job, Record, Shard
from d2m_hpc.run.shards import read_shards
from d2m_hpc.storage.texts import counted, few

START = 4.0
"""Seconds of a task's start without its nets."""


class Tried(NamedTuple):
    """The earlier attempts at a shard: the last fields of a `Job`."""

    attempt: int = 0
    failures: int = 0
    alone: bool = False
    again: bool = False


UNTRIED = Tried()


class Pace(NamedTuple):
    """What finished shards took: mean seconds and bytes of one, and the seconds of a task's
    start."""

    seconds: float
    bytes: float
    start: float


@dataclass
class Decision:
    """The plan of a submit, and which shards it leaves out.

    Attributes:
        shards: all shards of the run, done or not.
        is_planned: whether the run folder has this plan already.
        done: stems of finished shards.
        extends: stems of finished shards to extend, with the fingerprints of their pairs.
        earlier: those fingerprints' values, by their short hashes.
        tried: earlier attempts, by stem.
        exhausted: stems that failed `max_attempts` times.
        lost: records that are missing and were read back from finished parquets.
        in_flight: stems in the hands of pending or running array tasks.
        left_out: stems that this submit does not try.
        shard_seconds: mean time of the finished shards; None if there are none.
        pace: what finished shards took; None if none are done, or `task_minutes` is not set.
        starved: the tasks of failed shards whose process was killed as memory ran out, by stem.
        raised: more memory or walltime than usual that a shard's task needs, by stem.
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
    pace: Pace | None = None
    starved: dict[str, str] = field(default_factory=dict)
    raised: dict[str, Any] = field(default_factory=dict)
    last_finished: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @cached_property
    def pending(self) -> list[Job]:
        """The jobs to submit; computed once, after all other attributes are set."""
        settled = self.done | self.exhausted | self.in_flight | self.left_out
        pending = [shard for shard in self.shards if shard.stem not in settled]
        if not self.extends and not self.tried:
            return list(map(Job, pending))
        extends, tried = self.extends, self.tried
        return [Job(s, extends.get(s.stem, ""), *tried.get(s.stem, UNTRIED)) for s in pending]

    def gains(self) -> list[tuple[int, Config]]:
        """The extensions: how many pending shards each is for, and the config that computes it."""
        config, names = self.workload.config, self.workload.custom.registry
        pairs = Counter(j.extends for j in self.pending if j.extends)
        found = []
        for before, count in pairs.items():
            part = only_new(config, self.earlier[before], names)
            new = lacked(self.workload.derived, self.earlier[before])
            derive = {name: config.derive[name] for name in new}
            found.append((count, part.model_copy(update={"derive": derive})))
        return found


@gc_paused()
def decide(workload: Workload, in_flight: Collection[str] = ()) -> Decision:
    """Compare a workload with its run's records and outputs.

    Args:
        in_flight: stems in the hands of live array tasks.

    Raises:
        ConfigError: the config changes more than it adds to the run's earlier config, or another
            program's files are in the output folder.
    """
    known, sizes = read_shards(workload.run.shards), workload.sizes
    if gone := forgotten(workload.run):
        sizes = {url: size for url, size in sizes.items() if url not in gone}
        known = [s for s in known if s.url not in gone]
    planned = known
    shards = patterns.plan_shards(sizes, known, gone.values())
    if len(shards) > max(len(known), len(sizes)) and (places := _moved(workload, known, shards)):
        known = [places.get(s.url, s)._replace(stem=s.stem) for s in known]
        shards = patterns.plan_shards(sizes, known, gone.values())
    decision = Decision(workload, shards, notices=[*workload.notices])
    if left_out := len(workload.sizes) - len(sizes):
        what = f"{counted(left_out, 'tar is', 'tars are')} left out of the plan by `d2m forget`"
        decision.notices.append(f"{what} (--undo puts back what it took)")
    if (left := len(shards) - len(sizes)) and not workload.derived:
        what = counted(left, "shard of earlier submits matches", "shards of earlier submits match")
        decision.notices.append(f"{what} no pattern now; still in the plan")
    _read_state(decision, known, set(in_flight))
    decision.in_flight = set(in_flight) - decision.done
    decision.is_planned = decision.shards == planned
    if not workload.config.reprocess:
        decision.earlier = _earlier(decision)
    if not workload.derived and (lost := sum(DERIVED in f for f in decision.extends.values())):
        what = counted(lost, "extended shard loses its", "extended shards lose their")
        decision.notices.append(f"{what} derived columns; `d2m derive` makes them again")
    return decision


def _moved(workload: Workload, known: list[Shard], shards: list[Shard]) -> dict[str, Shard]:
    """Find planned tars that were moved, by their old URLs, if the user says that they were.

    Raises:
        ConfigError: tars look moved, and the user has not said whether they are.
    """
    places = changed.moved(known, shards[len(known) :], workload.sizes)
    if not places or workload.moved is not None:
        return places if workload.moved else {}
    old, new = next(iter(places.items()))
    told = counted(len(places), "new tar has", "new tars have")
    mistake = (
        f"{workload.config.input_key}: {told} the names and sizes of planned "
        f"ones that are no longer where they were: {old} may be {new.url} now; say which: --moved "
        "if they are the same tars, --not-moved if they are others and get names of their own"
    )
    raise ConfigError(workload.where, [mistake])


def _see_changed(
    decision: Decision, found: Standings, output: OutputDir, known: list[Shard], busy: set[str]
) -> None:
    """Note tars that were replaced, or make their shards pending if they are to be recomputed."""
    workload = decision.workload
    most = None if workload.recompute_changed else changed.LOOKED_AT
    other = changed.find(known, found, output, most, workload.sizes, workload.times)
    if workload.recompute_changed:
        again = [stem for stem in other.stems if stem not in busy]
        decision.done.difference_update(again)
        decision.exhausted.difference_update(again)
        for stem in again:
            decision.extends.pop(stem, None)
            tries, made = decision.tried.get(stem, UNTRIED), changed.made(found, stem)
            newest = max(tries.attempt, made.attempt if made else 0)
            decision.tried[stem] = tries._replace(attempt=newest, again=True)
        if again:
            tars = counted(len(again), "tar has", "tars have")
            decision.notices.append(f"{tars} changed and will be computed again")
        else:
            decision.notices.append("no tar has changed since it was computed")
    elif other.stems:
        decision.notices += other.notices()
        as_made = {s.stem: s for s in known if s.stem in {*other.stems}}
        decision.shards = [as_made.get(s.stem, s) for s in decision.shards]


def _earlier(decision: Decision) -> dict[str, dict[str, Any]]:
    """Read the fingerprints of shards that are finished or in flight by an earlier config.

    Raises:
        ConfigError: the config changes more than it adds to one of them.
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
    """Fill in the state of each shard, by the records and the output folder."""
    workload = decision.workload
    config, ours = workload.config, workload.fingerprint_id
    manifest, output = Manifest.load(workload.run), OutputDir(config.output_metadata_dir)
    stems = [s.stem for s in decision.shards]
    odd = set[str]()
    present, bare = present_and_bare(config, manifest.done, odd)
    begun = {*Attempts(workload.run.attempts).stems()} & present & manifest.done.keys()
    _take_back_newer(decision, manifest, output, begun - busy)
    found = stand(stems, manifest, present, ours, config.max_attempts, odd, bare)
    _refuse_odd(workload, output, found.odd)
    foreign = _take_back(decision, found, output)
    decision.done.update(found.done)
    decision.exhausted = found.given_up - decision.done
    if not config.reprocess:
        decision.extends |= fingerprints.extendable(found.outdated, config)
        _refuse_foreign(workload, foreign)
    if workload.derived:  # of pairs by the rest of the config
        base = hashed(workload.fingerprint)
        pairs = decision.extends.items()
        decision.extends = {s: f for s, f in pairs if fingerprints.meets(f, base)}
        decision.left_out = {*stems} - decision.extends.keys()
    timed = found.done if workload.derived else manifest.computed(found.done)
    if decision.done:
        seconds = sum(o.finished - o.started for o in timed.values())
        seconds += sum(r.finished - r.started for r in decision.lost if r.shard in decision.done)
        decision.shard_seconds = seconds / len(decision.done)
    if config.task_minutes:
        decision.pace = pace(timed, decision.shards)
    decision.starved = {s: f[-1].task for s, f in found.failed.items() if f[-1].is_starved}
    decision.last_finished = nodes.last_finished(manifest)
    decision.tried = tried(manifest, found, workload.run, ours)
    _see_changed(decision, found, output, known, busy)


def pace(done: Mapping[str, Outcome], shards: Sequence[Shard]) -> Pace | None:
    """Measure what finished shards took, from a task's first to its last: they overlap.

    A task's start is what its first shard took beyond its others: nets are loaded meanwhile.
    """
    tasks: dict[str, list[Outcome]] = {}
    for outcome in done.values():
        tasks.setdefault(outcome.task, []).append(outcome)
    spans, firsts, count = 0.0, list[float](), 0
    for outcomes in tasks.values():
        first, last = min(o.started for o in outcomes), max(o.finished for o in outcomes)
        ends = sorted(o.finished for o in outcomes)
        later = (last - ends[0]) / (len(ends) - 1) if ends[1:] else ends[0] - first
        firsts.append(max(ends[0] - first - later, 0.0))
        spans, count = spans + later * len(ends), count + len(ends)
    sizes = [s.size for s in shards if s.stem in done and s.size]
    if not count or spans <= 0:
        return None
    mean = sum(sizes) / len(sizes) if sizes else 1.0
    return Pace(spans / count, mean, START + statistics.median(firsts))


def _take_back_newer(
    decision: Decision, manifest: Manifest, output: OutputDir, stems: set[str]
) -> None:
    """Read back the records of pairs that replaced recorded ones, into the manifest as well.

    Args:
        stems: the recorded shards with an attempt's file: a task that was killed between its pair
            and its record leaves that file.
    """
    for stem in stems:
        record = (pair := Pair(output, stem)).record()
        if record and record.shard == stem and record.attempt > manifest.done[stem].attempt:
            decision.lost.append(pair.restored(record))
            manifest.add(record.to_dict())
    if decision.lost:
        manifest.settle()


def _take_back(decision: Decision, found: Standings, output: OutputDir) -> list[str]:
    """Read back the records of finished pairs that killed tasks did not write.

    Returns:
        The stems of parquets of other programs.
    """
    workload, foreign = decision.workload, []
    for stem in found.unrecorded:
        pair = Pair(output, stem)
        if (record := pair.record()) is None:
            foreign.append(stem)
            continue
        if stem in found.bare:
            found.removed[stem] = Outcome.of(record.to_dict())
            continue
        decision.lost.append(pair.restored(record))
        if fingerprints.meets(record.fingerprint, workload.fingerprint_id):
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
            f"output_metadata_dir: {workload.config.output_metadata_dir} holds "
            f"{counted(len(stems), 'parquet')} that this program did not write ({few(stems)}); "
            "move what is there, or set `reprocess: true` to replace it"
        )
        raise ConfigError(workload.where, [mistake])


def tried(manifest: Manifest, stood: Standings, run: RunDir, ours: str) -> dict[str, Tried]:
    """Collect the earlier attempts at shards that failed or died, or whose pair is gone.

    A pair by the config at hand is to be replaced if the shard has failed since, or lacks its npz.
    An attempt under way looks like one that never ended; its shard is in flight.

    Args:
        ours: the fingerprint whose failures count.
    """
    found = {
        stem: Tried(outcome.attempt, again=stem in stood.bare)
        for stem, outcome in stood.removed.items()
    }
    for stem, failed in manifest.failures.items():
        counted = [f for f in failed if f.fingerprint == ours]
        alone = any(f.kind == DIED for f in counted)
        again = stem in stood.bare or (
            stem in manifest.done and manifest.done[stem].fingerprint == ours
        )
        found[stem] = Tried(max(f.attempt for f in failed), len(counted), alone, again)
    for stem, attempt in Attempts(run.attempts).unended().items():
        known = found.get(stem, UNTRIED)
        number = max(known.attempt, attempt.number)
        found[stem] = known._replace(attempt=number, alone=True)
    return found
