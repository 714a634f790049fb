"""Raw inputs to model inputs: a CPU half for the decode threads, a device half for whole batches.

Pixels travel as uint8 [B, H, W, 3]; the device half normalises them. `fast` resizes with torch's
uint8 kernels, `exact` with PIL, both bit for bit as torchvision's transforms do, whose import takes
as long as torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.models import extremes
from d2m_hpc.models.blocks import Largest, like
from d2m_hpc.models.inputs import NAMED, Form, ImageInput, OwnInput
from d2m_hpc.models.pixels import Pixels, array_of, size_of
from d2m_hpc.storage.texts import safe

FAST = ("bicubic", "bilinear")
"""What torch's kernels for uint8 resize by; PIL does all else."""
SQUARE = 178_956_970
"""Pixels of the largest square that the faces' white is made for, some rows at a time."""


Padding = tuple[int, int, int, int]
"""Pixels at the left, top, right and bottom."""


class Picture:
    """A decoded RGB image, as PIL or as a uint8 array, whichever is asked for."""

    def __init__(self, source: Pixels) -> None:
        self.source = source
        self._pil = source if isinstance(source, Image.Image) else None
        self._array = None if isinstance(source, Image.Image) else source
        self._shortened: Picture | None = None
        self._batch: Tensor | None = None
        self._resized: dict[tuple[int, int, str, bool], Pixels] = {}

    @property
    def pil(self) -> Image.Image:
        if self._pil is None:
            self._pil = Image.fromarray(self.source)
        return self._pil

    @property
    def array(self) -> NDArray[np.uint8]:
        """uint8 [H, W, 3]."""
        if self._array is None:
            self._array = array_of(self.source)
        return self._array

    @property
    def batch(self) -> Tensor:
        """uint8 [1, 3, H, W], for all that resize by torch: each tensor that is given up, and what
        it lay in, waits for the interpreter's lock."""
        if self._batch is None:
            self._batch = _batch_of(self.array)
        return self._batch

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return size_of(self.source)

    def form(self, exact: bool) -> Pixels:
        return self.pil if exact else self.array

    @property
    def short(self) -> Picture:
        """The same, without sides that are too long to be resized at once."""
        if max(self.size) <= extremes.LONGEST:
            return self
        if self._shortened is None:
            self._shortened = Picture(extremes.shortened(self.pil))
        return self._shortened

    def resize(self, width: int, height: int, how: str, exact: bool) -> Pixels:
        if exact or how not in FAST:
            return _resize(self.pil, width, height, how)
        return _resize(self.array, width, height, how, self.batch)

    def resized(self, width: int, height: int, how: str, exact: bool) -> Pixels:
        """Resized once for all that ask alike: of a square, CLIP and the faces want the same."""
        key = width, height, how, exact
        if key not in self._resized:
            self._resized[key] = self.short.resize(width, height, how, exact)
        return self._resized[key]


@dataclass(frozen=True)
class Options:
    """How preprocessors work: `exact` resizing, the most pixels an image may ever have, and
    decoding of large JPEGs at a fraction of their size."""

    exact: bool = False
    max_pixels: int = 178_956_970
    scaled: bool = False


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


def _batch_of(image: NDArray[np.uint8]) -> Tensor:
    """uint8 [1, 3, H, W]; its strides tell torch that channels come last."""
    return torch.from_numpy(image.reshape(1, *image.shape).transpose(0, 3, 1, 2))


def _resize(
    image: Pixels, width: int, height: int, how: str, batch: Tensor | None = None
) -> Pixels:
    """Both ways go along the rows first; where that alone takes too much, along the columns.

    Args:
        batch: the image as `_batch_of` gives it, if that is known.
    """
    given = size_of(image)
    if width > given[0] and width * given[1] > extremes.LARGE:
        image, batch = _resize_once(image, given[0], height, how, batch), None
    return _resize_once(image, width, height, how, batch)


def _resize_once(image: Pixels, width: int, height: int, how: str, batch: Tensor | None) -> Pixels:
    """Channels stay last in memory, as conv nets on the device want them too."""
    if isinstance(image, Image.Image):
        return image.resize((width, height), Image.Resampling[how.upper()])
    batch = _batch_of(image) if batch is None else batch
    made = F.interpolate(batch, (height, width), mode=how, antialias=True)
    resized: NDArray[np.uint8] = made.numpy()[0].transpose(1, 2, 0)
    return resized


