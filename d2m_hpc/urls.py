"""The three kinds of places that a config may name: local paths, fsspec URLs, `pipe:` commands."""

from __future__ import annotations

import re

PIPE = "pipe:"
GLOB = re.compile(r"[*?\[]")
"""What makes a pattern of a path."""


def is_pipe(url: str) -> bool:
    return url.startswith(PIPE)


def is_remote(url: str) -> bool:
    """A URL that fsspec opens."""
    return "://" in url and not is_pipe(url)


def is_local(url: str) -> bool:
    return not is_pipe(url) and not is_remote(url)


def scheme(url: str) -> str:
    """Of the store that a URL names, without what it is wrapped in (`simplecache::s3://...`)."""
    return url.partition("://")[0].rpartition("::")[2]
