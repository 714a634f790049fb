"""Patterns of URLs to tars: a listing a folder, and no question a tar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from d2m_hpc import stores
from d2m_hpc.launch.naming import is_archive, location
from d2m_hpc.urls import GLOB, scheme

MISSING = -1
WORTH_LISTING = 8
"""Named tars in a folder for which it is listed: a folder may hold a million others."""
FEW = 100
"""Names of no tar for which a store is asked whether they are folders."""


def expand(urls: Sequence[str]) -> Iterator[tuple[str, int | None]]:
    """What URLs name, in their order, globs sorted.

    Returns:
        pairs of URL and size in bytes; None where it is not known, `MISSING` where there is no such
        tar.

    Raises:
        D2MError: the library for such URLs is not installed.
        Exception: the store's own.
    """
    named = [url for url in urls if not GLOB.search(location(url))]
    folders = {url for url in named if _is_folder(url, asked=len(named) <= FEW)}
    sizes = _sizes([url for url in named if url not in folders])
    for url in urls:
        if url in sizes:
            yield url, sizes[url]
        elif url in folders:
            yield from _tars(url)
        else:
            yield from _glob(url)


def _is_folder(url: str, asked: bool) -> bool:
    """Whether a URL names a folder of tars; the store is asked where its name is no tar's."""
    if scheme(url) in stores.WEB or is_archive(url):
        return False
    fs, path = stores.filesystem(url)
    return url.endswith("/") or (asked and bool(stores.retrying(lambda: fs.isdir(path))))


def _tars(folder: str) -> Iterator[tuple[str, int | None]]:
    """All in a folder that are named as tars are."""
    fs, path = stores.filesystem(folder)
    infos: list[dict[str, Any]] = stores.retrying(lambda: fs.ls(path, detail=True))
    for info in sorted(infos, key=lambda info: str(info["name"])):
        if info.get("type") != "directory" and is_archive(info["name"]):
            yield fs.unstrip_protocol(info["name"]), info.get("size")


def _glob(url: str) -> Iterator[tuple[str, int | None]]:
    fs, path = stores.filesystem(url)
    found = stores.retrying(lambda: fs.glob(path, detail=True))
    for match, info in sorted(found.items()):
        if info.get("type") != "directory":
            yield fs.unstrip_protocol(match), info.get("size")


def _sizes(urls: Sequence[str]) -> dict[str, int | None]:
    """Of tars that are named one by one; folders of which many are named are listed."""
    sizes: dict[str, int | None] = {}
    in_folder = Counter(_folder(url) for url in urls)
    listed: dict[str, Mapping[str, int | None] | None] = {}
    for url in urls:
        folder = _folder(url)
        if folder not in listed:
            worth = in_folder[folder] >= WORTH_LISTING and scheme(url) not in stores.WEB
            listed[folder] = _listing(folder) if worth else None
            stores.filesystem(url)  # a store that no library is here for
        names = listed[folder]
        sizes[url] = None if names is None else names.get(url.rpartition("/")[2], MISSING)
    return sizes


def _folder(url: str) -> str:
    return url.rpartition("/")[0]


def _listing(folder: str) -> dict[str, int | None] | None:
    """Sizes of a folder's files by name; None where one may read them but not list them."""
    fs, path = stores.filesystem(folder)
    try:
        infos: list[dict[str, Any]] = stores.retrying(lambda: fs.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    except PermissionError:
        return None
    return {info["name"].rpartition("/")[2]: info.get("size") for info in infos}
