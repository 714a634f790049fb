"""Check every output against its record."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.plan import changed
from d2m_hpc.plan.changed import Changed
from d2m_hpc.plan.standing import standings
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest, Outcome
from d2m_hpc.run.outputs import SUFFIXES, OutputDir
from d2m_hpc.run.pair import MISSING, Pair
from d2m_hpc.run.shards import read_named


@dataclass(frozen=True)
class Fault:
    """A fault of one file of the output."""

    file: str
    what: str


@dataclass
class Report:
    """The result of a check.

    Attributes:
        checked: the number of shards whose files were read.
        done: the number of shards that are done on record.
        faults: of files.
        shards: the number of shards in the run.
        unfinished: shards that are not done, removed or failed since included.
        changed: checked shards whose tars have changed; their files are no worse.
    """

    checked: int
    done: int
    faults: list[Fault]
    shards: int
    unfinished: int
    changed: Changed = field(default_factory=Changed)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    run: RunDir, config: Config, sample: int | None = None, seed: int | None = None
) -> Report:
    """Check every finished shard's files, and look for other files in the folder.

    Args:
        sample: check only so many shards, drawn at random.
        seed: of the draw, by default 0; the same seed draws the same of the same shards.

    Raises:
        ConfigError: a seed without a sample.
    """
    if seed is not None and sample is None:
        raise ConfigError("verify", ["--seed: found no --sample, which it is of; valid are both"])
    output = OutputDir(config.output_metadata_dir)
    with gc_paused():
        manifest, there = Manifest.load(run), output.pairs()
        found = standings(run, config, manifest, there)
    done = manifest.done
    stems = sorted(done)
    if sample is not None and sample < len(stems):
        stems = sorted(random.Random(seed or 0).sample(stems, sample))

    @cache
    def names() -> dict[str, str]:
        """All files on record, by sha256; needed only once a file is not as its record says."""
        of_npz = {o.npz_sha256: f"{stem}.npz" for stem, o in done.items()}
        return {**of_npz, **{o.parquet_sha256: f"{stem}.parquet" for stem, o in done.items()}}

    check = partial(check_shard, output, carried=config.carried, owner=lambda sha: names().get(sha))
    faults = [f for stem in stems for f in check(stem, done[stem])]
    if any(fault.what == MISSING for fault in faults):  # or was, when this machine looked before
        output.ask_anew()
        faulty = dict.fromkeys(fault.file.rpartition(".")[0] for fault in faults)
        faults = [f for stem in faulty for f in check(stem, done[stem])]
    for suffix, present in there.items():
        strays = sorted(present - done.keys())
        faults += [Fault(f"{s}{suffix}", "has no record; run d2m-submit again") for s in strays]
    other = changed.find(read_named(run.shards, stems), found, output, most=None)
    return Report(len(stems), len(done), faults, len(found.stems), len(found.unfinished), other)


def check_shard(
    output: OutputDir,
    stem: str,
    record: Outcome,
    carried: Collection[str] = (),
    owner: Callable[[str], str | None] = lambda sha256: None,
) -> list[Fault]:
    """Find all faults of one shard's pair.

    Args:
        record: the newest record.
        carried: columns with the samples' own values, which may be anything.
        owner: gives the name on record of a file with some sha256, if there is one.
    """
    pair = Pair(output, stem)
    faults = [
        Fault(pair.name(suffix), problem)
        for suffix in SUFFIXES
        for problem in pair.problems(suffix, record, carried, owner)
    ]
    if faults and (why := _is_replaced(pair, record)):
        return [Fault(f"{stem}.parquet", why)]
    return faults


def _is_replaced(pair: Pair, record: Outcome) -> str:
    """Say what to do about a pair newer than its record, as a killed task leaves; empty for any
    other."""
    try:
        own = pair.record()
    except D2MError:
        return ""
    if own is None or own.shard != pair.stem or own.order <= record.order:
        return ""
    why = "has replaced the pair that its record tells of"
    if own.fingerprint != record.fingerprint:
        return f"{why}; run d2m-submit again"
    return f"{why}; delete it, and run d2m-submit again"  # on record the shard is done
