"""Shards that a user takes out of a run's plan, on record: a wrong pattern is no run's end."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.plan import braces
from d2m_hpc.plan.patterns import absolute_pattern
from d2m_hpc.run.alone import alone
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import Shard
from d2m_hpc.run.shards import read_shards, write_shards
from d2m_hpc.run.user import user_name
from d2m_hpc.storage.files import is_private, own_only, owned
from d2m_hpc.storage.lease import Lease
from d2m_hpc.storage.texts import BRIEF, safe
from d2m_hpc.storage.urls import GLOB, is_local


@dataclass
class Forgotten:
    """Shards that are in no plan any more, though patterns may still name their tars.

    Attributes:
        by_url: their stems, which stay taken: their outputs may lie where others' would go.
    """

    by_url: dict[str, str]

    @classmethod
    def of(cls, run: RunDir) -> Forgotten:
        """A line that a kill has torn was never promised to anybody."""
        found: dict[str, str] = {}
        with suppress(FileNotFoundError, NotADirectoryError), open(run.forgotten, "rb") as file:
            for line in file:
                with suppress(ValueError, LookupError, TypeError, RecursionError):
                    said = json.loads(line)
                    if said["forgotten"]:
                        found[said["url"]] = said["stem"]
                    else:
                        found.pop(said["url"], None)
        return cls(found)

    def notices(self, named: Iterable[str]) -> list[str]:
        """What a submit says of those whose tars are named all the same."""
        count = sum(url in self.by_url for url in named)
        what = "`d2m forget` took them out of the plan (--undo puts them back)"
        return [f"{count} tars are left out: {what}"] if count else []


def forget(run: RunDir, names: Sequence[str], busy: Collection[str]) -> list[Shard]:
    """Take shards out of the plan; a later submit does not plan them again.

    Args:
        names: stems, or patterns of stems, paths or URLs.
        busy: stems in the hands of live array tasks.

    Raises:
        ConfigError: a name that no shard has.
        D2MError: tasks are working on some of them.
    """
    with alone(run):
        known = read_shards(run.shards)
        chosen = _chosen(known, names)
        gone = {s.stem for s in chosen}
        if held := sorted(stem for stem in gone if stem in busy or _is_held(run, stem)):
            raise D2MError(
                f"{len(held)} of these shards are in the hands of tasks ({', '.join(held[:3])}); "
                "`d2m cancel` ends them, or wait until they have ended"
            )
        _put_down(run, chosen, True)
        write_shards(run.shards, [s for s in known if s.stem not in gone])
    return chosen


def remember(run: RunDir, names: Sequence[str]) -> list[Shard]:
    """Undo `forget`; the shards have their stems back.

    Raises:
        ConfigError: a name that no forgotten shard has.
    """
    with alone(run):
        gone = Forgotten.of(run).by_url
        chosen = _chosen([Shard(stem, url) for url, stem in gone.items()], names)
        known = read_shards(run.shards)
        there = {s.url for s in known}
        write_shards(run.shards, [*known, *(s for s in chosen if s.url not in there)])
        _put_down(run, chosen, False)
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
    """By stem, or by path where the pattern is one."""
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


def _is_held(run: RunDir, stem: str) -> bool:
    path = run.lease(stem)
    if not path.exists():
        return False
    lease = Lease(path)
    if lease.claim():
        lease.release()
        return False
    return True


def _put_down(run: RunDir, shards: Iterable[Shard], forgotten: bool) -> None:
    """On disk when it returns, and before the plan changes."""
    told = {"forgotten": forgotten, "when": time.time(), "user": _user()}
    lines = [json.dumps({"stem": s.stem, "url": s.url, **told}, ensure_ascii=True) for s in shards]
    opener = own_only if is_private(run.shards) else owned
    with open(run.forgotten, "ab", opener=opener) as file:
        file.write(("\n" + "\n".join(lines) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _user() -> str:
    try:
        return user_name()
    except (KeyError, OSError):  # a container without the user
        return str(os.getuid())
