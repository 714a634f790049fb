"""Raw inputs to model inputs: a CPU half for the decode threads, a device half for whole batches.

Pixels travel as uint8; the device half normalises them. `fast` resizes with torch's uint8 kernels,
`exact` with PIL, both bit for bit as torchvision's transforms do, whose import takes as long as
torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from d2m_hpc.models import extremes
from d2m_hpc.models.pixels import Pixels, in_memory, size_of, tensor_of
from d2m_hpc.models.tokens import clip_tokens

CLIP_SIZE = 224
FACES_SIZE = 224
DEDUP_SIZE = 512
STATS_SIZE = 256
SQUARE = 178_956_970
"""Pixels of the largest square that the faces' white is made for, some rows at a time."""


class Rejected(Exception):
    """This sample cannot be used; the message is the reason that goes on record."""


class Picture:
    """A decoded RGB image, as PIL or as a uint8 tensor, whichever is asked for."""

    def __init__(self, source: Image.Image | NDArray[np.uint8]) -> None:
        self._source = source
        self._resized: dict[tuple[int, int, str, bool], Pixels] = {}

    @cached_property
    def pil(self) -> Image.Image:
        source = self._source
        return source if isinstance(source, Image.Image) else Image.fromarray(source)

    @cached_property
    def tensor(self) -> Tensor:
        """uint8 [3, H, W], channels last in memory, where torch's kernels are fastest."""
        return tensor_of(self._source)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        if isinstance(self._source, Image.Image):
            return self._source.size
        return self._source.shape[1], self._source.shape[0]

    @property
    def source(self) -> Image.Image | NDArray[np.uint8]:
        return self._source

    def form(self, exact: bool) -> Pixels:
        return self.pil if exact else self.tensor

    @cached_property
    def short(self) -> Picture:
        """The same, without sides that are too long to be resized at once."""
        if max(self.size) <= extremes.LONGEST:
            return self
        return Picture(extremes.shortened(self.pil))

    def resized(self, width: int, height: int, how: str, exact: bool) -> Pixels:
        """Resized once for all that ask alike: of a square, CLIP and the faces want the same."""
        key = width, height, how, exact
        if key not in self._resized:
            self._resized[key] = _resize(self.short.form(exact), width, height, how)
        return self._resized[key]


@dataclass(frozen=True)
class Options:
    """How preprocessors work: `exact` resizing, and the most pixels an image may ever have."""

    exact: bool = False
    max_pixels: int = 178_956_970


class Prepare(Protocol):
    def __call__(self, value: Any, options: Options, /) -> Any: ...


@dataclass(frozen=True)
class Preprocessor:
    """One preprocessor.

    Attributes:
        prepare: one sample's raw input (`Picture`, str or dict) to what is stacked into the batch.
        finish: the stacked batch, on the device, to the model's input.
    """

    prepare: Prepare
    finish: Callable[[Any], Any] = lambda batch: batch


def _resize(image: Pixels, width: int, height: int, how: str) -> Pixels:
    """Both ways go along the rows first; where that alone takes too much, along the columns."""
    given = size_of(image)
    if width > given[0] and width * given[1] > extremes.LARGE:
        image = _resize_once(image, given[0], height, how)
    return _resize_once(image, width, height, how)


def _resize_once(image: Pixels, width: int, height: int, how: str) -> Pixels:
    """Tensors stay channels last in memory, as conv nets on the device want them too."""
    if isinstance(image, Image.Image):
        return image.resize((width, height), Image.Resampling[how.upper()])
    # The batch's stride tells a batch of one from one whose channels come first.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, (height, width), mode=how, antialias=True)[0]


def clip_image(picture: Picture, options: Options) -> Tensor:
    """uint8 [3, 224, 224]: short side to 224 (bicubic), centre crop (OpenAI CLIP)."""
    width, height = picture.size
    short = min(width, height)
    wide, high = (int(CLIP_SIZE * side / short) for side in (width, height))
    if wide * high > extremes.LARGE:
        return tensor_of(extremes.centre(picture.source, wide, high, CLIP_SIZE))
    left, top = (round((side - CLIP_SIZE) / 2) for side in (wide, high))
    if options.exact and wide > CLIP_SIZE:
        return tensor_of(_landscape(picture.pil, wide, left))
    resized = tensor_of(picture.resized(wide, high, "bicubic", options.exact))
    crop = resized[:, top : top + CLIP_SIZE, left : left + CLIP_SIZE]
    # A view holds all of what was resized until its batch is made.
    return crop if wide * high <= 4 * CLIP_SIZE**2 else in_memory(crop)


def _landscape(image: Image.Image, wide: int, left: int) -> Image.Image:
    """The columns that a crop takes away go before the second of resizing's passes."""
    first = image.resize((wide, image.height), Image.Resampling.BICUBIC)
    cropped = first.crop((left, 0, left + CLIP_SIZE, image.height))
    return cropped.resize((CLIP_SIZE, CLIP_SIZE), Image.Resampling.BICUBIC)


