"""Faces: SCRFD-10G (Guo et al., 2021, arXiv:2105.04714), decoded for a whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import nms

from d2m_hpc.models.loading import Weights
from d2m_hpc.models.preprocessors import FACES_SIZE
from d2m_hpc.models.scrfd import ANCHORS, STRIDES, ScrfdNet
from d2m_hpc.models.transfer import conv_layout

CHECKPOINT = "scrfd_10g.pt"
MIN_SCORE = 0.3
MAX_IOU = 0.45
TOGETHER = 512
"""Boxes in one suppression: more would meet too many of other images, fewer cost more calls."""
UNUSED = "bbox_head.integral."

Boxes = list[list[float]]


def detect(anchors: Tensor, paddings: Tensor, side: int = FACES_SIZE) -> list[Boxes]:
    """The faces that the net found; only anchors with a score over `MIN_SCORE` are decoded.

    Args:
        anchors: [B, N, 5] on the CPU, as the net gives them.
        paddings: [B, 4], left, top, right, bottom as fractions of the square's side.
        side: of the square input, in pixels.

    Returns:
        for each image its boxes [x0, y0, x1, y1], relative to the unpadded image, in [0, 1],
        in descending order of score.
    """
    min_logit = math.log(MIN_SCORE / (1 - MIN_SCORE))
    # NumPy, as torch's threads would wait for cores that decode the next images.
    likely = np.nonzero(anchors[..., 0].float().numpy() > min_logit)
    image, index = (torch.from_numpy(np.ascontiguousarray(axis)) for axis in likely)
    scores, boxes = decode(anchors[image, index], index, side)
    kept = suppress(image, scores, boxes)
    relative = unpad(boxes[kept], paddings[image[kept]], side).tolist()
    ends = torch.bincount(image[kept], minlength=len(anchors)).cumsum(0).tolist()
    return [relative[first:end] for first, end in zip([0, *ends], ends, strict=False)]


def decode(anchors: Tensor, index: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Anchors as boxes.

    Args:
        anchors: [K, 5], of any images.
        index: [K], where each stands among the anchors of its image.
        side: of the square input, in pixels.

    Returns:
        float32 scores [K] in [0, 1] and boxes [K, 4] (x0, y0, x1, y1) in input pixels, clipped to
        the input.
    """
    centres, strides = (table[index] for table in _grid(side))
    reach = anchors[:, 1:].float() * strides[:, None]
    corners = torch.cat([centres - reach[:, :2], centres + reach[:, 2:]], dim=1)
    return anchors[:, 0].float().sigmoid(), corners.clamp(0, side)


@cache
def _grid(side: int) -> tuple[Tensor, Tensor]:
    """Centres [N, 2] (x, y) and strides [N] of all anchors, in pixels, in the net's order."""
    centres, strides = [], []
    for stride in STRIDES:
        cells = torch.arange(math.ceil(side / stride)) * stride
        y, x = torch.meshgrid(cells, cells, indexing="ij")
        level = torch.stack([x, y], dim=-1).view(-1, 2).repeat_interleave(ANCHORS, dim=0)
        centres.append(level)
        strides.append(torch.full((len(level),), stride))
    return torch.cat(centres), torch.cat(strides)


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
    first_of_image = torch.searchsorted(image, image)
    _, sizes = torch.unique_consecutive(first_of_image // TOGETHER, return_counts=True)
    start = 0
    for size in sizes.tolist():
        yield slice(start, start + size)
        start += size


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

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """
        Args:
            inputs: float32 images [B, 3, 224, 224] in [-1, 1], and their paddings [B, 4].

        Returns:
            the net's anchors [B, N, 5], and the paddings.
        """
        images, paddings = inputs
        return self.net(images.contiguous(memory_format=self.layout)), paddings

    def on_host(self, output: tuple[Tensor, Tensor]) -> list[Boxes]:
        """What `detect` makes of it."""
        return detect(*output)


def load(weights: Weights) -> ScrfdNet:
    net = ScrfdNet()
    with weights.used(CHECKPOINT):
        state = weights.load(CHECKPOINT)["state_dict"].items()
        net.load_state_dict({k: v for k, v in state if not k.startswith(UNUSED)})
    return net
