"""Input patterns to shards."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.launch import remote
from d2m_hpc.launch.naming import name_shards
from d2m_hpc.launch.remote import MISSING
from d2m_hpc.launch.uncollected import uncollected
from d2m_hpc.state.manifest import Shard
from d2m_hpc.state.rundir import atomic_write
from d2m_hpc.urls import GLOB, is_local, is_pipe, is_remote


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

    def take(self, named: Iterable[tuple[str, int | None]]) -> int:
        """Take what a pattern names; how many of it are there."""
        count = 0
        for url, size in named:
            count += 1
            if not (url.isascii() or _is_utf8(url)):  # no parquet can hold it
                name = os.fsencode(url).decode(errors="backslashreplace")
                self.mistakes.append(f"input_tars: the name '{name}' is not UTF-8; rename the file")
            elif url in self.sizes:
                self.duplicates += 1
            elif size == MISSING:
                self.missing.append(url)
                self.sizes[url] = None
                count -= 1
            else:
                self.sizes[url] = size
        return count


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@uncollected()
def expand(patterns: Iterable[str], sized: bool = True) -> Expansion:
    """List the tars that patterns name.

    Args:
        patterns: local paths, fsspec URLs or `pipe:` commands, each with braces (nested,
            zero-padded ranges) and, but for commands, globs.
        sized: local tars are asked for their sizes, which is most of the work.
    """
    found = Expansion()
    disk = _Disk(sized)
    for pattern in patterns:
        try:
            matched = found.take(_expand_one(pattern, disk))
        except D2MError as error:
            found.mistakes.append(f"input_tars: {error}")
            continue
        except Exception as error:  # a store's own library raises what it likes
            what = f"{type(error).__name__}: {error}"
            found.mistakes.append(f"input_tars: cannot list {pattern!r}: {what}")
            continue
        if not matched:
            found.mistakes.append(f"input_tars: found no tar for {pattern!r}; check the path")
    return found


class _Disk:
    """Local files, by one listing of each folder: a look-up each is slow on Lustre.

    Args:
        sized: with their sizes, asked for in the folder's own order, which Lustre reads ahead.
    """

    def __init__(self, sized: bool) -> None:
        self._sized = sized
        self._folders: dict[str, dict[str, int | None]] = {}

    def __getitem__(self, path: str) -> int | None:
        folder = path.rpartition("/")[0]
        if folder not in self._folders:
            self._folders[folder] = dict(self._list(f"{folder}/", lambda name: True))
        return self._folders[folder].get(path, MISSING)

    def glob(self, pattern: str) -> list[tuple[str, int | None]]:
        """All that a pattern names, but for folders, sorted."""
        folder, _, name = pattern.rpartition("/")
        if name == "**":
            folder, name = pattern, "*"
        folders = glob.glob(f"{folder}/", recursive=True) if GLOB.search(folder) else [f"{folder}/"]
        # As in a shell, what begins with a dot is named only by a pattern that does.
        visible = "" if name.startswith(".") else r"(?!\.)"
        matches = re.compile(visible + fnmatch.translate(name)).match
        return sorted(chain.from_iterable(self._list(f, matches) for f in sorted(folders)))

    def _list(self, folder: str, matches: Callable[[str], object]) -> list[tuple[str, int | None]]:
        """The paths in a folder whose names match, but for folders, sorted.

        Nothing else is asked for its size: beside tars lie as many files that are none.
        """
        found, sized = [], self._sized
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            files = (e for e in entries if matches(e.name) and not e.is_dir())
            found = [(e.name, _size(e, sized)) for e in files]
        found.sort()
        # Made in the order in which all that follows goes through them, paths lie so in memory.
        return [(folder + name, size) for name, size in found]


def _size(entry: os.DirEntry[str], sized: bool) -> int | None:
    try:
        if entry.is_file():
            return entry.stat().st_size if sized else None
    except OSError:  # it was there a moment ago
        pass
    return MISSING


def _expand_one(pattern: str, disk: _Disk) -> Iterator[tuple[str, int | None]]:
    pattern = pattern.removeprefix("file://")
    if is_local(pattern) and os.path.isfile(path := _absolute(pattern)):
        yield path, disk[path]  # a file's own name may hold braces and brackets
        return
    if is_remote(pattern):
        yield from remote.expand(list(_braces(pattern)))
        return
    for name in _braces(pattern):
        if is_pipe(name):
            yield name, None
        else:
            path = _absolute(name)
            wild = GLOB.search(path) and not os.path.isfile(path)
            yield from disk.glob(path) if wild else [(path, disk[path])]


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _braces(pattern: str) -> Iterator[str]:
    try:
        yield from braceexpand.braceexpand(pattern, escape=False)
    except ValueError:
        yield pattern


def plan_shards(sizes: Mapping[str, int | None], known: Sequence[Shard] = ()) -> list[Shard]:
    """All shards of a run: those planned before, in their order, then the new ones.

    Args:
        sizes: of all tars that the patterns name, by url; of new local ones that are not known
            they are asked for.
    """
    planned = {s.url for s in known}
    kept = [
        s if (size := sizes.get(s.url)) in (None, s.size) else s._replace(size=size) for s in known
    ]
    new = [url for url in sizes if url not in planned]
    stems = name_shards(new, (s.stem for s in known)) if new else []
    return kept + [
        Shard(stem, url, _size_now(url) if (size := sizes[url]) is None else size)
        for stem, url in zip(stems, new, strict=True)
    ]


def _size_now(url: str) -> int | None:
    try:
        return os.path.getsize(url) if is_local(url) else None
    except OSError:  # it is not there
        return None


_SCHEMA = pa.schema([("stem", pa.string()), ("url", pa.string()), ("size", pa.int64())])


def write_shards(path: Path, shards: Sequence[Shard]) -> None:
    stems, urls = _strings(s.stem for s in shards), _strings(s.url for s in shards)
    columns = [stems, urls, _integers([s.size for s in shards])]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=_SCHEMA), sink)
    atomic_write(path, sink.getvalue().to_pybytes())


# By their buffers (Arrow's columnar format): `pyarrow.array`, like `read_table`, imports pandas
# where it is installed, and that takes up to a second.


def _strings(texts: Iterable[str]) -> pa.Array:
    encoded = [text.encode() for text in texts]
    offsets = array("i", accumulate(map(len, encoded), initial=0))
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def _integers(values: Sequence[int | None]) -> pa.Array:
    known = np.packbits(np.array([v is not None for v in values], bool), bitorder="little")
    numbers = array("q", (v or 0 for v in values))
    buffers = [pa.py_buffer(known), pa.py_buffer(numbers)]
    return pa.Array.from_buffers(pa.int64(), len(values), buffers)


def read_shards(path: Path) -> list[Shard]:
    return list(map(Shard, *_read(path, _SCHEMA.names)))


def read_stems(path: Path) -> list[str]:
    """Of all shards of a plan, in its order."""
    [stems] = _read(path, ["stem"])
    return stems


def _read(path: Path, columns: Sequence[str]) -> list[list[Any]]:
    """Each column's values; none where there is no plan yet."""
    if not path.exists():
        return [[] for _ in columns]
    with pq.ParquetFile(path) as file:
        table = file.read(columns)
    return [table[name].to_pylist() for name in columns]


def check(expansion: Expansion, where: str) -> None:
    """Refuse patterns that name nothing.

    Raises:
        ConfigError: with every such pattern.
    """
    if expansion.mistakes:
        raise ConfigError(where, expansion.mistakes)
