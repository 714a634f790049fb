"""Folders of pictures as shards: a shard is what lies between two keys of one folder.

As a shard keeps its first and last key, later submits plan the same shards, and further ones for
keys that came since.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from unicodedata import normalize
from urllib.parse import quote_from_bytes, unquote_to_bytes

from d2m_hpc.storage.texts import safe
from d2m_hpc.storage.urls import FOLDER, is_folder

SHOWN = 3
"""Names that are shown of many."""


class File(NamedTuple):
    """A file of a folder, or a link there; `size` in bytes, -1 for a link, -2 for a device, a pipe
    or a socket."""

    name: str
    size: int
    mtime_ns: int


class Slice(NamedTuple):
    """The samples of a folder, without those of folders in it, from one key to another.

    Attributes:
        part: the slice's number; empty if the folder was planned as one slice.
    """

    folder: str
    part: str
    first: str
    last: str

    @classmethod
    def of(cls, url: str) -> Slice:
        parts = url.removeprefix(FOLDER).split("#")
        return cls(*(os.fsdecode(unquote_to_bytes(part)) for part in parts))

    @property
    def url(self) -> str:
        """The slice as a text that any file can hold, whatever the names are."""
        return FOLDER + "#".join(quote_from_bytes(os.fsencode(part)) for part in self)

    def files(self, on_name: Callable[[str], None] = lambda name: None) -> list[File]:
        """All files that may belong to the slice, and those whose names differ from theirs by the
        form of letters alone; sorted. Links are not followed.

        Args:
            on_name: called with each name in the folder.

        Raises:
            OSError: the folder cannot be listed.
        """
        with os.scandir(self.folder) as entries:
            chosen, others = [], []
            for entry in entries:
                on_name(entry.name)
                if any(self.first <= key <= self.last for key in _keys(entry.name)):
                    chosen.append(entry)
                elif not entry.name.isascii():
                    others.append(entry)
            forms = {form for entry in chosen for form in _forms(entry.name)}
            chosen += [entry for entry in others if not forms.isdisjoint(_forms(entry.name))]
            return sorted(_file(e) for e in chosen if not e.is_dir(follow_symlinks=False))


def _keys(name: str) -> Iterator[str]:
    """What may be a file's key."""
    return (name[:at] for at, letter in enumerate(name) if letter == "." and at)


def _forms(name: str) -> Iterator[str]:
    return (normalize("NFC", key) for key in _keys(name) if not key.isascii())


def _file(entry: os.DirEntry[str]) -> File:
    stat = entry.stat(follow_symlinks=False)
    size = -1 if entry.is_symlink() else -2
    size = stat.st_size if entry.is_file(follow_symlinks=False) else size
    return File(entry.name, size, stat.st_mtime_ns)


def owner(names: Collection[str]) -> Callable[[str], str]:
    """Find the name that another name stands for: macOS decomposes letters in names.

    A name in another form of letters stands for one of `names` only if it is none of them as it is,
    and no two of them differ by that form alone. Any other name stands for itself.
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        if not name.isascii():
            alike.setdefault(normalize("NFC", name), []).append(name)

    def of(name: str) -> str:
        if name.isascii() or name in names:
            return name
        found = alike.get(normalize("NFC", name), [])
        return found[0] if len(found) == 1 else name

    return of


def place_of(url: str) -> str:
    """Where a shard is, as a user reads it: a slice by its folder and its first and last name."""
    if not is_folder(url):
        return url
    there = Slice.of(url)
    return f"{there.folder} ({there.first} to {there.last})"


def version_of(files: Collection[File]) -> tuple[int, int]:
    """The bytes of some files and the time of the newest, by which a later look notices changes."""
    return sum(max(0, f.size) for f in files), max((f.mtime_ns for f in files), default=0)


def key_of(name: str, known: Collection[str]) -> tuple[str, str]:
    """A file's key, and its extension in lower case; both empty for a hidden file.

    The extension is the longest one that is known, or what follows the last dot: unlike tars'
    members, files in folders often have names with dots.
    """
    at = name.find(".")
    if at == 0:
        return "", ""
    while at > 0:
        following = name.find(".", at + 1)
        if following < 0 or name[at + 1 :].lower() in known:
            return name[:at], name[at + 1 :].lower()
        at = following
    return name, ""


@dataclass
class Tree:
    """The pictures in a folder and in all folders below it.

    Attributes:
        slices: the shards.
        others: files that belong to no picture.
        links: links to folders, which are not followed.
    """

    slices: list[Slice] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)

    def notes(self, root: str) -> Iterator[str]:
        """What is in the folder and in no shard."""
        for paths, what in (
            (self.others, "files belong to no picture and are not read"),
            (self.links, "links to folders are not followed"),
        ):
            if paths:
                few = ", ".join(safe(os.path.relpath(p, root), 60) for p in paths[:SHOWN])
                more = f" and {len(paths) - SHOWN:,} more" if len(paths) > SHOWN else ""
                yield f"{safe(root)}: {what}: {few}{more}"


def planned(
    root: str, pictures: Collection[str], known: Collection[str], most: int, earlier: Iterable[str]
) -> Tree:
    """Plan the shards of a folder and of those below it, in the order of their paths.

    Args:
        pictures: the extensions that make a file a sample's picture.
        known: these and the extensions of the other members.
        most: samples of a new shard.
        earlier: URLs of the shards that are planned already.

    Raises:
        OSError: a folder cannot be listed.
    """
    found = Tree()
    before: dict[str, list[Slice]] = {}
    for url in filter(is_folder, earlier):
        before.setdefault((there := Slice.of(url)).folder, []).append(there)
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (os.path.join(folder, name) for name in folders)
        found.links += filter(os.path.islink, paths)
        split = [(name, *key_of(name, known)) for name in sorted(names) if name[0] != "."]
        keys = {key for _, key, extension in split if extension in pictures}
        own = owner(keys)
        left = (name for name, key, _ in split if own(key) not in keys)
        found.others += (os.path.join(folder, name) for name in left)
        found.slices += _slices(folder, sorted(keys), most, before.get(folder, []))
    return found


def _raise(error: OSError) -> None:
    raise error


def _slices(folder: str, keys: list[str], most: int, earlier: list[Slice]) -> Iterator[Slice]:
    """The earlier slices of a folder that have a key still, and new ones of all other keys."""
    earlier = sorted(earlier, key=lambda known: known.first)
    firsts = [known.first for known in earlier]
    gaps: dict[int, list[str]] = {}
    there = set()
    for key in keys:
        at = bisect_right(firsts, key) - 1
        if at >= 0 and key <= earlier[at].last:
            there.add(at)
        else:
            gaps.setdefault(at, []).append(key)
    yield from (earlier[at] for at in sorted(there))
    # A new slice may not reach over an earlier one, so each gap between these is divided alone.
    runs = [gap[i : i + most] for gap in gaps.values() for i in range(0, len(gap), most)]
    if not earlier and len(runs) == 1:
        yield Slice(folder, "", keys[0], keys[-1])
        return
    start = max((int(known.part or 0) + 1 for known in earlier), default=0)
    for number, run in enumerate(runs, start):
        yield Slice(folder, f"{number:05d}", run[0], run[-1])
