"""Find tars that were replaced since their outputs were made, and tars that were moved.

A shard's record, which its parquet holds, has the size and time of the tar that was read. Reading
millions of parquets takes long, so only those are read whose tar differs in size from the plan, or
was touched since the task began. For a tar in a store, the store's listing shows both.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

from d2m_hpc.config import Config
from d2m_hpc.errors import D2MError
from d2m_hpc.plan.naming import own_name
from d2m_hpc.plan.standing import Standings
from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import Record, Shard
from d2m_hpc.run.slices import Slice, version_of
from d2m_hpc.storage.texts import counted, few
from d2m_hpc.storage.urls import is_folder, is_local

LOOKED_AT = 1000
"""The most tars that a command checks unless asked: each check asks a file server."""
AT_ONCE = 16
"""Checks at the same time."""
SLICES = 10
"""The most slices of folders that a command checks unless asked."""
SLACK = 600.0
"""Seconds by which the clocks of file servers and nodes may differ."""
COPIES = 100
"""Old places that are checked to tell moved tars from other tars of the same names."""
NOTHING: Mapping[str, float] = {}


@dataclass
class Changed:
    """The result of `find`.

    Attributes:
        stems: shards whose tar was replaced, or whose files of texts or captions were.
        texts: the latter.
        looked_at: the number of finished shards whose tars were checked.
        all: whether all tars were checked.
    """

    stems: list[str] = field(default_factory=list)
    looked_at: int = 0
    all: bool = True
    texts: list[str] = field(default_factory=list)

    def notices(self) -> Iterator[str]:
        if self.texts:
            yield (
                f"shards whose files of texts or captions are not those that were read: "
                f"{few(self.texts)}; "
                "`d2m-submit --recompute-changed` computes them again"
            )
        if stems := [stem for stem in self.stems if stem not in self.texts]:
            some = "" if self.all else f" of {self.looked_at:,} that were looked at, at random"
            one = len(stems) == 1
            others = "is not the one that was" if one else "are not those that were"
            yield (
                f"{counted(len(stems), 'tar')}{some} {others} computed, by size or time "
                f"({few(stems)}); "
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
    """Check the tars of finished shards.

    Args:
        shards: the plan's shards, with the plan's sizes.
        most: the number of local tars to check, drawn at random; None for all.
        sizes, times: sizes and times of tars in stores, by a new listing; all of these are checked.
    """
    drawn = shards if most is None or len(shards) <= most else random.sample(shards, most)
    local = [s for s in drawn if is_local(s.url) and made(found, s.stem)]
    # Of a slice of a folder, all files are asked for.
    slices = [s for s in drawn if is_folder(s.url) and made(found, s.stem)]
    local += slices[: None if most is None else SLICES]
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
    seen: dict[str, tuple[int, int]] = {}
    texts = [s.stem for s in drawn if _has_other_texts(made(found, s.stem), seen)]
    return Changed([*dict.fromkeys(stems + texts)], looked_at, len(drawn) == len(shards), texts)


def among(some: Sequence[Shard], config: Config, found: Standings) -> Changed:
    """Check local tars that were drawn from a run's plan."""
    other = find(some, found, OutputDir(config.output_metadata_dir), most=None)
    other.all = len(some) == len(found.stems)
    return other


def made(found: Standings, stem: str) -> Outcome | None:
    """The record of the pair in the output folder; None if there is no such pair."""
    return found.done.get(stem) or found.outdated.get(stem)


def _stats(shards: Sequence[Shard]) -> list[os.stat_result | None]:
    """Stat local tars, several at once, as a file server may be slow; None for a missing tar."""
    step = -(-len(shards) // AT_ONCE) or 1
    parts = [shards[i : i + step] for i in range(0, len(shards), step)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(chain.from_iterable(pool.map(lambda part: [*map(_stat, part)], parts)))


def _stat(shard: Shard) -> os.stat_result | None:
    with suppress(OSError, ValueError):
        if not is_folder(shard.url):
            return os.stat(shard.url)
        size, time = version_of(Slice.of(shard.url).files())
        # As a stat has them: mode, inode, ..., size, times in seconds, and in nanoseconds.
        return os.stat_result(
            [0] * 6 + [size] + [time // 10**9] * 3 + [time / 1e9] * 3 + [time] * 3
        )
    return None


def _has_other_texts(outcome: Outcome | None, seen: dict[str, tuple[int, int]]) -> bool:
    """Whether a file of texts or captions that a shard was computed with was replaced.

    Args:
        seen: sizes and times of such files by path, as all shards may have one.
    """
    for path, *version in outcome.texts if outcome else ():
        with suppress(OSError, ValueError):
            if path not in seen:
                now = os.stat(path)
                seen[path] = now.st_size, now.st_mtime_ns
            if seen[path] != (*version,):
                return True
    return False


def _is_suspect(shard: Shard, now: os.stat_result, found: Standings) -> bool:
    touched = max(now.st_mtime, now.st_ctime)  # a copy may keep the original's mtime
    outcome = made(found, shard.stem)
    return now.st_size != shard.size or (outcome is not None and touched > outcome.started - SLACK)


def is_other(shard: Shard, now: os.stat_result, record: Record | None) -> bool:
    """Whether a tar is not the one on record; guesses for records of earlier versions."""
    if record is None:
        return False  # submit and verify report a missing record
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
    """Whether a tar in a store was replaced; a store's times cannot be set by users.

    That is the store's clock, and a record's time is the node's, so that a tar which is replaced
    within `SLACK` after a shard began is told by its size alone. Nothing is computed again for it
    unless the user asks for that.
    """
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
    """Find planned shards whose tars lie elsewhere now, with the same name and size.

    Args:
        known: the planned shards.
        new: the shards that would be added.
        named: all URLs that the patterns name.

    Returns:
        The new shards by the old URLs.
    """
    gone = {(own_name(s.url), s.size): s for s in known if s.size and s.url not in named}
    pairs = [(gone[key], s) for s in new if (key := (own_name(s.url), s.size)) in gone]
    if all(is_local(old.url) and os.path.lexists(old.url) for old, _ in pairs[:COPIES]):
        return {}  # the new tars are others, or copies, and both may be wanted
    return {old.url: s for old, s in pairs}
