"""Input patterns to tars, and tars to shards."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

from d2m_hpc.config.places import Mistake
from d2m_hpc.errors import D2MError
from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.plan import braces, remote
from d2m_hpc.plan.naming import is_archive, is_shard, name_shards
from d2m_hpc.plan.oddities import Oddities
from d2m_hpc.plan.remote import MISSING
from d2m_hpc.run.records import Shard
from d2m_hpc.run.slices import Slice, Tree
from d2m_hpc.storage.urls import GLOB, is_folder, is_local, is_pipe, is_remote

SPECIAL = -2
"""The size of a device, a pipe or a socket."""
_STARS = re.compile(r"/(\*\*/)+")
_LITERAL = re.compile(r"\[([*?\[])\]")
"""A character as `glob.escape` writes it."""


@dataclass
class Expansion:
    """The tars that patterns name.

    Attributes:
        sizes: URL to size in bytes, or None if not known, in the order of the patterns.
        times: when each tar that a store listed was put there, in seconds since the epoch, by URL.
        duplicates: how many times a URL was named again.
        missing: local files that are named without a glob and do not exist.
        mistakes: patterns that name nothing, or files that are no tars.
        key: the config's key with the patterns.
        notes: on what is in folders of pictures and in no shard.
    """

    sizes: dict[str, int | None] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    duplicates: int = 0
    missing: list[str] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    key: str = "input_tars"
    notes: list[str] = field(default_factory=list)

    def take(self, named: Iterable[tuple[str, int | None]], odd: Oddities) -> int:
        """Take the files that a pattern names; returns how many of them exist.

        Args:
            odd: receives the files that are not named as tars.
        """
        count = 0
        for url, size in named:
            count += 1
            if size == SPECIAL:
                self.wrong(f"{url} is a device, a pipe or a socket; valid are regular files")
                continue
            is_named = url.endswith(".tar") or is_folder(url) or is_shard(url, self.key)
            if not is_named and size != MISSING:
                odd.add(url)
            path = Slice.of(url).folder if is_folder(url) else url
            if not (path.isascii() or _is_utf8(path)):  # no parquet can hold it
                name = os.fsencode(path).decode(errors="backslashreplace")
                self.wrong(f"the name '{name}' is not UTF-8; rename it")
            elif url in self.sizes:
                self.duplicates += 1
            elif size == MISSING:
                self.missing.append(url)
                self.sizes[url] = None
                count -= 1
            else:
                self.sizes[url] = size
        return count

    def wrong(self, what: str, pattern: str | None = None) -> None:
        mistake = Mistake((self.key,), what, pattern)
        if self.mistakes[-1:] != [mistake]:  # a folder's shards have one name in common
            self.mistakes.append(mistake)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@gc_paused()
def expand(
    patterns: Iterable[str],
    sized: bool = True,
    key: str = "input_tars",
    tree: Callable[[str], Tree] | None = None,
) -> Expansion:
    """List the tars that patterns name.

    Args:
        patterns: local paths, fsspec URLs or `pipe:` commands, each with braces (nested,
            zero-padded ranges) and, except in commands, globs; a folder stands for the tars in it.
        sized: whether to find the sizes of local tars, which is most of the work.
        key: the config's key with the patterns; `inputs` may name parquets, too.
        tree: plans the pictures of a folder; None where a folder stands for the tars in it.
    """
    found = Expansion(key=key)
    disk = _Disk(sized, tree, found.notes)
    left = braces.MOST
    for pattern in patterns:
        odd = Oddities(pattern, key)
        try:
            left -= braces.require_few(pattern, left)
            matched = found.take(_expand_one(pattern, disk, found), odd)
        except D2MError as error:
            found.wrong(str(error), pattern)
            continue
        except Exception as error:  # each store raises errors of its own
            found.wrong(f"cannot list {pattern!r}: {type(error).__name__}: {error}", pattern)
            continue
        if not matched:
            is_there = key == "input_tars" and os.path.isdir(pattern)
            more = "; `inputs` in place of `input_tars` takes pictures" if is_there else ""
            kind = "tar" if key == "input_tars" else "file"
            found.wrong(f"found no {kind} for {pattern!r}; check the path{more}", pattern)
        elif what := odd.told():
            found.wrong(what, pattern)
    return found


class _Disk:
    """Local files, by one listing of each folder: looking files up one by one is slow on Lustre.

    Args:
        sized: whether to find sizes, in the folder's own order, which Lustre reads ahead.
        tree: plans the pictures of a folder; None where a folder stands for the tars in it.
        notes: receives what is in such folders and in no shard.
    """

    def __init__(self, sized: bool, tree: Callable[[str], Tree] | None, notes: list[str]) -> None:
        self._sized, self._tree, self._notes = sized, tree, notes
        self._folders: dict[str, dict[str, int | None]] = {}

    def tars(self, folder: str) -> list[tuple[str, int | None]]:
        """All files in a folder that are named as tars, sorted; or the shards of its pictures."""
        if self._tree:
            return self._pictures(folder)
        return self._list(f"{folder.rstrip('/')}/", is_archive)

    def _pictures(self, folder: str) -> list[tuple[str, int | None]]:
        assert self._tree is not None
        tree = self._tree(folder)
        self._notes += tree.notes(folder)
        if not tree.slices:
            raise D2MError(
                f"found no picture in {folder} or below; name parquets and tars as files, such as "
                f"'{folder}/*.parquet'"
            )
        return [(there.url, None) for there in tree.slices]

    def __getitem__(self, path: str) -> int | None:
        folder = path.rpartition("/")[0]
        if folder not in self._folders:
            self._folders[folder] = dict(self._list(f"{folder}/", lambda name: True))
        return self._folders[folder].get(path, MISSING)

    def glob(self, pattern: str) -> list[tuple[str, int | None]]:
        """All files that a pattern names, sorted."""
        folder, _, name = pattern.rpartition("/")
        if name == "**":
            folder, name = pattern, "*"
        folders = _folders(folder) if GLOB.search(folder) else [f"{folder}/"]
        # As in a shell, only a pattern that begins with a dot names files that do.
        visible = "" if name.startswith(".") else r"(?!\.)"
        matches = re.compile(visible + fnmatch.translate(name)).match
        return sorted(chain.from_iterable(self._list(f, matches) for f in sorted(folders)))

    def _list(self, folder: str, matches: Callable[[str], object]) -> list[tuple[str, int | None]]:
        """The files in a folder whose names match, sorted; other files are not asked for sizes."""
        found, sized = [], self._sized
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            files = (e for e in entries if matches(e.name) and not _is_folder(e))
            found = [(e.name, _size(e, sized)) for e in files]
        found.sort()
        # Paths that are made in sorted order lie in memory as they are used later.
        return [(folder + name, size) for name, size in found]


def _folders(pattern: str) -> list[str]:
    """The folders that a pattern names, sorted, each with a slash at its end.

    `**` stands for a folder and all folders below it whose names do not begin with a dot. Links to
    folders are followed, and each folder counts once: by its own path, or by the first link to it.
    """
    head, stars, rest = _STARS.sub("/**/", f"{pattern}/").partition("/**/")
    if not stars:
        return sorted(glob.glob(head))
    bases = _folders(head) if GLOB.search(head) else [f"{head}/"]
    below = _below(bases)
    if not rest:
        return sorted(below)
    found = (_folders(glob.escape(each) + rest.rstrip("/")) for each in below)
    return sorted(set(chain.from_iterable(found)))


def _below(bases: Iterable[str]) -> list[str]:
    """Some folders and all below them, each once; links are followed last."""
    found: list[str] = []
    known: set[tuple[int, int]] = set()
    links: list[str] = []
    folders = [*bases]
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            there = os.stat(folder)
        except OSError:  # the folder is missing, or a link that leads to itself
            continue
        if (there.st_dev, there.st_ino) in known:
            continue
        known.add((there.st_dev, there.st_ino))
        found.append(folder)
        with suppress(OSError), os.scandir(folder) as entries:  # `_list` reports the error
            for entry in sorted(entries, key=lambda e: e.name):
                if not entry.name.startswith(".") and _is_folder(entry):
                    (links if entry.is_symlink() else folders).append(f"{folder}{entry.name}/")
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _size(entry: os.DirEntry[str], sized: bool) -> int | None:
    try:
        if entry.is_file():
            return entry.stat().st_size if sized else None
        entry.stat()
    except OSError:  # the file was removed meanwhile, or is a broken link
        return MISSING
    return SPECIAL


def _expand_one(pattern: str, disk: _Disk, found: Expansion) -> Iterator[tuple[str, int | None]]:
    pattern = pattern.removeprefix("file://")
    if is_local(pattern) and os.path.isfile(path := _absolute(pattern)):
        yield path, disk[path]  # a file's own name may hold braces and brackets
        return
    if is_local(pattern) and pattern and os.path.isdir(path):
        yield from disk.tars(path)
        return
    if is_remote(pattern):
        yield from remote.expand(list(braces.expand(pattern)), found.times, found.key)
        return
    for name in braces.expand(pattern):
        if is_pipe(name):
            yield name, None
        elif name:  # an empty path would be this folder's
            yield from _named(name, disk)


def _named(name: str, disk: _Disk) -> Iterable[tuple[str, int | None]]:
    """List the files that a pattern without braces names."""
    path = _absolute(name)
    if GLOB.search(name) and not os.path.isfile(path):
        if GLOB.search(_LITERAL.sub("", name)):
            return disk.glob(absolute_pattern(name))
        path = _absolute(_LITERAL.sub(r"\1", name))
    if (size := disk[path]) == MISSING and not is_archive(path) and os.path.isdir(path):
        return disk.tars(path)
    return [(path, size)]


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def absolute_pattern(pattern: str) -> str:
    """Make a pattern absolute; characters of this folder's path and of `~` are no globs in it."""
    if pattern.startswith("~"):
        home, slash, rest = pattern.partition("/")
        pattern = glob.escape(os.path.expanduser(home)) + slash + rest
    return os.path.normpath(os.path.join(glob.escape(os.getcwd()), pattern))


def plan_shards(
    sizes: Mapping[str, int | None], known: Sequence[Shard] = (), taken: Iterable[str] = ()
) -> list[Shard]:
    """Plan all shards of a run: those planned before, in their order, then the new ones.

    Args:
        sizes: sizes of all tars that the patterns name, by URL; a missing size of a new local tar
            is looked up.
        taken: stems that no new shard may have.
    """
    planned = {s.url for s in known}
    kept = [
        s if (size := sizes.get(s.url)) in (None, s.size) else s._replace(size=size) for s in known
    ]
    new = [url for url in sizes if url not in planned]
    stems = name_shards(new, chain((s.stem for s in known), taken)) if new else []
    return kept + [
        Shard(stem, url, _size_now(url) if (size := sizes[url]) is None else size)
        for stem, url in zip(stems, new, strict=True)
    ]


def _size_now(url: str) -> int | None:
    try:
        return os.path.getsize(url) if is_local(url) else None
    except OSError:  # the tar is missing
        return None
