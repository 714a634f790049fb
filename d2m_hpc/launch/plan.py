"""Input patterns to shards."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import braceexpand
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from d2m_hpc.errors import ConfigError
from d2m_hpc.state.manifest import Shard
from d2m_hpc.state.rundir import atomic_write
from d2m_hpc.urls import PIPE, is_local, is_pipe, is_remote

_ARCHIVE = re.compile(r"\.(tar|tar\.gz|tgz)$", re.IGNORECASE)
_GLOB = re.compile(r"[*?\[]")
_LONGEST = 200
"""Bytes of a stem: a file name has 255, and temporary names are made from it."""


@dataclass
class Expansion:
    """What the patterns name.

    Attributes:
        sizes: url to size in bytes, or None where it is not known, in the order of the patterns.
        duplicates: how many times a url was named again.
        missing: local files that a pattern names and that are not there.
        mistakes: patterns that name nothing.
    """

    sizes: dict[str, int | None] = field(default_factory=dict)
    duplicates: int = 0
    missing: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)

    def add(self, url: str, size: int | None) -> bool:
        """Take what a pattern names; False where it is not there."""
        if not _is_utf8(url):  # neither a parquet nor most readers of the outputs can hold it
            name = os.fsencode(url).decode(errors="backslashreplace")
            self.mistakes.append(f"input_tars: the name '{name}' is not UTF-8; rename the file")
        elif url in self.sizes:
            self.duplicates += 1
        elif size == _MISSING:
            self.missing.append(url)
            self.sizes[url] = None
            return False
        else:
            self.sizes[url] = size
        return True


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def expand(patterns: Iterable[str]) -> Expansion:
    """List the tars that patterns name.

    Args:
        patterns: local paths, fsspec URLs or `pipe:` commands, each with braces (nested,
            zero-padded ranges) and, but for commands, globs.
    """
    found = Expansion()
    sizes = _LocalSizes()
    for pattern in patterns:
        matched = 0
        try:
            for url, size in _expand_one(pattern, sizes):
                matched += found.add(url, size)
        except Exception as error:  # a store's own library raises what it likes
            what = f"{type(error).__name__}: {error}"
            found.mistakes.append(f"input_tars: cannot list {pattern!r}: {what}")
            continue
        if not matched:
            found.mistakes.append(f"input_tars: found no tar for {pattern!r}; check the path")
    return found


_MISSING = -1


class _LocalSizes:
    """Sizes of local files, by one listing of each folder: a stat each is slow on Lustre."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, int]] = {}

    def __getitem__(self, path: str) -> int:
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = self._list(folder)
        return self._folders[folder].get(name, _MISSING)

    @staticmethod
    def _list(folder: str) -> dict[str, int]:
        try:
            with os.scandir(folder) as entries:
                return {e.name: e.stat().st_size for e in entries if e.is_file()}
        except OSError:
            return {}


def _expand_one(pattern: str, sizes: _LocalSizes) -> Iterator[tuple[str, int | None]]:
    pattern = pattern.removeprefix("file://")
    if is_local(pattern) and os.path.isfile(path := _absolute(pattern)):
        yield path, sizes[path]  # a file's own name may hold braces and brackets
        return
    for name in _braces(pattern):
        if is_pipe(name):
            yield name, None
        elif is_remote(name):
            yield from _expand_remote(name)
        else:
            path = _absolute(name)
            wild = _GLOB.search(path) and not os.path.isfile(path)
            for match in sorted(glob.glob(path, recursive=True)) if wild else [path]:
                if not (wild and os.path.isdir(match)):
                    yield match, sizes[match]


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _braces(pattern: str) -> Iterator[str]:
    try:
        yield from braceexpand.braceexpand(pattern, escape=False)
    except ValueError:
        yield pattern


def _expand_remote(url: str) -> Iterator[tuple[str, int | None]]:
    if not _GLOB.search(location(url)):
        fsspec.get_filesystem_class(_scheme(url))  # a store that no library is here for
        yield url, None
        return
    fs, path = fsspec.core.url_to_fs(url)
    for match, info in sorted(fs.glob(path, detail=True).items()):
        if info.get("type") != "directory":
            yield fs.unstrip_protocol(match), info.get("size")


def _scheme(url: str) -> str:
    return url.partition("://")[0].rpartition("::")[2]


def location(url: str) -> str:
    """The path-like part of a url that names the tar: for a command, its word that ends in .tar."""
    if is_pipe(url):
        tars = [w for w in _words(url.removeprefix(PIPE)) if _ARCHIVE.search(w)]
        return tars[-1] if tars else _short_hash(url)
    if not is_remote(url):
        return url
    rest = url.partition("://")[2]
    if _scheme(url) in ("http", "https"):  # elsewhere these two may be part of a name
        rest = re.split("[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    return host.rpartition("@")[2] + slash + path


def _words(command: str) -> list[str]:
    """A shell line's words, without its operators and with options' values on their own."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
    except ValueError:
        words = command.split()
    return [re.sub("^-[^=]*=", "", word) for word in words]


def _short_hash(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def name_shards(urls: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """Give every url a stem of its own: the tar's, with its folders in front if stems collide.

    Args:
        urls: distinct urls.
        known: url to stem of shards that were named before; these never change.

    Returns:
        url to stem, for all urls.
    """
    new = [url for url in urls if url not in known]
    parts = {url: _stem_parts(url) for url in new}
    taken = set(known.values())
    named: dict[str, str] = {url: known[url] for url in urls if url in known}
    depth = 1
    while parts:
        candidates = {url: "_".join(p[-depth:]) for url, p in parts.items()}
        count = Counter(candidates.values())
        for url, stem in candidates.items():
            too_long = len(stem.encode()) > _LONGEST
            if too_long or ((count[stem] > 1 or stem in taken) and depth >= len(parts[url])):
                name = parts[url][-1].encode()[:_LONGEST].decode(errors="ignore")
                stem = f"{name}_{_short_hash(url)}"
            elif count[stem] > 1 or stem in taken:
                continue
            named[url] = stem
            del parts[url]
        taken.update(named.values())
        depth += 1
    return named


def _stem_parts(url: str) -> list[str]:
    *folders, name = [p for p in location(url).split("/") if p] or ["shard"]
    return [*folders, _ARCHIVE.sub("", name) or name]


def plan_shards(sizes: Mapping[str, int | None], known: Sequence[Shard] = ()) -> list[Shard]:
    """All shards of a run: those planned before, in their order, then the new ones."""
    stems = name_shards(sizes, {s.url: s.stem for s in known})
    old = {s.url for s in known}
    kept = [s._replace(size=sizes.get(s.url, s.size)) for s in known]
    return kept + [Shard(stems[u], u, size) for u, size in sizes.items() if u not in old]


_SCHEMA = pa.schema([("stem", pa.string()), ("url", pa.string()), ("size", pa.int64())])


def write_shards(path: Path, shards: Sequence[Shard]) -> None:
    columns = [list(c) for c in zip(*shards, strict=True)] or [[], [], []]
    table = pa.table(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    atomic_write(path, sink.getvalue().to_pybytes())


def read_shards(path: Path) -> list[Shard]:
    if not path.exists():
        return []
    columns = pq.read_table(path, schema=_SCHEMA).to_pydict()
    return [Shard(*row) for row in zip(*columns.values(), strict=True)]


def check(expansion: Expansion, where: str) -> None:
    """Refuse patterns that name nothing.

    Raises:
        ConfigError: with every such pattern.
    """
    if expansion.mistakes:
        raise ConfigError(where, expansion.mistakes)
