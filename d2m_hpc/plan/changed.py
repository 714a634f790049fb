"""Tars that are others now than those whose outputs lie there, and tars that were moved.

What a task has read is in its record, which the shard's parquet holds: the tar's size and time. To
look into millions of parquets takes long. Only those are looked into whose tar has another size
than the plan says, or was touched since the task began. Of a tar in a store its listing tells both.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from d2m_hpc.config import Config
from d2m_hpc.errors import D2MError
from d2m_hpc.plan.naming import own_name
from d2m_hpc.plan.standing import Standings
from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import Record, Shard
from d2m_hpc.storage.urls import is_local

LOOKED_AT = 1000
"""Tars that a command looks at unasked: each is a question to a file server."""
AT_ONCE = 16
SLACK = 600.0
"""Seconds that the clocks of file servers and nodes may differ."""
COPIES = 100
"""Old places that are looked at to tell tars that were moved from others of the same names."""
NOTHING: Mapping[str, float] = {}


@dataclass
class Changed:
    """What was found.

    Attributes:
        stems: of shards whose tar is another one now.
        looked_at: finished shards whose tars were asked for.
        all: whether that were all of them.
    """

    stems: list[str] = field(default_factory=list)
    looked_at: int = 0
    all: bool = True

    def notices(self) -> Iterator[str]:
        if self.stems:
            few = ", ".join(self.stems[:3])
            some = "" if self.all else f" of {self.looked_at:,} that were looked at, at random"
            one = len(self.stems) == 1
            count = "1 tar" if one else f"{len(self.stems):,} tars"
            others = "is not the one that was" if one else "are not those that were"
            yield (
                f"{count}{some} {others} computed, by size or time ({few}); "
                f"`d2m-submit --recompute-changed` computes {'it' if one else 'them'} again"
            )


def find(
    shards: Sequence[Shard],
    found: Standings,
    output: OutputDir,
    most: int | None = LOOKED_AT,
    sizes: Mapping[str, int | None] | None = None,
    times: Mapping[str, float] = NOTHING,
) -> Changed:
    """Look at the tars of finished shards.

    Args:
        shards: of the plan, with the sizes that it has.
        most: so many local tars are looked at, drawn at random; None for all.
        sizes, times: of tars in stores, as they are listed now; all of them are looked at.
    """
    drawn = shards if most is None or len(shards) <= most else random.sample(shards, most)
    local = [s for s in drawn if is_local(s.url) and made(found, s.stem)]
    stems = [
        shard.stem
        for shard, now in zip(local, _stats(local), strict=True)
        if now and _is_suspect(shard, now, found) and is_other(shard, now, _record(output, shard))
    ]
    looked_at = len(local)
    if times and sizes:
        listed = [s for s in shards if s.url in times and made(found, s.stem)]
        stems += [s.stem for s in listed if _is_other_in_store(s, found, output, sizes, times)]
        looked_at += len(listed)
    return Changed(stems, looked_at, len(drawn) == len(shards))


def among(some: Sequence[Shard], config: Config, found: Standings) -> Changed:
    """Look at local tars that were drawn from a run's plan, by where its shards stand."""
    other = find(some, found, OutputDir(config.output_metadata_dir), most=None)
    other.all = len(some) == len(found.stems)
    return other


def made(found: Standings, stem: str) -> Outcome | None:
    """What the record says of the pair that lies there."""
    return found.done.get(stem) or found.outdated.get(stem)


def _stats(shards: Sequence[Shard]) -> list[os.stat_result | None]:
    """Several at once, as a file server takes its time over each; None where there is no tar."""
    step = -(-len(shards) // AT_ONCE) or 1
    parts = [shards[i : i + step] for i in range(0, len(shards), step)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [
            one for part in pool.map(lambda part: [_stat(s) for s in part], parts) for one in part
        ]


def _stat(shard: Shard) -> os.stat_result | None:
    with suppress(OSError, ValueError):
        return os.stat(shard.url)
    return None


def _is_suspect(shard: Shard, now: os.stat_result, found: Standings) -> bool:
    touched = max(now.st_mtime, now.st_ctime)  # a copy may keep the time of what it is copied from
    outcome = made(found, shard.stem)
    return now.st_size != shard.size or (outcome is not None and touched > outcome.started - SLACK)


def is_other(shard: Shard, now: os.stat_result, record: Record | None) -> bool:
    """By what the task has read; a record from before that was kept tells it less well."""
    if record is None:
        return False  # submit and verify have their own words for it
    if record.tar_mtime_ns:
        return (now.st_size, now.st_mtime_ns) != (record.tar_size, record.tar_mtime_ns)
    later = now.st_mtime > record.started + SLACK
    return later or now.st_size != (record.tar_size or shard.size or now.st_size)


def _is_other_in_store(
    shard: Shard,
    found: Standings,
    output: OutputDir,
    sizes: Mapping[str, int | None],
    times: Mapping[str, float],
) -> bool:
    """A store keeps the time at which a tar was put, and does not let it be set."""
    outcome, size = made(found, shard.stem), sizes[shard.url]
    if outcome is not None and times[shard.url] > outcome.started + SLACK:
        return True
    if size in (None, shard.size):
        return False
    record = _record(output, shard)
    return record is not None and size != (record.tar_size or shard.size or size)


def _record(output: OutputDir, shard: Shard) -> Record | None:
    with suppress(D2MError):
        return Pair(output, shard.stem).record()
    return None


def moved(
    known: Sequence[Shard], new: Sequence[Shard], named: Mapping[str, object]
) -> dict[str, Shard]:
    """Planned shards whose tars lie elsewhere now, by their old URLs: same name, same size.

    Args:
        known: shards that are planned.
        new: shards that would be added.
        named: all that the patterns name.
    """
    gone = {(own_name(s.url), s.size): s for s in known if s.size and s.url not in named}
    pairs = [(gone[key], s) for s in new if (key := (own_name(s.url), s.size)) in gone]
    if all(is_local(old.url) and os.path.lexists(old.url) for old, _ in pairs[:COPIES]):
        return {}  # these are others, or copies, and both sets may be wanted
    return {old.url: s for old, s in pairs}
