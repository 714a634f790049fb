"""An RGB image's pixels, in the two forms that preprocessors take.

Each call of torch, even one that makes a view, lets go of the interpreter's lock and waits for it
again; beside many threads that decode, the waits take longer than the work. NumPy's views keep it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = Image.Image | NDArray[np.uint8]
"""An RGB image, as PIL for exact resizing or as uint8 [H, W, 3]."""

AT_ONCE = 1 << 24
"""Pixels that PIL copies out at once, twice over on the way."""


def array_of(source: Pixels) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] of an RGB image."""
    return np.asarray(_Copied(source)) if isinstance(source, Image.Image) else source


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
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
