"""The net of SCRFD-10G (Guo et al., 2021, arXiv:2105.04714), named as its checkpoint's keys are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (8, 16, 32)
ANCHORS = 2
Level = tuple[Tensor, Tensor]
"""Of each cell of a stride and its two anchors: logits of a face [B, 2, h, w], and the distances
[B, 8, h, w] of its left, top, right and bottom from the cell's centre, in strides."""


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

    def forward(self, levels: list[Tensor]) -> tuple[Level, ...]:
        found = []
        for x, scale in zip(levels, self.scales, strict=True):
            y = self.cls_stride_convs[0](x)
            found.append((self.stride_cls[0](y), scale(self.stride_reg[0](y))))
        return tuple(found)


class ScrfdNet(nn.Module):
    """Images [B, 3, S, S] to a `Level` for each of `STRIDES`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.neck = Neck()
        self.bbox_head = Head()

    def forward(self, images: Tensor) -> tuple[Level, ...]:
        levels: tuple[Level, ...] = self.bbox_head(self.neck(self.backbone(images)))
        return levels
