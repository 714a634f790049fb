"""URLs to stems, the names of shards and of their outputs."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from d2m_hpc.run.slices import Slice
from d2m_hpc.storage.urls import PIPE, has_secret, is_folder, is_local, is_pipe, is_remote, scheme

_ARCHIVE = re.compile(r"\.(tar(\.(gz|xz|bz2|zst))?|tgz|txz|tbz2?|tzst)$", re.IGNORECASE)
_SHARD = re.compile(rf"({_ARCHIVE.pattern}|\.parquet$)", re.IGNORECASE)
_LONGEST = 200
"""The most bytes of a stem: a file name has 255, and temporary names are longer than stems."""


def is_archive(name: str) -> bool:
    """Whether a path or URL has the name of a tar, compressed or not, or is a command."""
    return is_pipe(name) or _ARCHIVE.search(location(name)) is not None


def is_shard(name: str, key: str) -> bool:
    """Whether a path or URL has the name of a shard that a config's key may name."""
    return is_archive(name) or (key == "inputs" and location(name).lower().endswith(".parquet"))


def location(url: str) -> str:
    """The part of a URL that names the tar: for a command, its last word that ends in .tar."""
    if is_pipe(url):
        tars = [w for w in _words(url.removeprefix(PIPE)) if _ARCHIVE.search(w)]
        if not tars:
            return _short_hash(url)
        protocol, mark, rest = tars[-1].rpartition("://")
        return protocol + mark + _without_user(rest) if mark else rest
    if is_folder(url):
        there = Slice.of(url)
        return f"{there.folder}_{there.part}" if there.part else there.folder
    if not is_remote(url):
        return url
    rest = url.partition("://")[2]
    if ("?" in rest or "#" in rest) and scheme(url) in ("http", "https"):
        rest = re.split("[?#]", rest, maxsplit=1)[0]  # elsewhere these two may be part of a name
    return _without_user(rest)


def _without_user(path: str) -> str:
    """Remove the user and password before a host."""
    host, slash, rest = path.partition("/")
    return host.rpartition("@")[2] + slash + rest


def _words(command: str) -> list[str]:
    """Split a shell line into words without operators; `--option=` is cut off its value."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
    except ValueError:
        words = command.split()
    return [re.sub("^-[^=]*=", "", word) for word in words]


def _short_hash(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def name_shards(urls: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """Give every URL a stem of its own: the tar's name, after its folders' if names collide.

    Args:
        urls: distinct URLs.
        taken: stems of other shards.

    Returns:
        A stem for each URL, in their order.
    """
    stems = [""] * len(urls)
    used = set(taken)
    left = [(i, *_stem_parts(url)) for i, url in enumerate(urls)]
    depth = 0
    while left:
        tried = [_front(folders, depth) + name for _, folders, name in left]
        free = {stem for stem, times in Counter(tried).items() if times == 1} - used
        later = []
        for parts, stem in zip(left, tried, strict=True):
            i, folders, name = parts
            if len(stem.encode()) > _LONGEST or (stem not in free and depth >= len(folders)):
                stems[i] = _cut(name) + "_" + _short_hash(urls[i])
                used.add(stems[i])
            elif stem in free:
                stems[i] = stem
            else:
                later.append(parts)
        used |= free
        left, depth = later, depth + 1
    return stems


@lru_cache(maxsize=1000)
def _front(folders: tuple[str, ...], depth: int) -> str:
    """The prefix of the stems of a folder's tars, made of so many of its folders' names."""
    return "".join(f"{folder}_" for folder in folders[max(0, len(folders) - depth) :])


def _cut(name: str) -> str:
    return name.encode()[:_LONGEST].decode(errors="ignore")


def own_name(url: str) -> str:
    """A tar's stem without its folders."""
    return _stem_parts(url)[1]


def _stem_parts(url: str) -> tuple[tuple[str, ...], str]:
    path = location(url)
    if not is_local(url) and has_secret(path):  # stems are shown, and name files
        return (), _short_hash(url)
    folder, _, name = path.rstrip("/").rpartition("/")
    return _folders(folder), _SHARD.sub("", name) or name or "shard"


@lru_cache(maxsize=1000)
def _folders(path: str) -> tuple[str, ...]:
    """Split a folder's path; cached, as a million tuples of one folder would fill the memory."""
    return tuple(part for part in path.split("/") if part)