def prepared_image(picture: Picture, options: Options, wanted: ImageInput) -> Any:
    """uint8 [H, W, 3], as `wanted` describes it; for `pad`, and the padding, float32 [4]."""
    if wanted.resize == "pad":
        return _padded(picture, wanted, options.exact)
    if wanted.resize == "squash":
        return array_of(_plain(picture, wanted.width, wanted.height, wanted, options.exact))
    make = _cut_out if wanted.resize == "shortest" else _within
    return make(picture, wanted, options.exact)


def _plain(picture: Picture, width: int, height: int, wanted: ImageInput, exact: bool) -> Pixels:
    return picture.resized(width, height, wanted.interpolation, exact)


def _cut_out(picture: Picture, wanted: ImageInput, exact: bool) -> NDArray[np.uint8]:
    """Bring the short side to a length and cut the middle out, as torchvision and open_clip do."""
    (width, height), size = picture.size, (wanted.width, wanted.height)
    if size[0] == size[1] or wanted.short:
        short, length = min(width, height), wanted.short or wanted.height
        wide, high = (int(length * side / short) for side in (width, height))
    else:
        ratio = min(width / size[0], height / size[1])
        wide, high = round(width / ratio), round(height / ratio)
    whole = round if wanted.crop == "round" else math.floor
    left, top = whole((wide - size[0]) / 2), whole((high - size[1]) / 2)
    if wide * high > extremes.LARGE:
        how = Image.Resampling[wanted.interpolation.upper()]
        return array_of(extremes.centre(picture.source, wide, high, size, how, (left, top)))
    if exact and wide > size[0] and high == size[1]:
        return array_of(_landscape(picture.pil, wide, left, wanted))
    resized = array_of(_plain(picture, wide, high, wanted, exact))
    crop = resized[top : top + size[1], left : left + size[0]]
    # A view holds all of what was resized until its batch is made.
    return crop if wide * high <= 4 * size[0] * size[1] else crop.copy()


def _landscape(image: Image.Image, wide: int, left: int, wanted: ImageInput) -> Image.Image:
    """The columns that a crop takes away go before the second of resizing's passes."""
    how = Image.Resampling[wanted.interpolation.upper()]
    first = image.resize((wide, image.height), how)
    cropped = first.crop((left, 0, left + wanted.width, image.height))
    return cropped.resize((wanted.width, wanted.height), how)


def _within(picture: Picture, wanted: ImageInput, exact: bool) -> NDArray[np.uint8]:
    """Bring the long side to the size, with `fill` around, as open_clip does."""
    width, height = picture.size
    ratio = max(width / wanted.width, height / wanted.height)
    wide, high = max(1, round(width / ratio)), max(1, round(height / ratio))
    resized = array_of(_plain(picture, wide, high, wanted, exact))
    left, top = (wanted.width - wide) // 2, (wanted.height - high) // 2
    padding = (left, top, wanted.width - wide - left, wanted.height - high - top)
    return array_of(_pad(resized, padding, wanted.fill) if any(padding) else resized)


