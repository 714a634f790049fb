"""Tars of real photographs, with captions as the web has them."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from random import Random

from PIL import Image
from skimage import data

from benchmarks.captions import captions
from benchmarks.tars import Sample, write

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
    texts = captions(samples, seed=number)
    write(
        path,
        (
            Sample(f"{number:05d}{i:04d}", text, *_crop((number * samples + i) % CROPS))
            for i, text in enumerate(texts)
        ),
    )


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
