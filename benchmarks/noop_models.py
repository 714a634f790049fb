"""A custom file: models that take what the six take and give what they give, in no time.

It keeps to dataset2metadata's protocol, so that the reference program takes it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

WIDTHS = (512, 512, 768, 768, 256)


class NoOp(torch.nn.Module):
    """Features float32 [B, width] of length 1, a score float32 [B], a box for each sample."""

    name = "no-op"
    raw_inputs = ("image", "text", "image", "image")
    preprocessors = ("clip-aug", "clip-tokens", "faces-aug", "dedup-aug")
    dependencies = ()
    to_device = True

    def __init__(self, device: object) -> None:
        super().__init__()

    def forward(self, images: Tensor, tokens: Tensor, faces: object, pictures: Tensor) -> Any:
        count = len(images)
        features = (torch.full((count, width), width**-0.5) for width in WIDTHS)
        return (*features, torch.full((count,), 0.25), [[[0.1, 0.1, 0.2, 0.2]]] * count)


class NoOpText(torch.nn.Module):
    """A score float32 [B]."""

    name = "no-op-text"
    raw_inputs = ("text",)
    preprocessors = ("identity",)
    dependencies = ()
    to_device = False

    def __init__(self, device: object) -> None:
        super().__init__()

    def forward(self, texts: Sequence[str]) -> Tensor:
        return torch.full((len(texts),), 0.1)


class NoOpClip(torch.nn.Module):
    """A feature float32 [B, 512] of length 1."""

    name = "no-op-clip"
    raw_inputs = ("image", "text")
    preprocessors = ("clip-aug", "clip-tokens")
    dependencies = ()
    to_device = True

    def __init__(self, device: object) -> None:
        super().__init__()

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        return torch.full((len(images), WIDTHS[0]), WIDTHS[0] ** -0.5)


def output(cache: Mapping[str, Any], index: int) -> Any:
    """A feature, the score (5) or the boxes (6)."""
    return cache["no-op"][index] if "no-op" in cache else cache["no-op-clip"]


def toxicity(cache: Mapping[str, Any]) -> Any:
    return cache["no-op-text"]


score = partial(output, index=5)

model_lookup = {made.name: made for made in (NoOp, NoOpText, NoOpClip)}
preprocessor_lookup: dict[str, Any] = {}
postprocess_feature_lookup = {
    "oai-clip-vit-b32-image": partial(output, index=0),
    "oai-clip-vit-b32-text": partial(output, index=1),
    "oai-clip-vit-l14-image": partial(output, index=2),
    "oai-clip-vit-l14-text": partial(output, index=3),
    "dedup-isc-ft-v107-image": partial(output, index=4),
}
postprocess_parquet_lookup: dict[str, Any] = {
    "oai-clip-vit-b32-score": score,
    "oai-clip-vit-l14-score": score,
    "nsfw-detoxify-score": toxicity,
    "nsfw-image-score": score,
    "face-boxes": partial(output, index=6),
    "dedup-isc-ft-v107-score": score,
}
