"""Resize very long or thin pictures within bounded memory.

A picture of 1 x 3,000,000 pixels takes a few kilobytes as a PNG, and gigabytes on its way to a
square. What is here stands in for the ordinary way where that would take too much; its values are
within 2 of 255 of what that way would give, and mostly the same.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

LARGE = 1 << 24
"""Pixels that a step may take beyond those of the picture itself; more are taken otherwise."""
LONGEST = 1 << 18
"""A longer side is shortened first, by averaging: resizing keeps 32 bytes of weights a pixel."""
MARGIN = 4
"""Pixels around a crop that resizing looks at, where it enlarges or hardly shrinks."""


def shortened(image: Image.Image) -> Image.Image:
    """The picture with sides of at most `LONGEST` pixels, each the mean of several."""
    factors = (-(-image.width // LONGEST), -(-image.height // LONGEST))
    return image if factors == (1, 1) else image.reduce(factors)


def centre(
    picture: NDArray[np.uint8] | Image.Image,
    wide: int,
    high: int,
    size: tuple[int, int],
    how: Image.Resampling = Image.Resampling.BICUBIC,
    corner: tuple[int, int] | None = None,
) -> Image.Image:
    """The middle of a picture that would be `wide` x `high` when it is resized.

    Only what lies under the middle is resized.

    Args:
        size: width and height of the middle.
        corner: its first column and row, where halves are not to be rounded to even ones.
    """
    image = picture if isinstance(picture, Image.Image) else None
    width, height = image.size if image else (picture.shape[1], picture.shape[0])  # type: ignore[union-attr]
    left, top = corner or (round((wide - size[0]) / 2), round((high - size[1]) / 2))
    across, down = _span(width, wide, left, size[0]), _span(height, high, top, size[1])
    (x0, x1), (y0, y1) = _around(across, width), _around(down, height)
    part = image.crop((x0, y0, x1, y1)) if image else Image.fromarray(picture[y0:y1, x0:x1])  # type: ignore[index]
    box = (across[0] - x0, down[0] - y0, across[1] - x0, down[1] - y0)
    return part.resize(size, how, box=box)


def _span(given: int, made: int, start: int, side: int) -> tuple[float, float]:
    """Where `side` pixels of `made`, from `start` on, begin and end in the `given` ones."""
    return start * given / made, (start + side) * given / made


def _around(span: tuple[float, float], length: int) -> tuple[int, int]:
    margin = math.ceil(MARGIN * max(1.0, span[1] - span[0]))
    return max(0, math.floor(span[0]) - margin), min(length, math.ceil(span[1]) + margin)


def filled(
    strip: NDArray[np.uint8], before: int, square: int, axis: int, fill: int
) -> NDArray[np.uint8]:
    """Pad a strip to a square and resize it across (bicubic), without making the padding.

    Args:
        strip: uint8 [H, W, 3], resized along the other axis already.
        before: pixels of padding before it.
        square: pixels of strip and padding together.
        axis: of `strip`, the one to resize to the length of the other.
    """
    weights = torch.from_numpy(_weights(strip.shape[axis], before, square, strip.shape[1 - axis]))
    moved = torch.from_numpy(strip).permute(2, 1 - axis, axis).float() - fill
    pixels = (fill + moved @ weights).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).movedim(1, axis).contiguous().numpy()


def _weights(given: int, before: int, square: int, made: int) -> NDArray[np.float32]:
    """float32 [given, made]: what each pixel adds to each that is made of the square."""
    scale = square / made
    centres = (np.arange(made) + 0.5) * scale
    # At the square's edges part of the filter is cut off, and the rest weighs more.
    low, high = np.maximum(-2, -centres / scale), np.minimum(2, (square - centres) / scale)
    steps = (np.arange(512) + 0.5) / 512
    total = _cubic(low[:, None] + (high - low)[:, None] * steps).mean(axis=1) * (high - low)
    places = before + np.arange(given)[:, None] + 0.5
    weights: NDArray[np.float32] = (_cubic((places - centres) / scale) / (total * scale)).astype(
        np.float32
    )
    return weights


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """PIL's and torch's bicubic filter (Keys, 1981, with a = -0.5)."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
