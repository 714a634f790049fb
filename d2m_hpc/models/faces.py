"""Faces: SCRFD-10G (Guo et al., 2021, arXiv:2105.04714), decoded for a whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import nms

from d2m_hpc.models.checkpoint import Weights, state_of
from d2m_hpc.models.scrfd import ANCHORS, STRIDES, Level, ScrfdNet
from d2m_hpc.models.transfer import cast_early, conv_layout

CHECKPOINT = "scrfd_10g.pt"
SIDE = 224
"""Pixels of the square that the net sees."""
MIN_SCORE = 0.3
MAX_IOU = 0.45
TOGETHER = 512
"""Boxes in one suppression: more would meet too many of other images, fewer cost more calls."""
UNUSED = "bbox_head.integral."

Boxes = list[list[float]]


def detect(levels: Sequence[Level], paddings: Tensor, side: int = SIDE) -> list[Boxes]:
    """The faces that the net found.

    Args:
        levels: on the CPU, as the net gives them.
        paddings: [B, 4], left, top, right, bottom as fractions of the square's side.
        side: of the square input, in pixels.

    Returns:
        for each image its boxes [x0, y0, x1, y1], relative to the unpadded image, in [0, 1],
        in descending order of score.
    """
    image, scores, boxes = decode(levels, side, MIN_SCORE)
    kept = suppress(image, scores, boxes)
    relative = unpad(boxes[kept], paddings[image[kept]], side).tolist()
    ends = torch.bincount(image[kept], minlength=len(paddings)).cumsum(0).tolist()
    return [relative[first:end] for first, end in zip([0, *ends], ends, strict=False)]


def decode(levels: Sequence[Level], side: int, min_score: float) -> tuple[Tensor, Tensor, Tensor]:
    """The anchors with a score over `min_score`, as boxes; the many others are not looked at.

    Args:
        side: of the square input, in pixels.

    Returns:
        int64 [K], the image of each; float32 scores [K] in [0, 1] and boxes [K, 4] (x0, y0, x1, y1)
        in input pixels, clipped to the input. They stand image after image, level by level.
    """
    min_logit = math.log(min_score / (1 - min_score))
    parts = [_decode(*level, s, min_logit) for level, s in zip(levels, STRIDES, strict=True)]
    image, scores, corners = (torch.cat(part) for part in zip(*parts, strict=True))
    order = torch.from_numpy(np.argsort(image.numpy(), kind="stable"))
    return image[order], scores[order], corners[order].clamp(0, side)


def _decode(
    logits: Tensor, distances: Tensor, stride: int, min_logit: float
) -> tuple[Tensor, Tensor, Tensor]:
    # NumPy, as torch's threads would wait for cores that decode the next images; flat, as its
    # `nonzero` takes ten times as long along four axes.
    likely = np.flatnonzero(logits.float().numpy() > min_logit)
    found = np.unravel_index(likely, logits.shape)
    image, anchor, y, x = map(torch.from_numpy, found)
    centre = torch.stack([x, y], dim=1) * stride
    sides = distances.view(-1, ANCHORS, 4, *logits.shape[2:])
    reach = sides[image, anchor, :, y, x].float() * stride
    corners = torch.cat([centre - reach[:, :2], centre + reach[:, 2:]], dim=1)
    return image, logits[image, anchor, y, x].float().sigmoid(), corners


def suppress(image: Tensor, scores: Tensor, boxes: Tensor) -> Tensor:
    """Non-maximum suppression in every image.

    Args:
        image: int64 [K], the image of each box, ascending.
        scores: float32 [K].
        boxes: float32 [K, 4], in pixels, not negative.

    Returns:
        int64, the indices of the kept boxes: image after image, in descending order of score.
    """
    if not len(boxes):
        return image
    # Images are moved apart so that their boxes never meet; float64 keeps the overlaps exact.
    apart = boxes.double() + (image * (boxes.amax() + 1).double())[:, None]
    kept = [run.start + nms(apart[run], scores[run].double(), MAX_IOU) for run in _runs(image)]
    found = torch.cat(kept)
    return found[torch.argsort(image[found], stable=True)]


def _runs(image: Tensor) -> Iterator[slice]:
    """Boxes of consecutive images, about `TOGETHER` at a time, no image's apart."""
    ends = np.bincount(image.numpy()).cumsum()
    last = np.flatnonzero(np.diff((ends - 1) // TOGETHER, append=-1))
    yield from map(slice, [0, *ends[last[:-1]]], ends[last])


def unpad(boxes: Tensor, paddings: Tensor, side: int) -> Tensor:
    """Boxes in pixels of the padded square to fractions of the unpadded image, in [0, 1].

    Args:
        boxes: [K, 4].
        paddings: [K, 4], left, top, right, bottom as fractions of the square's side.
    """
    start = paddings[:, [0, 1, 0, 1]]
    extent = 1 - start - paddings[:, [2, 3, 2, 3]]
    return ((boxes - start * side) / (extent * side)).clamp(0, 1)


class Scrfd10G(nn.Module):
    """The net on the device; what it found is read on the host, while the device goes on."""

    def __init__(self, device: torch.device, weights: Weights) -> None:
        super().__init__()
        self.layout = conv_layout(device)
        self.net = load(weights).to(device).to(memory_format=self.layout).eval()

    @property
    def image_net(self) -> nn.Module:
        """What may be compiled: its shapes are fixed."""
        net: nn.Module = self.net
        return net

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[tuple[Level, ...], Tensor]:
        """
        Args:
            inputs: float32 images [B, 3, 224, 224] in [-1, 1], and their paddings [B, 4].

        Returns:
            the net's levels, and the paddings.
        """
        images, paddings = inputs
        return self.net(cast_early(images).contiguous(memory_format=self.layout)), paddings

    def on_host(self, output: tuple[tuple[Level, ...], Tensor]) -> list[Boxes]:
        """What `detect` makes of it."""
        return detect(*output)


def load(weights: Weights) -> ScrfdNet:
    net = ScrfdNet()
    with weights.used(CHECKPOINT):
        state = state_of(weights.load(CHECKPOINT)).items()
        net.load_state_dict({k: v for k, v in state if not k.startswith(UNUSED)})
    return net
