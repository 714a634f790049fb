"""Patterns of URLs to tars, by one listing of each folder and no request for each tar."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from d2m_hpc.errors import D2MError
from d2m_hpc.plan.naming import is_archive, location
from d2m_hpc.storage import stores
from d2m_hpc.storage.urls import GLOB, scheme

MISSING = -1
"""The size of a tar that does not exist."""
TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
"""The names that libraries give to the time at which a file was put into a store."""
WORTH_LISTING = 8
"""The fewest named tars of a folder that are worth its listing, as it may hold a million others."""
FEW = 100
"""The most URLs for which the store is asked whether they are folders."""


def expand(
    urls: Sequence[str], times: dict[str, float] | None = None, key: str = "input_tars"
) -> Iterator[tuple[str, int | None]]:
    """List the tars that URLs name, in their order; those of a glob sorted.

    Args:
        times: receives when each listed tar was put into its store, in seconds since the epoch; 0
            if the listing does not show the time.
        key: the config's key with the URLs.

    Returns:
        Pairs of URL and size in bytes; None for an unknown size, `MISSING` for a missing tar.

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
        else:
            if url in folders and key == "inputs":
                raise D2MError(
                    f"{url} is a folder in a store; name its files, such as its '*.parquet'"
                )
            yield from _listed(url, url in folders, times)


def _is_folder(url: str, asked: bool) -> bool:
    """Whether a URL names a folder of tars; asks the store if its name is not a tar's."""
    if url.endswith(".tar") or scheme(url) in stores.WEB or is_archive(url):
        return False
    fs, path = stores.filesystem(url)
    return url.endswith("/") or (asked and bool(stores.retrying(lambda: fs.isdir(path))))


def _listed(url: str, is_folder: bool, times: dict[str, float]) -> Iterator[tuple[str, int | None]]:
    """The files that a glob names, or the files in a folder that are named as tars; sorted.

    A glob with `[` or `?` that is the name of a file or a folder stands for that one.
    """
    fs, path = stores.filesystem(url)
    named = {} if is_folder or not re.search(r"[\[?]", path) else _info(fs, path)
    if is_folder or named.get("type") == "directory":
        infos: list[dict[str, Any]] = stores.retrying(lambda: fs.ls(path, detail=True))
        found = {info["name"]: info for info in infos if is_archive(info["name"])}
    else:
        found = {path: named} if named else stores.retrying(lambda: fs.glob(path, detail=True))
    for name, info in sorted(found.items()):
        if info.get("type") != "directory":
            times[tar := fs.unstrip_protocol(name)] = _put_time(info)
            yield tar, info.get("size")


def _info(fs: Any, path: str) -> dict[str, Any]:
    """What a store tells of a file or folder; empty if there is none, or the store refuses."""
    try:
        info: dict[str, Any] = stores.retrying(lambda: fs.info(path))
    except Exception:  # each store raises errors of its own; the listing that follows shows them
        return {}
    return info if info["name"] == path else {}  # s3fs ignores `?versionId=`


def _put_time(info: Mapping[str, Any]) -> float:
    """The time at which a file was put into a store, in any library's form; 0 if not known."""
    value = next((info[key] for key in TIMES if info.get(key)), 0.0)
    try:
        value = datetime.fromisoformat(value) if isinstance(value, str) else value
        return value.timestamp() if isinstance(value, datetime) else float(value)
    except (TypeError, ValueError):
        return 0.0


def _sizes(urls: Sequence[str], times: dict[str, float]) -> dict[str, int | None]:
    """Find the sizes of tars that are named one by one; folders with many of them are listed."""
    sizes: dict[str, int | None] = {}
    in_folder = Counter(_folder(url) for url in urls)
    listed: dict[str, Mapping[str, tuple[int | None, float]] | None] = {}
    for url in urls:
        folder = _folder(url)
        if folder not in listed:
            worth = in_folder[folder] >= WORTH_LISTING and scheme(url) not in stores.WEB
            listed[folder] = _listing(folder) if worth else None
            stores.filesystem(url)  # raises if the store's library is not installed
        if (names := listed[folder]) is None:
            sizes[url] = None
        else:
            sizes[url], times[url] = names.get(url.rpartition("/")[2], (MISSING, 0.0))
    return sizes


def _folder(url: str) -> str:
    return url.rpartition("/")[0]


def _listing(folder: str) -> dict[str, tuple[int | None, float]] | None:
    """The sizes and times of a folder's files by name; None if the folder may not be listed."""
    fs, path = stores.filesystem(folder)
    try:
        infos: list[dict[str, Any]] = stores.retrying(lambda: fs.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    except PermissionError:
        return None
    return {i["name"].rpartition("/")[2]: (i.get("size"), _put_time(i)) for i in infos}
