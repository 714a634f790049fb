"""Take shards out of a run's plan, and put them back: a wrong pattern does not spoil a run."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.plan import braces
from d2m_hpc.plan.patterns import absolute_pattern
from d2m_hpc.run.alone import alone
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import Shard
from d2m_hpc.run.shards import read_shards, write_shards
from d2m_hpc.run.user import user_name
from d2m_hpc.storage.files import is_private, own_only, owned
from d2m_hpc.storage.lease import held
from d2m_hpc.storage.texts import BRIEF, few, safe
from d2m_hpc.storage.urls import GLOB, is_local


def forgotten(run: RunDir) -> dict[str, str]:
    """Read the shards that were taken out of a run's plan: their stems, by URL.

    No other shard may have these stems, as the shards' outputs may remain. A line that a kill has
    torn was never committed.
    """
    found: dict[str, str] = {}
    with suppress(FileNotFoundError, NotADirectoryError), open(run.forgotten, "rb") as file:
        for line in file:
            with suppress(ValueError, LookupError, TypeError, RecursionError):
                change = json.loads(line)
                if change["forgotten"]:
                    found[change["url"]] = change["stem"]
                else:
                    found.pop(change["url"], None)
    return found


def forget(run: RunDir, names: Sequence[str], busy: Collection[str]) -> list[Shard]:
    """Take shards out of the plan; a later submit does not plan them again.

    Args:
        names: stems, or patterns of stems, paths or URLs.
        busy: stems in the hands of live array tasks.

    Raises:
        ConfigError: no shard has one of the names.
        D2MError: tasks are working on some of the shards.
    """
    with alone(run):
        known = read_shards(run.shards)
        chosen = _chosen(known, names)
        gone = {s.stem for s in chosen}
        taken = {path.stem for path in held(map(run.lease, gone))}
        if working := sorted(gone & ({*busy} | taken)):
            raise D2MError(
                f"{len(working)} of these shards are in the hands of tasks ({few(working)}); "
                "`d2m cancel` ends them, or wait until they have ended"
            )
        _write_down(run, chosen, True)
        write_shards(run.shards, [s for s in known if s.stem not in gone])
    return chosen


def remember(run: RunDir, names: Sequence[str]) -> list[Shard]:
    """Put forgotten shards back into the plan, with their stems.

    Raises:
        ConfigError: no forgotten shard has one of the names.
    """
    with alone(run):
        chosen = _chosen([Shard(stem, url) for url, stem in forgotten(run).items()], names)
        known = read_shards(run.shards)
        there = {s.url for s in known}
        write_shards(run.shards, [*known, *(s for s in chosen if s.url not in there)])
        _write_down(run, chosen, False)
    return chosen


def _chosen(shards: Sequence[Shard], names: Sequence[str]) -> list[Shard]:
    chosen: dict[str, Shard] = {}
    unknown = []
    for name in names:
        found = [s for s in shards if s.stem == name or s.url == name] or _matching(shards, name)
        if not found:
            unknown.append(
                f"no shard of the plan is named {safe(name, BRIEF)!r}; valid are stems, and "
                "patterns of stems, paths or URLs, such as 'wds/*.parquet'"
            )
        chosen |= {s.stem: s for s in found}
    if unknown:
        raise ConfigError("forget", unknown)
    return list(chosen.values())


def _matching(shards: Sequence[Shard], name: str) -> list[Shard]:
    """Choose shards by a pattern of stems, paths or URLs."""
    braces.require_few(name, braces.MOST)
    patterns = set(braces.expand(name))
    if "/" in name:
        local = [p for p in patterns if is_local(p)]
        patterns |= {os.path.abspath(os.path.expanduser(p)) for p in local if not GLOB.search(p)}
        patterns |= {absolute_pattern(p) for p in local if GLOB.search(p)}
    named, wild = set(), []
    for pattern in patterns:
        if GLOB.search(pattern):
            wild.append(fnmatch.translate(pattern))
        else:
            named.add(pattern)
    matches = [re.compile(p).match for p in wild]
    return [
        s
        for s in shards
        if any(text in named or any(m(text) for m in matches) for text in (s.stem, s.url))
    ]


def _write_down(run: RunDir, shards: Iterable[Shard], forgotten: bool) -> None:
    """Write the change to disk, before the plan changes."""
    told = {"forgotten": forgotten, "when": time.time(), "user": user_name()}
    lines = [json.dumps({"stem": s.stem, "url": s.url, **told}, ensure_ascii=True) for s in shards]
    opener = own_only if is_private(run.shards) else owned
    with open(run.forgotten, "ab", opener=opener) as file:
        file.write(("\n" + "\n".join(lines) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
