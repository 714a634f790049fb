"""Long and thin pictures: resized as others are, or nearly so, and within a bound of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kit import photographs
from numpy.typing import NDArray
from PIL import Image

from d2m_hpc.models import extremes, preprocessors
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options, Picture

NAMES = ("clip-aug", "faces-aug", "dedup-aug", "stats-aug")
EXACT = pytest.mark.parametrize("exact", [True, False])
MOST = 2
"""Of 255, as the module promises."""


def _long(width: int, height: int) -> Picture:
    return Picture(photographs(1)[0].resize((width, height)))


def _faces(picture: Picture, exact: bool) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = PREPROCESSORS["faces-aug"].prepare(picture, Options(exact))[0]
    return pixels


def _apart(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    return int(abs(one.astype(int) - other).max())


@EXACT
@pytest.mark.parametrize("size", [(70, 1501), (900, 1000), (1, 333), (1009, 1013)])
def test_white_made_some_rows_at_a_time_changes_no_bit(
    size: tuple[int, int], exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = _long(*size)
    expected = _faces(picture, exact)
    monkeypatch.setattr(extremes, "LARGE", 4 * 7 * size[1])  # seven rows
    assert np.array_equal(_faces(picture, exact), expected)


@EXACT
@pytest.mark.parametrize(
    "size", [(90, 2500), (2500, 90), (1, 1700), (1700, 1), (1990, 2000), (2000, 1990)]
)
def test_a_square_too_large_to_make_is_what_it_would_be(
    size: tuple[int, int], exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = _long(*size)
    expected = _faces(picture, exact)
    monkeypatch.setattr(preprocessors, "SQUARE", 0)
    assert _apart(_faces(_long(*size), exact), expected) <= MOST


@EXACT
@pytest.mark.parametrize("size", [(9, 2900), (2900, 9), (4, 777), (777, 4), (1, 200), (3, 5000)])
def test_the_centre_alone_is_that_of_the_whole(
    size: tuple[int, int], exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = PREPROCESSORS["clip-aug"].prepare(_long(*size), Options(exact))
    monkeypatch.setattr(extremes, "LARGE", 0)
    monkeypatch.setattr(preprocessors, "_resize", None)  # a call would be an error
    assert _apart(PREPROCESSORS["clip-aug"].prepare(_long(*size), Options(exact)), expected) <= MOST


@EXACT
@pytest.mark.parametrize("name", ["dedup-aug", "stats-aug"])
def test_columns_before_rows_give_nearly_the_same(
    name: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = PREPROCESSORS[name].prepare(_long(40, 3000), Options(exact))
    monkeypatch.setattr(extremes, "LARGE", 0)
    assert _apart(PREPROCESSORS[name].prepare(_long(40, 3000), Options(exact)), expected) <= MOST


@EXACT
@pytest.mark.parametrize("name", ["dedup-aug", "stats-aug", "faces-aug"])
@pytest.mark.parametrize("size", [(3, 20_011), (20_011, 3)])
def test_a_side_is_shortened_before_it_is_resized(
    size: tuple[int, int], name: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = PREPROCESSORS[name].prepare
    expected = prepare(_long(*size), Options(exact))
    monkeypatch.setattr(extremes, "LONGEST", 7000)
    found = prepare(_long(*size), Options(exact))
    pairs = (
        [*zip(found, expected, strict=True)] if isinstance(found, tuple) else [(found, expected)]
    )
    assert abs(pairs[0][0].astype(float) - pairs[0][1]).mean() < 1
    for told, wanted in pairs[1:]:
        assert np.allclose(told, wanted, atol=1e-3)


@EXACT
@pytest.mark.parametrize("size", [(800, 15_000), (15_000, 800), (1, 400_000), (400_000, 1)])
def test_no_shape_is_refused_by_any_model(size: tuple[int, int], exact: bool) -> None:
    """A gradient along the long side is still one, and what surrounds it is white."""
    width, height = size
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    rows = ramp[:, None] if height > width else ramp[None]
    source = np.broadcast_to(rows[..., None], (height, width, 3)).copy()
    picture = Picture(Image.fromarray(source) if exact else source)
    for name in NAMES:
        made = PREPROCESSORS[name].prepare(picture, Options(exact, max_pixels=width * height))
        pixels = made[0] if isinstance(made, tuple) else made
        along = pixels[..., 0].mean(axis=1 if height > width else 0)
        if name == "clip-aug":
            assert abs(along - 127.5).max() < 20
        elif name == "faces-aug":
            assert (pixels[0, :, 0] == 255).sum() > 100 or (pixels[:, 0, 0] == 255).sum() > 100
        else:
            assert (np.diff(along) >= -1).all()
            assert along[0] < 5
            assert along[-1] > 250


PROGRAM = """
import sys
import numpy as np
from PIL import Image
from kit import peak
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options, Picture
def prepare(width, height, exact):
    source = np.zeros((height, width, 3), np.uint8)
    picture = Picture(Image.fromarray(source) if exact else source)
    for name in ("clip-aug", "faces-aug", "dedup-aug", "stats-aug"):
        PREPROCESSORS[name].prepare(picture, Options(exact))
exact = sys.argv[1] == "exact"
prepare(400, 300, exact)
before = peak()
for size in ((1, 5_000_000), (5_000_000, 1), (700, 13_300), (13_300, 700), (700, 14_000)):
    prepare(*size, exact)
print((peak() - before) >> 20)
"""


@pytest.mark.parametrize("how", ["exact", "fast"])
def test_no_shape_takes_more_than_some_hundred_megabytes(how: str) -> None:
    """Of at most 10 million pixels; the ordinary way takes up to 7 GB for these."""
    command = [sys.executable, "-c", PROGRAM, how]
    tests = Path(__file__).parents[1]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tests)
    assert int(ended.stdout) < 500


def test_an_array_and_an_image_have_the_same_centre() -> None:
    image = photographs(1)[0].resize((5, 4000))
    sides = 224, 179_200
    one, other = (extremes.centre(p, *sides, (224, 224)) for p in (image, np.asarray(image)))
    assert np.array_equal(one, other)


def test_a_wide_pictures_crop_holds_no_more_than_itself() -> None:
    """Samples wait for their batch; a strip of 900 x 9 would take 224 times as much till then."""
    crop = PREPROCESSORS["clip-aug"].prepare(_long(900, 9), Options())
    assert crop.base is None or crop.base.nbytes == crop.nbytes
