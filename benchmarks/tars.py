"""Tars as img2dataset writes them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Sample(NamedTuple):
    """An image-text pair; `width` and `height` are the JPEG's, in pixels."""

    key: str
    caption: str
    jpeg: bytes
    width: int
    height: int


def write(path: Path, samples: Iterable[Sample]) -> None:
    """Under another name first: a tar that was begun is not taken for a whole one."""
    begun = path.with_suffix(".part")
    with tarfile.open(begun, "w") as tar:
        for sample in samples:
            for extension, content in _members(sample):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    begun.rename(path)


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    fields = {
        "uid": hashlib.md5(sample.key.encode()).hexdigest(),
        "url": f"https://example.org/photos/{sample.key}.jpg",
        "caption": sample.caption,
        "key": sample.key,
        "status": "success",
        "original_width": sample.width,
        "original_height": sample.height,
        "exif": "{}",
        "sha256": hashlib.sha256(sample.jpeg).hexdigest(),
    }
    yield "jpg", sample.jpeg
    yield "json", json.dumps(fields).encode()
    yield "txt", sample.caption.encode()
