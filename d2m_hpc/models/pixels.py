"""An RGB image's pixels, in the two forms that preprocessors take."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Pixels = Image.Image | Tensor
"""An RGB image, as PIL for exact resizing or as uint8 [3, H, W]."""

AT_ONCE = 1 << 24
"""Pixels that PIL copies out at once, twice over on the way."""


def tensor_of(source: Pixels | NDArray[np.uint8]) -> Tensor:
    """uint8 [3, H, W] of an RGB image; a pixel's channels lie together, as they came."""
    if isinstance(source, Tensor):
        return source
    pixels = np.asarray(_Copied(source)) if isinstance(source, Image.Image) else source
    return torch.from_numpy(pixels).permute(2, 0, 1)


class _Copied:
    """A PIL image's pixels as PIL copies them out, for nobody else: torch need not copy them again.

    NumPy takes them for read-only, as they come in `bytes`, and torch warns of that.
    """

    def __init__(self, image: Image.Image) -> None:
        self._pixels = np.asarray(image) if image.width * image.height <= AT_ONCE else _copy(image)
        given = self._pixels.__array_interface__
        self.__array_interface__ = given | {"data": (given["data"][0], False)}


def _copy(image: Image.Image) -> NDArray[np.uint8]:
    """A large image's pixels, copied out some rows at a time."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, AT_ONCE // (16 * image.width))
    for top in range(0, image.height, rows):
        bottom = min(image.height, top + rows)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels


def size_of(image: Pixels) -> tuple[int, int]:
    """Width and height."""
    return image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])


def in_memory(pixels: Tensor) -> Tensor:
    """A copy of a part of an image, which holds no other, channels last."""
    return pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