def _padded(
    picture: Picture, wanted: ImageInput, exact: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Pad to a square and resize that.

    Returns:
        uint8 [H, W, 3], and float32 [4]: the padding at left, top, right and bottom as fractions
        of the square's side.
    """
    picture = picture.short
    width, height = picture.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    padding = (left, top, side - width - left, side - height - top)
    make = _in_square if side * side <= SQUARE else _in_endless_square
    told = np.asarray(padding, np.float32) / np.float32(side)
    return array_of(make(picture, padding, wanted, exact)), told


def _in_square(picture: Picture, padding: Padding, wanted: ImageInput, exact: bool) -> Pixels:
    size, how = (wanted.width, wanted.height), wanted.interpolation
    if not any(padding):
        return picture.resized(*size, how, exact)
    image, (_, height) = picture.form(exact or how not in FAST), picture.size
    if padding[1] + padding[3]:  # filled rows are so after the first of resizing's passes, too
        image = _pad(picture.resize(size[0], height, how, exact), padding, wanted.fill)
    elif height * height <= extremes.LARGE:
        image = _pad(image, padding, wanted.fill)
    else:
        image = _narrowed(image, padding, wanted)
    return _resize(image, *size, how)


def _narrowed(image: Pixels, padding: Padding, wanted: ImageInput) -> Pixels:
    """The first of resizing's passes over a square, whose rows are padded some at a time."""
    width, height = size_of(image)
    rows = extremes.LARGE // (4 * height)
    parts = []
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        if isinstance(image, Image.Image):
            part: Pixels = image.crop((0, top, width, bottom))
        else:
            part = image[top:bottom]
        part = _pad(part, padding, wanted.fill)
        parts.append(array_of(_resize(part, wanted.width, bottom - top, wanted.interpolation)))
    narrow = np.concatenate(parts)
    return Image.fromarray(narrow) if isinstance(image, Image.Image) else narrow


def _in_endless_square(
    picture: Picture, padding: Padding, wanted: ImageInput, exact: bool
) -> Pixels:
    """Along the long side first, and across without making the padding (always bicubic)."""
    (width, height), side = picture.size, max(picture.size)
    tall = height > width
    size = (width, wanted.height) if tall else (wanted.width, height)
    strip = array_of(picture.resize(*size, "bicubic", exact))
    before = padding[0] if tall else padding[1]
    return extremes.filled(strip, before, side, axis=1 if tall else 0, fill=wanted.fill)


def _pad(image: Pixels, padding: Padding, fill: int) -> Pixels:
    if isinstance(image, Image.Image):
        return ImageOps.expand(image, padding, (fill, fill, fill))
    left, top, right, bottom = padding
    height, width, _ = image.shape
    padded = np.full((top + height + bottom, left + width + right, 3), fill, np.uint8)
    padded[top : top + height, left : left + width] = image
    return padded


def identity(value: Any, options: Options) -> Any:
    """The raw input as it is; an image as PIL."""
    return value.pil if isinstance(value, Picture) else value


_on_host = Largest()


def _floats(pixels: Tensor) -> Tensor | None:
    """Memory for the pixels as float32, on the host that of earlier batches; None for new memory.

    On the host, zeroing new pages would take longer than normalising does.
    """
    if pixels.device.type != "cpu":
        return None
    return like(pixels, lambda shape, _: _on_host(shape, torch.float32))


def channels_first(pixels: Tensor) -> Tensor:
    """[B, H, W, 3] as [B, 3, H, W], which lies in memory as before."""
    return pixels.permute(0, 3, 1, 2)


def normaliser(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """uint8 [B, H, W, 3] on any device to float32 [B, 3, H, W], channels last in memory.

    Channel by channel (x / 255 - mean) / std.
    """

    @cache
    def constants(device: torch.device) -> tuple[Tensor, Tensor]:
        """Made once: a copy from the host's ordinary memory would wait for the device."""
        centre, scale = torch.tensor([mean, std], dtype=torch.float64)
        return (-centre / scale).float().to(device), (1 / scale).float().to(device)

    def normalise(pixels: Tensor) -> Tensor:
        # Two roundings; with one, deep nets amplify the difference to 5e-5 on pictures of one
        # colour. This is the reference's way, bit for bit, at 0.5 and 0.5.
        pixels = pixels.contiguous()  # as batches are
        made = _floats(pixels)
        shift, factor = constants(pixels.device)
        if made is None:
            unit = torch.div(pixels, 255)
            return channels_first(torch.addcmul(shift, unit, factor, out=unit))
        # Picture by picture in the cache, and by whole lines of pixels rather than by three values
        # at a time: a quarter of the time that whole batches take.
        shift, factor = (value.repeat(pixels.shape[2]) for value in (shift, factor))
        for given, line in zip(pixels.flatten(2), made.flatten(2), strict=True):
            torch.addcmul(shift, line.copy_(given).div_(255), factor, out=line)
        return channels_first(made)

    return normalise


def custom(function: Callable[[Any], Any]) -> Preprocessor:
    """A preprocessor of a custom file: it is given a PIL image, a str or a dict."""
    return Preprocessor(lambda value, options: function(identity(value, options)))


@cache
def of_form(form: Form) -> Preprocessor:
    """The preprocessor that a value describes, ready for threads.

    Raises:
        ConfigError: a family's own code cannot make it.
    """
    if isinstance(form, str):
        return Preprocessor(identity)
    if isinstance(form, OwnInput):
        return custom(_made(form))
    finish = channels_first if not (form.mean and form.std) else normaliser(form.mean, form.std)
    if form.resize == "pad":
        finish = partial(_first, finish)
    return Preprocessor(partial(prepared_image, wanted=form.pixels), finish)


def _made(form: OwnInput) -> Callable[[Any], Any]:
    module, name = form.made_by.split(":")
    try:
        made: Callable[[Any], Any] = getattr(import_module(module), name)(**dict(form.options))
    except D2MError:
        raise
    except Exception as error:  # of a library, on a missing or damaged file
        why = str(error) or "a library says no more; its file may be of another net"
        what = " ".join(f"{type(error).__name__}: {why}".split())
        raise ConfigError("models", [f"{form} cannot be made ready: {safe(what, 600)}"]) from error
    return made


def _first(finish: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Any:
    return finish(batch[0]), batch[1]


PREPROCESSORS: dict[str, Preprocessor] = {name: of_form(form) for name, form in NAMED.items()}
