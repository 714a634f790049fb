"""Faces: SCRFD-10G (Guo et al., 2021, arXiv:2105.04714), decoded for a whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from d2m_hpc.models.loading import Weights

CHECKPOINT = "scrfd_10g.pt"
STRIDES = (8, 16, 32)
ANCHORS = 2
MIN_SCORE = 0.3
MAX_IOU = 0.45
UNUSED = "bbox_head.integral."


def _conv(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, bias: bool = True
) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)


class BasicBlock(nn.Module):
    """Two 3x3 convs and a shortcut, which an average pool shrinks where the block strides."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
                _conv(inputs, width, size=1, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class Backbone(nn.Module):
    """Maps of strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        stem: list[nn.Module] = []
        for inputs, width, stride in ((3, 28, 2), (28, 28, 1), (28, 56, 1)):
            stem += [_conv(inputs, width, stride=stride, bias=False), nn.BatchNorm2d(width)]
            stem += [nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        self.layer1 = _stage(56, 56, blocks=3, stride=1)
        self.layer2 = _stage(56, 88, blocks=4, stride=2)
        self.layer3 = _stage(88, 88, blocks=2, stride=2)
        self.layer4 = _stage(88, 224, blocks=3, stride=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.layer2(self.layer1(F.max_pool2d(self.stem(x), 2, 2)))
        y = self.layer3(x)
        return [x, y, self.layer4(y)]


def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))


class ConvHolder(nn.Module):
    """A conv under the name `conv`, as the checkpoint's keys have it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def _held(convs: Iterable[nn.Conv2d]) -> nn.ModuleList:
    return nn.ModuleList(map(ConvHolder, convs))


class Neck(nn.Module):
    """PAFPN: top-down, then bottom-up; no norm, no activation."""

    def __init__(self, width: int = 56) -> None:
        super().__init__()
        self.lateral_convs = _held(_conv(n, width, size=1) for n in (88, 88, 224))
        self.fpn_convs = _held(_conv(width, width) for _ in range(3))
        self.downsample_convs = _held(_conv(width, width, stride=2) for _ in range(2))
        self.pafpn_convs = _held(_conv(width, width) for _ in range(2))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[2:])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)]
        for i, down in enumerate(self.downsample_convs):
            levels[i + 1] = levels[i + 1] + down(levels[i])
        tops = zip(self.pafpn_convs, levels[1:], strict=True)
        return [levels[0], *(conv(x) for conv, x in tops)]


class HeadBlock(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = _conv(inputs, width, bias=False)
        self.gn = nn.GroupNorm(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gn(self.conv(x)))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Head(nn.Module):
    """Scores and box distances, by the same convs at every level."""

    def __init__(self, inputs: int = 56, width: int = 80) -> None:
        super().__init__()
        blocks = [HeadBlock(inputs, width), *(HeadBlock(width, width) for _ in range(2))]
        self.cls_stride_convs = nn.ModuleList([nn.Sequential(*blocks)])
        self.stride_cls = nn.ModuleList([_conv(width, ANCHORS)])
        self.stride_reg = nn.ModuleList([_conv(width, ANCHORS * 4)])
        self.scales = nn.ModuleList(Scale() for _ in STRIDES)

    def forward(self, levels: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for x, scale in zip(levels, self.scales, strict=True):
            y = self.cls_stride_convs[0](x)
            found.append((self.stride_cls[0](y), scale(self.stride_reg[0](y))))
        return found


class ScrfdNet(nn.Module):
    """Images [B, 3, S, S] to logits [B, 2, h, w] and distances [B, 8, h, w] of three levels."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.neck = Neck()
        self.bbox_head = Head()

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        levels: list[tuple[Tensor, Tensor]] = self.bbox_head(self.neck(self.backbone(images)))
        return levels


def decode(levels: list[tuple[Tensor, Tensor]], side: int) -> tuple[Tensor, Tensor]:
    """Anchors of all levels as boxes.

    Args:
        levels: the net's output.
        side: of the square input, in pixels.

    Returns:
        float32 scores [B, N] in [0, 1] and boxes [B, N, 4] (x0, y0, x1, y1) in input pixels,
        clipped to the input.
    """
    scores, boxes = [], []
    for stride, (logits, distances) in zip(STRIDES, levels, strict=True):
        batch, _, height, width = logits.shape
        scores.append(logits.float().sigmoid().permute(0, 2, 3, 1).reshape(batch, -1))
        reach = distances.float().permute(0, 2, 3, 1).reshape(batch, -1, 4) * stride
        centres = _centres(height, width, stride, logits.device)
        corners = torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], dim=-1)
        boxes.append(corners.clamp(0, side))
    return torch.cat(scores, dim=1), torch.cat(boxes, dim=1)


def _centres(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """[h * w * ANCHORS, 2] (x, y); the anchors of a cell share its centre."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([x, y], dim=-1).reshape(-1, 2).repeat_interleave(ANCHORS, dim=0) * stride


def suppress(scores: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression of a whole batch in one call.

    Args:
        scores: float32 [B, N].
        boxes: float32 [B, N, 4], in pixels, not negative.

    Returns:
        int64 [K], the image of each kept box, ascending, and its box [K, 4]; the boxes of an image
        in descending order of score.
    """
    image, anchor = torch.nonzero(scores > MIN_SCORE, as_tuple=True)
    found = boxes[image, anchor]
    # Images are moved apart so that their boxes never meet; float64 keeps the overlaps exact.
    apart = found.double() + (image * (boxes.amax() + 1).double())[:, None]
    kept = nms(apart, scores[image, anchor].double(), MAX_IOU)
    kept = kept[torch.argsort(image[kept], stable=True)]
    return image[kept], found[kept]


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
    def __init__(self, device: torch.device, weights: Weights) -> None:
        super().__init__()
        self.net = load(weights).to(device).eval()

    def forward(self, inputs: tuple[Tensor, Tensor]) -> list[list[list[float]]]:
        """
        Args:
            inputs: float32 images [B, 3, 224, 224] in [-1, 1], and their paddings [B, 4].

        Returns:
            for each image its boxes [x0, y0, x1, y1], relative to the unpadded image, in [0, 1],
            in descending order of score.
        """
        images, paddings = inputs
        side = images.shape[-1]
        levels = self.net(images)
        image, boxes = suppress(*decode(levels, side))
        relative = unpad(boxes, paddings[image], side).tolist()
        # Decoding turns what overflowed into no face or into a clipped one: it must be seen.
        faces: list[list[list[float]]] = [
            [] if finite else [[math.nan] * 4] for finite in _finite(levels).tolist()
        ]
        for i, box in zip(image.tolist(), relative, strict=True):
            faces[i].append(box)
        return faces


def _finite(levels: list[tuple[Tensor, Tensor]]) -> Tensor:
    """bool [B]: whether all of an image's outputs are numbers."""
    parts = [torch.isfinite(x).flatten(1).all(dim=1) for level in levels for x in level]
    return torch.stack(parts).all(dim=0)


def load(weights: Weights) -> ScrfdNet:
    net = ScrfdNet()
    with weights.used(CHECKPOINT):
        state = weights.load(CHECKPOINT)["state_dict"].items()
        net.load_state_dict({k: v for k, v in state if not k.startswith(UNUSED)})
    return net
