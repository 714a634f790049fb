"""Tars as img2dataset writes them, of real photographs."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from functools import cache
from pathlib import Path
from random import Random

from PIL import Image
from skimage import data

from benchmarks.captions import captions

PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "page", "retina", "rocket", "text"),
)
"""Those that scikit-image ships: public domain and CC0."""
CROPS = 400
"""Different pictures; a tar of more samples repeats them."""
LARGEST = 512
"""Pixels of the longer side, as img2dataset shrinks DataComp's."""


def tars(folder: Path, count: int, samples: int) -> list[Path]:
    """`count` tars of `samples` each; they are made at the first call and kept.

    Every sample is a JPEG of quality 95 (450x350 pixels and 65 kB in the mean), a caption and a
    JSON.
    """
    place = folder / f"{count}x{samples}"
    place.mkdir(parents=True, exist_ok=True)
    paths = [place / f"{i:05d}.tar" for i in range(count)]
    for i, path in enumerate(paths):
        if not path.exists():
            _write(path, i, samples)
    return paths


def _write(path: Path, number: int, samples: int) -> None:
    """Under another name first: a tar that was begun is not taken for a whole one."""
    begun = path.with_suffix(".part")
    texts = captions(samples, seed=number)
    with tarfile.open(begun, "w") as tar:
        for i, text in enumerate(texts):
            for name, content in _sample(
                f"{number:05d}{i:04d}", text, number * samples + i
            ).items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    begun.rename(path)


def _sample(key: str, caption: str, number: int) -> dict[str, bytes]:
    jpeg, width, height = _crop(number % CROPS)
    fields = {
        "uid": hashlib.md5(key.encode()).hexdigest(),
        "url": f"https://example.org/photos/{key}.jpg",
        "caption": caption,
        "key": key,
        "status": "success",
        "original_width": width,
        "original_height": height,
        "exif": "{}",
        "sha256": hashlib.sha256(jpeg).hexdigest(),
    }
    return {
        f"{key}.jpg": jpeg,
        f"{key}.json": json.dumps(fields).encode(),
        f"{key}.txt": caption.encode(),
    }


@cache
def _crop(number: int) -> tuple[bytes, int, int]:
    """A part of a photograph as JPEG, its width and its height; no two are alike."""
    random = Random(number)
    picture = _photograph(PHOTOGRAPHS[number % len(PHOTOGRAPHS)])
    width = round(picture.width * random.uniform(0.8, 1))
    height = min(picture.height, round(width * random.choice((2 / 3, 3 / 4, 3 / 4, 1, 4 / 3))))
    left = random.randint(0, picture.width - width)
    top = random.randint(0, picture.height - height)
    part = picture.crop((left, top, left + width, top + height))
    part.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    part.save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), part.width, part.height


@cache
def _photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)()).convert("RGB")
