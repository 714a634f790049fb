"""Read and write files behind URLs by fsspec; try again after passing errors.

A store answers with an error now and then, or closes a connection in the middle of an answer. The
wait before each try doubles and is drawn at random, so that a thousand tasks do not come back at
once (exponential backoff with jitter).
"""

from __future__ import annotations

import errno
import importlib
import inspect
import logging
import random
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

from d2m_hpc.errors import D2MError
from d2m_hpc.storage.urls import is_chained, scheme

T = TypeVar("T")
log = logging.getLogger(__name__)

TRIES = 5
FIRST_WAIT = 1.0
"""The longest wait before the second try, in seconds; libraries' own tries come within each of
ours."""
BLOCK = 16 << 20
AT_ONCE = 4
"""Blocks of a file that are requested at once: one stream of a store is slower than a GPU."""
STEP = 1 << 20
SILENCE = 60.0
"""Seconds that an HTTP server may be silent."""

WEB = ("http", "https")
EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
"""Extras of this package that install a scheme's library."""
PERMANENT = (
    D2MError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)


def filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, and the URL's path there.

    fsspec keeps one filesystem for a process. Ask again after a fork, which cannot use the
    parent's.

    Raises:
        D2MError: no library for such URLs is installed.
    """
    import fsspec  # with asyncio behind it, which what lies on a disk does without

    name = scheme(url)
    try:
        # A cached listing would hide the files of other tasks.
        options: dict[str, Any] = {"use_listings_cache": False}
        if name in WEB:
            options["timeout"] = _patient()
        if is_chained(url):
            _require_plain_names(url)
            return fsspec.core.url_to_fs(url, **options)  # type: ignore[no-any-return]
        protocol = name if "://" in url else "file"
        kind = fsspec.get_filesystem_class(protocol)
        fs = fsspec.filesystem(protocol, **kind._get_kwargs_from_urls(url), **options)
        return fs, str(kind._strip_protocol(url))
    except ImportError as error:
        extra = EXTRAS.get(name)
        advice = f"pip install 'd2m_hpc[{extra}]'" if extra else str(error)
        raise D2MError(f"{url}: the library for {name}:// is not installed; {advice}") from None


def _require_plain_names(url: str) -> None:
    """Raise `D2MError` where `::` is in a file's name: in a chain, fsspec would split the name."""
    if not all("://" in part or part.isalnum() for part in url.split("::")):
        raise D2MError(
            f"{url}: a chain of stores takes no name with `::` in it; name the file by the URL of "
            "its own store"
        )


def _patient() -> Any:
    """A timeout without aiohttp's own limit of five minutes for a whole file."""
    timeout = importlib.import_module("aiohttp").ClientTimeout
    return timeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)


def knows_create(fs: Any) -> bool:
    """Whether a filesystem takes `mode="create"`: write a file only if there is none."""
    writes = getattr(fs, "_pipe_file", fs.pipe_file)
    return "mode" in inspect.signature(writes).parameters


def is_transient(error: Exception) -> bool:
    """Whether another try may succeed."""
    status = getattr(error, "status", None)  # of an answer over HTTP
    if isinstance(status, int):
        return status >= 500 or status in (408, 425, 429)
    wrong = getattr(error, "errno", None) in (errno.EINVAL, errno.EPERM, errno.ENOSYS)
    return not (wrong or isinstance(error, PERMANENT))


def retrying(call: Callable[[], T]) -> T:
    """Call until success, `TRIES` times at most.

    Raises:
        OSError: every try failed.
        Exception: the store's own, where another try is useless.
    """
    failures = 0
    while True:
        try:
            return call()
        except Exception as error:
            failures += 1
            _wait(failures, error, "")


def _wait(failures: int, error: Exception, where: str) -> None:
    """Wait before the next try; raise `OSError` after the last one."""
    if not is_transient(error):
        raise error
    what = f"{where}{type(error).__name__}: {error}"
    if failures == TRIES:
        raise OSError(f"failed {TRIES} times, at last {what}") from error
    log.warning("%s; trying again", what)
    time.sleep(FIRST_WAIT * 2 ** (failures - 1) * random.uniform(0.5, 1.0))


def blocks(url: str, size: int | None = None) -> Generator[bytes, None, None]:
    """Yield a file's bytes from first to last; a broken connection continues where it stopped.

    Args:
        size: in bytes, where known; the file must have that size.

    Raises:
        OSError: `TRIES` in a row brought nothing.
        Exception: the store's own, where another try is useless.
    """
    fs, path = filesystem(url)
    read = _stream if scheme(url) in WEB else _ranges
    position = failures = 0
    while True:
        try:
            for block in read(fs, path, position, size):
                position, failures = position + len(block), 0
                yield block
            return
        except Exception as error:
            failures += 1
            if position and not is_transient(error):
                raise OSError(f"after {position} of {size} bytes: {error}") from error
            _wait(failures, error, f"at byte {position}: ")


def _ranges(fs: Any, path: str, position: int, size: int | None) -> Iterator[bytes]:
    """Yield the bytes from a position on, requesting several blocks at once."""
    size = fs.info(path)["size"] if size is None else size
    while position < size:
        starts = range(position, min(size, position + AT_ONCE * BLOCK), BLOCK)
        ends = [min(size, start + BLOCK) for start in starts]
        parts = fs.cat_ranges([path] * len(ends), list(starts), ends, on_error="return")
        for start, end, part in zip(starts, ends, parts, strict=True):
            if isinstance(part, Exception):
                raise part
            yield part
            if len(part) != end - start:
                raise ConnectionError(f"{len(part)} bytes came where {end - start} should")
            position = end


def _stream(fs: Any, path: str, position: int, size: int | None) -> Iterator[bytes]:
    """Yield the bytes from a position on, over one HTTP answer: some servers ignore ranges without
    a word."""
    headers = {"Accept-Encoding": "identity"}
    if position:
        headers["Range"] = f"bytes={position}-"
    # Given any size, fsspec sends no HEAD, which URLs signed for a GET refuse.
    with fs.open(path, "rb", block_size=0, size=1, headers=headers) as file:
        known = 0 if file.r.status == 206 else position
        while block := file.read(STEP):
            if len(block) > known:
                position += len(block) - known
                yield block[known:]
            known = max(0, known - len(block))
    if size not in (None, position):
        raise ConnectionError(f"the file ended after {position} of {size} bytes")


def peek(url: str, size: int = 512) -> bytes:
    """The first bytes of a file, about `size`; raises where the file cannot be read."""
    if scheme(url) in WEB:
        return next(_stream(*filesystem(url), 0, None), b"")
    fs, path = filesystem(url)
    head: bytes = fs.cat_file(path, start=0, end=size)
    return head