def faces_image(picture: Picture, options: Options) -> tuple[Tensor, Tensor]:
    """Pad to a square with white, resize to 224 (bicubic).

    Returns:
        uint8 [3, 224, 224], and float32 [4]: the padding at left, top, right and bottom as
        fractions of the square's side.
    """
    picture = picture.short
    width, height = picture.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    padding = (left, top, side - width - left, side - height - top)
    make = _in_square if side * side <= SQUARE else _in_endless_square
    told = torch.tensor(padding, dtype=torch.float32) / side
    return tensor_of(make(picture, padding, options.exact)), told


def _in_square(picture: Picture, padding: tuple[int, int, int, int], exact: bool) -> Pixels:
    if not any(padding):
        return picture.resized(FACES_SIZE, FACES_SIZE, "bicubic", exact)
    image, (_, height) = picture.form(exact), picture.size
    if padding[1] + padding[3]:  # white rows are white after the first of resizing's passes, too
        image = _pad(_resize(image, FACES_SIZE, height, "bicubic"), padding)
    elif height * height <= extremes.LARGE:
        image = _pad(image, padding)
    else:
        image = _narrowed(image, padding)
    return _resize(image, FACES_SIZE, FACES_SIZE, "bicubic")


def _narrowed(image: Pixels, padding: tuple[int, int, int, int]) -> Tensor | Image.Image:
    """The first of resizing's passes over a square, whose rows are padded some at a time."""
    width, height = size_of(image)
    rows = extremes.LARGE // (4 * height)
    parts = []
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        if isinstance(image, Image.Image):
            part: Pixels = image.crop((0, top, width, bottom))
        else:
            part = image[:, top:bottom]
        part = _resize(_pad(part, padding), FACES_SIZE, bottom - top, "bicubic")
        parts.append(tensor_of(part).permute(1, 2, 0))
    narrow = torch.cat(parts)
    if isinstance(image, Image.Image):
        return Image.fromarray(narrow.numpy())
    return narrow.permute(2, 0, 1)


def _in_endless_square(picture: Picture, padding: tuple[int, int, int, int], exact: bool) -> Pixels:
    """Along the long side first, and across without making the white."""
    image, (width, height), side = picture.form(exact), picture.size, max(picture.size)
    tall = height > width
    size = (width, FACES_SIZE) if tall else (FACES_SIZE, height)
    strip = tensor_of(_resize(image, *size, "bicubic"))
    before = padding[0] if tall else padding[1]
    return extremes.in_white(strip, before, side, axis=2 if tall else 1)


def _pad(image: Pixels, padding: tuple[int, int, int, int]) -> Pixels:
    """In white; tensors by hand, as torch's `pad` takes a pixel's channels apart."""
    if isinstance(image, Image.Image):
        return ImageOps.expand(image, padding, "white")
    left, top, right, bottom = padding
    _, height, width = image.shape
    shape = (top + height + bottom, left + width + right, 3)
    padded = torch.full(shape, 255, dtype=torch.uint8).permute(2, 0, 1)
    padded[:, top : top + height, left : left + width] = image
    return padded


def dedup_image(picture: Picture, options: Options) -> Tensor:
    """uint8 [3, 512, 512], whatever the aspect (bilinear)."""
    return tensor_of(picture.resized(DEDUP_SIZE, DEDUP_SIZE, "bilinear", options.exact))


def stats_image(picture: Picture, options: Options) -> Tensor:
    """uint8 [3, 256, 256], whatever the aspect (bilinear)."""
    return tensor_of(picture.resized(STATS_SIZE, STATS_SIZE, "bilinear", options.exact))


def identity(value: Any, options: Options) -> Any:
    """The raw input as it is; an image as PIL."""
    return value.pil if isinstance(value, Picture) else value


def normaliser(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """uint8 [B, 3, H, W] on any device to float32, channel by channel (x / 255 - mean) / std."""

    @cache
    def constants(device: torch.device) -> tuple[Tensor, Tensor]:
        """Made once: a copy from the host's ordinary memory would wait for the device."""
        centre, scale = torch.tensor([mean, std], dtype=torch.float64).view(2, 3, 1, 1)
        return (-centre / scale).float().to(device), (1 / scale).float().to(device)

    def normalise(pixels: Tensor) -> Tensor:
        # Two passes over the memory; with one the rounding is another, which deep nets amplify to
        # 5e-5 on pictures of one colour. This one is the reference's, bit for bit, at 0.5 and 0.5.
        unit = torch.div(pixels, 255)
        shift, factor = constants(pixels.device)
        return torch.addcmul(shift, unit, factor, out=unit)

    return normalise


_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_halves = normaliser(*_HALF)

PREPROCESSORS: dict[str, Preprocessor] = {
    "clip-aug": Preprocessor(
        clip_image,
        normaliser((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ),
    "clip-tokens": Preprocessor(lambda text, options: clip_tokens(text)),
    "faces-aug": Preprocessor(faces_image, lambda batch: (_halves(batch[0]), batch[1])),
    "dedup-aug": Preprocessor(dedup_image, _halves),
    "stats-aug": Preprocessor(stats_image),
    "identity": Preprocessor(identity),
}


def custom(function: Callable[[Any], Any]) -> Preprocessor:
    """A preprocessor of a custom file: it is given a PIL image, a str or a dict."""
    return Preprocessor(lambda value, options: function(identity(value, options)))
