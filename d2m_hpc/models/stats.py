"""Statistics of pixels and words: no checkpoint, so they run anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m_hpc.models.checkpoint import Weights

HISTOGRAM_BINS = 16
HASH_SIDE = 8
LONG = 1 << 20
"""Characters beyond which a text's words are looked at one by one, in little memory."""
_WORD = re.compile(r"\S+")
"""As `str.split` takes words, which is five times as fast."""


def _dct_rows(size: int, rows: int) -> Tensor:
    """The first `rows` rows of the orthogonal DCT-II matrix, float32 [rows, size]."""
    k = torch.arange(rows, dtype=torch.float64)[:, None]
    n = torch.arange(size, dtype=torch.float64)
    basis: Tensor = torch.cos(torch.pi / size * (n + 0.5) * k) * (2 / size) ** 0.5
    return basis.float()


class ImageStats(nn.Module):
    """Brightness, contrast, sharpness, entropy, perceptual hash, colour histogram."""

    def __init__(self, device: torch.device, weights: Weights) -> None:
        super().__init__()
        self.luma = torch.tensor([0.299, 0.587, 0.114], device=device).view(3, 1, 1)
        self.laplace = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=device)
        self.dct = _dct_rows(32, HASH_SIDE).to(device)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            pixels: uint8 [B, 3, 256, 256].

        Returns:
            float32 [B] each: mean luma and its standard deviation (of [0, 1]), variance of the
            Laplacian, entropy of the luma (bits, at most 8); then the bits of the perceptual
            hashes, bool [B, 8, 8], and histograms float32 [B, 48]: 16 bins of red, of green and of
            blue, each colour summing to 1.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            luma = (pixels.float() * self.luma).sum(dim=1)
            unit = luma / 255
            edges = F.conv2d(unit[:, None], self.laplace[None, None])
            return (
                unit.mean(dim=(1, 2)),
                unit.std(dim=(1, 2), correction=0),
                edges.var(dim=(1, 2, 3), correction=0),
                _entropy(luma),
                self._hash(luma),
                _histogram(pixels),
            )

    def on_host(self, output: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The same with the hashes as 16 hexadecimal digits."""
        *before, bits, histogram = output
        return *before, as_hex(bits), histogram

    def hashes(self, pixels: Tensor) -> Tensor:
        """The bits of the perceptual hashes alone, of the same pixels."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self._hash((pixels.float() * self.luma).sum(dim=1))

    def _hash(self, luma: Tensor) -> Tensor:
        """A bit for each low frequency above the median (Zauner, 2010, the phash of 32x32 DCT)."""
        small = F.adaptive_avg_pool2d(luma[:, None], 32)[:, 0]
        low = self.dct @ small @ self.dct.T
        # The mean (frequency 0) says nothing of the picture's structure.
        median = low.flatten(1)[:, 1:].median(dim=1).values
        return low > median[:, None, None]


def as_hex(bits: Tensor) -> list[str]:
    """Hashes, bool [B, ...], as hexadecimal digits."""
    rows = bits.flatten(1)
    digits = rows.shape[1] // 4
    return [f"{int(''.join('01'[b] for b in row), 2):0{digits}x}" for row in rows.tolist()]


def _counts(values: Tensor, bins: int) -> Tensor:
    """Histograms float32 [B, bins] of integers [B, n] in [0, bins)."""
    # `bincount` would look for the largest value on the device and hold up the host for that.
    counts = torch.zeros(len(values), bins, device=values.device)
    return counts.scatter_add_(1, values.long(), torch.ones_like(values, dtype=torch.float32))


def _entropy(luma: Tensor) -> Tensor:
    p = _counts(luma.round().flatten(1), 256) / luma[0].numel()
    return torch.xlogy(p, 1 / p).sum(dim=1) / math.log(2)


def _histogram(pixels: Tensor) -> Tensor:
    channels = pixels.flatten(0, 1).flatten(1) // (256 // HISTOGRAM_BINS)
    shares = _counts(channels, HISTOGRAM_BINS) / channels.shape[1]
    return shares.view(len(pixels), 3 * HISTOGRAM_BINS)


class TextStats(nn.Module):
    """Counts and ratios of a caption's characters and words."""

    def __init__(self, device: torch.device, weights: Weights) -> None:
        super().__init__()

    def forward(
        self, texts: list[str]
    ) -> tuple[list[int], list[int], Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            texts: B captions.

        Returns:
            characters and words; then float32 [B] in [0, 1]: shares of alphanumeric, upper-case and
            digit characters, and of distinct words (0 for an empty text).
        """
        # One text after the other: the words of a batch of long texts take gigabytes.
        words = [_words(text) for text in texts]
        return (
            [len(text) for text in texts],
            [number for number, _ in words],
            _share(texts, str.isalnum),
            _share(texts, str.isupper),
            _share(texts, str.isdigit),
            torch.tensor([distinct / max(number, 1) for number, distinct in words]),
        )


def _words(text: str) -> tuple[int, int]:
    """The number of a text's words, and of its distinct ones."""
    if len(text) <= LONG:
        words = text.split()
        return len(words), len({word.lower() for word in words})
    number, distinct = 0, set()
    for found in _WORD.finditer(text):
        number += 1
        distinct.add(found[0].lower())
    return number, len(distinct)


def _share(texts: list[str], test: Callable[[str], bool]) -> Tensor:
    return torch.tensor([sum(map(test, text)) / max(len(text), 1) for text in texts])
