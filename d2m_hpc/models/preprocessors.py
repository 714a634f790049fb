"""Raw inputs to model inputs: a CPU half for the decode threads, a device half for whole batches.

Pixels travel as uint8; the device half normalises them. `fast` resizes with torchvision's uint8
kernels, `exact` with PIL, bit for bit as the reference program does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import regex
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

CLIP_SIZE = 224
CLIP_CONTEXT = 77
FACES_SIZE = 224
DEDUP_SIZE = 512
STATS_SIZE = 256


class Rejected(Exception):
    """This sample cannot be used; the message is the reason that goes on record."""


class Picture:
    """A decoded RGB image, as PIL or as a uint8 tensor, whichever is asked for."""

    def __init__(self, source: Image.Image | NDArray[np.uint8]) -> None:
        self._source = source

    @cached_property
    def pil(self) -> Image.Image:
        source = self._source
        return source if isinstance(source, Image.Image) else Image.fromarray(source)

    @cached_property
    def tensor(self) -> Tensor:
        """uint8 [3, H, W], channels last in memory, where torchvision's kernels are fastest."""
        source = self._source
        pixels = np.array(source) if isinstance(source, Image.Image) else source
        return torch.from_numpy(pixels).permute(2, 0, 1)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        if isinstance(self._source, Image.Image):
            return self._source.size
        return self._source.shape[1], self._source.shape[0]

    def form(self, exact: bool) -> Image.Image | Tensor:
        return self.pil if exact else self.tensor


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


def _resize(
    picture: Picture, size: list[int], options: Options, how: InterpolationMode
) -> Image.Image | Tensor:
    image: Image.Image | Tensor = picture.form(options.exact)
    resized: Image.Image | Tensor = F.resize(image, size, interpolation=how, antialias=True)
    return resized


def _bytes(image: Image.Image | Tensor) -> Tensor:
    """uint8 [3, H, W]."""
    tensor: Tensor = F.pil_to_tensor(image) if isinstance(image, Image.Image) else image
    return tensor.contiguous()


def _limit(pixels: int, options: Options, what: str) -> None:
    if pixels > options.max_pixels:
        raise Rejected(
            f"{what} takes {pixels} pixels, over max_image_pixels ({options.max_pixels})"
        )


def clip_image(picture: Picture, options: Options) -> Tensor:
    """uint8 [3, 224, 224]: short side to 224 (bicubic), centre crop (OpenAI CLIP)."""
    width, height = picture.size
    short, long = sorted((width, height))
    _limit(CLIP_SIZE * CLIP_SIZE * long // short, options, f"resizing {width}x{height} for CLIP")
    resized = _resize(picture, [CLIP_SIZE], options, InterpolationMode.BICUBIC)
    return _bytes(F.center_crop(resized, [CLIP_SIZE, CLIP_SIZE]))


def faces_image(picture: Picture, options: Options) -> tuple[Tensor, Tensor]:
    """Pad to a square with white, resize to 224 (bicubic).

    Returns:
        uint8 [3, 224, 224], and float32 [4]: the padding at left, top, right and bottom as
        fractions of the square's side.
    """
    width, height = picture.size
    side = max(width, height)
    _limit(side * side, options, f"padding {width}x{height} to a square")
    left, top = (side - width) // 2, (side - height) // 2
    padding = [left, top, side - width - left, side - height - top]
    padded = F.pad(picture.form(options.exact), padding, fill=255)
    resized = F.resize(
        padded, [FACES_SIZE], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return _bytes(resized), torch.tensor(padding, dtype=torch.float32) / side


def dedup_image(picture: Picture, options: Options) -> Tensor:
    """uint8 [3, 512, 512], whatever the aspect (bilinear)."""
    size = [DEDUP_SIZE, DEDUP_SIZE]
    return _bytes(_resize(picture, size, options, InterpolationMode.BILINEAR))


def stats_image(picture: Picture, options: Options) -> Tensor:
    """uint8 [3, 256, 256], whatever the aspect (bilinear)."""
    size = [STATS_SIZE, STATS_SIZE]
    return _bytes(_resize(picture, size, options, InterpolationMode.BILINEAR))


def clip_tokens(text: str, options: Options) -> Tensor:
    """int64 [77]: CLIP's BPE tokens, cut with the end token kept, padded with 0."""
    tokens: Tensor = _tokenizer()(text)[0]
    return tokens


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    """open_clip's tokenizer with OpenAI's special tokens.

    OpenAI's reads `<|endoftext|>` inside a caption as that token (openai/CLIP,
    simple_tokenizer.py); DataComp's published features were made so.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=CLIP_CONTEXT)
    names = ("<|startoftext|>", "<|endoftext|>")
    for name, token in zip(names, tokenizer.all_special_ids, strict=True):
        del tokenizer.encoder[tokenizer.decoder[token]]
        tokenizer.encoder[name] = token
        tokenizer.decoder[token] = name
    tokenizer.cache = {name: name for name in names}
    special = "|".join(map(regex.escape, names))
    rest = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pat = regex.compile(f"{special}|{rest}", regex.IGNORECASE)
    return tokenizer


def identity(value: Any, options: Options) -> Any:
    """The raw input as it is; an image as PIL."""
    return value.pil if isinstance(value, Picture) else value


def normaliser(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """uint8 [B, 3, H, W] on any device to float32, channel by channel (x / 255 - mean) / std."""

    def normalise(pixels: Tensor) -> Tensor:
        options = {"device": pixels.device, "dtype": torch.float32}
        centre = torch.tensor(mean, **options).view(3, 1, 1)  # type: ignore[arg-type]
        scale = torch.tensor(std, **options).view(3, 1, 1)  # type: ignore[arg-type]
        return pixels.float().div_(255).sub_(centre).div_(scale)

    return normalise


_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_halves = normaliser(*_HALF)

PREPROCESSORS: dict[str, Preprocessor] = {
    "clip-aug": Preprocessor(
        clip_image,
        normaliser((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ),
    "clip-tokens": Preprocessor(clip_tokens),
    "faces-aug": Preprocessor(faces_image, lambda batch: (_halves(batch[0]), batch[1])),
    "dedup-aug": Preprocessor(dedup_image, _halves),
    "stats-aug": Preprocessor(stats_image),
    "identity": Preprocessor(identity),
}


def custom(function: Callable[[Any], Any]) -> Preprocessor:
    """A preprocessor of a custom file: it is given a PIL image, a str or a dict."""
    return Preprocessor(lambda value, options: function(identity(value, options)))
