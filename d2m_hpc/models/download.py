"""Download a file, going on where an earlier try broke off (RFC 9110, sections 13 and 14).

`storage.stores` reads shards by fsspec instead: that knows stores, but neither a file's version nor
a part of it that outlives the process, and its HTTP is an extra that this package does without.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, InvalidURL
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener, getproxies, proxy_bypass

TRIES = 4
"""Without getting further than before; a transfer that does goes on for as long as it takes."""
PAUSE_SECONDS = 1.0
"""Before the second try; twice as long before each later one."""
LONGEST_PAUSE = 60.0
"""For a server that says when to come back."""
TIMEOUT_SECONDS = 60.0
"""Without a byte."""
BLOCK = 1 << 20
PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses that may be others in a moment."""

NO_HEADERS: Mapping[str, str] = {}

OnBytes = Callable[[int, int | None], None]
"""Told the bytes so far and in all; None where the server does not say."""


class DownloadError(Exception):
    """The server does not give the file.

    Attributes:
        status: of its answer; 0 where there is none.
        retry_after: the header of that name.
    """

    def __init__(self, why: str, status: int = 0, retry_after: str | None = None) -> None:
        super().__init__(why)
        self.status, self.retry_after = status, retry_after


class Broken(DownloadError):
    """It did not this time; what has arrived is kept."""


@dataclass(frozen=True)
class PartialFile:
    """The beginning of a file, and which version of it that is; outlives the process."""

    path: Path

    @property
    def _origin(self) -> Path:
        """JSON: the URL and the server's name of the version."""
        return self.path.with_name(f"{self.path.name}.from")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def begin(self, url: str, version: str) -> None:
        """Drop what is there. In this order: an empty file is no part of any version."""
        self.path.write_bytes(b"")
        self._origin.write_text(json.dumps([url, version]))

    def version(self, url: str) -> str:
        """Of which this is the beginning; empty where there is none that could be gone on with."""
        try:
            known, version = json.loads(self._origin.read_text())
        except (OSError, ValueError, TypeError):
            return ""
        return str(version) if known == url and self.size else ""

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._origin.unlink(missing_ok=True)


def download(
    url: str, part: PartialFile, on_bytes: OnBytes, headers: Mapping[str, str] = NO_HEADERS
) -> str:
    """Complete a part; it is as durable as the disk when this returns.

    Args:
        headers: for this server alone; another one that it redirects to gets none of them.

    Returns:
        sha256 of the whole file, in hex.

    Raises:
        DownloadError: why the server does not give the file, or there is no room for it.
        OSError: the part cannot be written.
    """
    furthest, tries = part.size, 0
    while True:
        try:
            return _attempt(url, part, on_bytes, headers)
        except Broken as error:
            tries = 1 if part.size > furthest else tries + 1
            furthest = max(furthest, part.size)
            if tries == TRIES:
                raise
            asked = error.retry_after
        pause(tries, asked)


class _Redirects(HTTPRedirectHandler):
    """Say who asks again where a server redirects to itself, as a hub does to a new name."""

    def redirect_request(self, req: Request, *given: Any) -> Request | None:
        found = super().redirect_request(req, *given)
        if found and (found.type, found.host) == (req.type, req.host):
            told = req.unredirected_hdrs.get("Authorization")
            found.unredirected_hdrs |= {"Authorization": told} if told else {}
        return found


def pause(tries: int, retry_after: str | None = None) -> None:
    """Wait before another try: as long as the server says, within limits, or longer each time."""
    seconds = PAUSE_SECONDS * 2 ** (tries - 1) * random.uniform(0.5, 1.5)
    if retry_after and retry_after.isdecimal():
        seconds = max(seconds, min(float(retry_after), LONGEST_PAUSE))
    time.sleep(seconds)


