"""Patterns of URLs to tars: a listing a folder, and no question a tar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from d2m_hpc.plan.naming import is_archive, location
from d2m_hpc.storage import stores
from d2m_hpc.storage.urls import GLOB, scheme

MISSING = -1
TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
"""What libraries call the time at which a file was put into a store."""
WORTH_LISTING = 8
"""Named tars in a folder for which it is listed: a folder may hold a million others."""
FEW = 100
"""Names of no tar for which a store is asked whether they are folders."""


def expand(
    urls: Sequence[str], times: dict[str, float] | None = None
) -> Iterator[tuple[str, int | None]]:
    """What URLs name, in their order, globs sorted.

    Args:
        times: takes when each tar that was listed was put into its store, in seconds since the
            epoch; 0 where the listing does not tell.

    Returns:
        pairs of URL and size in bytes; None where it is not known, `MISSING` where there is no such
        tar.

    Raises:
        D2MError: the library for such URLs is not installed.
        Exception: the store's own.
    """
    times = {} if times is None else times
    named = [url for url in urls if not GLOB.search(location(url))]
    folders = {url for url in named if _is_folder(url, asked=len(named) <= FEW)}
    sizes = _sizes([url for url in named if url not in folders], times)
    for url in urls:
        if url in sizes:
            yield url, sizes[url]
        elif url in folders:
            yield from _tars(url, times)
        else:
            yield from _glob(url, times)


def _is_folder(url: str, asked: bool) -> bool:
    """Whether a URL names a folder of tars; the store is asked where its name is no tar's."""
    if url.endswith(".tar") or scheme(url) in stores.WEB or is_archive(url):
        return False
    fs, path = stores.filesystem(url)
    return url.endswith("/") or (asked and bool(stores.retrying(lambda: fs.isdir(path))))


def _tars(folder: str, times: dict[str, float]) -> Iterator[tuple[str, int | None]]:
    """All in a folder that are named as tars are."""
    fs, path = stores.filesystem(folder)
    infos: list[dict[str, Any]] = stores.retrying(lambda: fs.ls(path, detail=True))
    for info in sorted(infos, key=lambda info: str(info["name"])):
        if info.get("type") != "directory" and is_archive(info["name"]):
            times[found := fs.unstrip_protocol(info["name"])] = _put(info)
            yield found, info.get("size")


def _glob(url: str, times: dict[str, float]) -> Iterator[tuple[str, int | None]]:
    fs, path = stores.filesystem(url)
    found = stores.retrying(lambda: fs.glob(path, detail=True))
    for match, info in sorted(found.items()):
        if info.get("type") != "directory":
            times[tar := fs.unstrip_protocol(match)] = _put(info)
            yield tar, info.get("size")


def _put(info: Mapping[str, Any]) -> float:
    """When a file was put into a store, by the name and form that its library gives that."""
    value = next((info[key] for key in TIMES if info.get(key)), 0.0)
    try:
        value = datetime.fromisoformat(value) if isinstance(value, str) else value
        return value.timestamp() if isinstance(value, datetime) else float(value)
    except (TypeError, ValueError):
        return 0.0


def _sizes(urls: Sequence[str], times: dict[str, float]) -> dict[str, int | None]:
    """Of tars that are named one by one; folders of which many are named are listed."""
    sizes: dict[str, int | None] = {}
    in_folder = Counter(_folder(url) for url in urls)
    listed: dict[str, Mapping[str, tuple[int | None, float]] | None] = {}
    for url in urls:
        folder = _folder(url)
        if folder not in listed:
            worth = in_folder[folder] >= WORTH_LISTING and scheme(url) not in stores.WEB
            listed[folder] = _listing(folder) if worth else None
            stores.filesystem(url)  # a store that no library is here for
        if (names := listed[folder]) is None:
            sizes[url] = None
        else:
            sizes[url], times[url] = names.get(url.rpartition("/")[2], (MISSING, 0.0))
    return sizes


def _folder(url: str) -> str:
    return url.rpartition("/")[0]


def _listing(folder: str) -> dict[str, tuple[int | None, float]] | None:
    """Sizes and times of a folder's files by name; None where it may not be listed."""
    fs, path = stores.filesystem(folder)
    try:
        infos: list[dict[str, Any]] = stores.retrying(lambda: fs.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    except PermissionError:
        return None
    return {i["name"].rpartition("/")[2]: (i.get("size"), _put(i)) for i in infos}