def _attempt(url: str, part: PartialFile, on_bytes: OnBytes, headers: Mapping[str, str]) -> str:
    version = part.version(url)
    wish = {"Range": f"bytes={part.size}-", "If-Range": version} if version else {}
    with _open(url, {**headers, **wish}, part) as response:
        first = _read(response)
        if response.status == 206:
            _check_continues(response, part, version)
        elif first.lstrip()[:1] == b"<" and _is_page(response):
            raise DownloadError("the server sent a web page instead of the file")
        else:
            part.begin(url, _version(response))
        return _append(part, chain([first], _blocks(response)), _total(response), on_bytes)


def _is_page(response: HTTPResponse) -> bool:
    """Whether it may be a gateway's login or an error; a vocabulary begins with `<`, too."""
    return "ml" in response.headers.get("Content-Type", "html")


def _open(url: str, headers: Mapping[str, str], part: PartialFile) -> HTTPResponse:
    try:
        request = Request(url)
        for name, value in headers.items():
            redirected = name in ("Range", "If-Range")
            (request.add_header if redirected else request.add_unredirected_header)(name, value)
        response: HTTPResponse = build_opener(_Redirects).open(request, timeout=TIMEOUT_SECONDS)
        return response
    except HTTPError as error:
        error.close()
        last = error.url.partition("?")[0]  # behind which a server may put a secret
        if error.code == 416 and "Range" in headers:  # it is shorter than the part
            part.remove()
            return _open(url, {n: v for n, v in headers.items() if "Range" not in n}, part)
        kind = Broken if error.code in PASSING else DownloadError
        why = f"the server answers {error.code} {error.reason}"
        why += f" for {last}, to which it redirects" if last != url else ""
        raise kind(why, error.code, error.headers.get("Retry-After")) from None
    except URLError as error:
        # Where nobody listens or the name is unknown, waiting helps little: often there is no way.
        kind = Broken if isinstance(error.reason, TimeoutError) else DownloadError
        raise kind(f"the server cannot be reached{by_proxy(url)}: {error.reason}") from None
    except (InvalidURL, ValueError) as error:
        raise DownloadError(f"this is no URL: {error}") from None
    except (OSError, HTTPException) as error:
        raise Broken(f"the server gives no proper answer: {error}") from None


def by_proxy(url: str) -> str:
    """What to say of the proxy by which a server is asked; no password is in it."""
    asked = urlsplit(url)
    proxy = "" if proxy_bypass(asked.hostname or "") else getproxies().get(asked.scheme, "")
    return f" by the proxy {proxy.rpartition('@')[2]}" if proxy else ""


def _check_continues(response: HTTPResponse, part: PartialFile, version: str) -> None:
    """
    Raises:
        Broken: what was sent does not follow the part, which is removed.
    """
    sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    same = version and _version(response) in (version, "")
    if not same or sent is None or int(sent[1]) != part.size:
        part.remove()
        raise Broken("the server sent another part of the file than it was asked for")


def _version(response: HTTPResponse) -> str:
    """What `If-Range` takes: a strong entity tag, or the date; empty where there is neither."""
    tag = response.headers.get("ETag", "W/")
    return str(response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag)


def _total(response: HTTPResponse) -> int | None:
    """The whole file's size; None where it is not said."""
    if response.status == 206:
        total = response.headers["Content-Range"].rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return int(total) if total.isdecimal() else None


def _blocks(response: HTTPResponse) -> Iterator[bytes]:
    while block := _read(response):
        yield block


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(BLOCK)
    except (OSError, HTTPException) as error:
        raise Broken(f"the connection broke off: {str(error) or type(error).__name__}") from None


def _append(
    part: PartialFile, blocks: Iterator[bytes], total: int | None, on_bytes: OnBytes
) -> str:
    done = part.size
    _check_room(part.path.parent, (total or done) - done)
    with open(part.path, "a+b") as file:
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        on_bytes(done, total)
        for block in blocks:
            file.write(block)
            digest.update(block)
            done += len(block)
            on_bytes(done, total)
        file.flush()
        os.fsync(file.fileno())
    if not done or done != (total or done):
        raise Broken(f"the connection broke off after {done} of {total or '?'} bytes")
    return str(digest.hexdigest())


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{folder} has {free / 1e9:.1f} GB free of {needed / 1e9:.1f} GB that are needed"
        )
