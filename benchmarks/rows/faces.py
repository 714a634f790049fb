"""Rows of the faces' post-processing: from the net's raw outputs to boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks import baseline
from benchmarks.harness import Row, Setting, Sides, timed
from d2m_hpc.models.faces import Boxes, detect
from d2m_hpc.models.scrfd import ANCHORS, STRIDES, Level

SIDE = 224
BATCH = 64
Levels = list[Level]


def raw_outputs(batch: int, most: int, empty: float) -> Levels:
    """What SCRFD gives for made-up faces: about ten anchors answer to each, almost none else.

    Args:
        most: faces of an image; their number is uniform from 1 on.
        empty: share of the images without any.

    Returns:
        logits [batch, 2, h, w] and distances [batch, 8, h, w] (in strides) of three levels.
    """
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, most + 1, (batch,), generator=generator)
    counts *= torch.rand(batch, generator=generator) >= empty
    size = 12 * 10 ** torch.rand(batch, most, generator=generator)
    centre = torch.rand(batch, most, 2, generator=generator) * SIDE
    peak = 1 + torch.randn(batch, most, generator=generator)
    peak[torch.arange(most) >= counts[:, None]] = -torch.inf
    return [_level(stride, centre, size, peak, generator) for stride in STRIDES]


def _level(
    stride: int, centre: Tensor, size: Tensor, peak: Tensor, generator: torch.Generator
) -> Level:
    """Each anchor speaks of the face that it would score highest."""
    batch, cells = len(centre), SIDE // stride
    y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    at = torch.stack([x, y], -1).reshape(-1, 2).repeat_interleave(ANCHORS, 0) * float(stride)
    away = (at[None, :, None] - centre[:, None]).norm(dim=-1) / size[:, None]
    unlike = (size / (6 * stride)).log2().abs()
    best = (peak[:, None] - 30 * away**2 - unlike[:, None]).max(dim=-1)
    noise = torch.randn(best.values.shape, generator=generator)
    logits = torch.maximum(best.values + noise / 3, noise - 6)
    face = best.indices[..., None].expand(-1, -1, 2)
    offset = at - centre.gather(1, face)
    half = size.gather(1, best.indices)[..., None] / 2
    jitter = 1 + torch.randn((*best.values.shape, 4), generator=generator) / 12
    distances = torch.cat([half + offset, half - offset], -1) * jitter / stride
    shape = (batch, cells, cells, -1)
    return logits.view(shape).permute(0, 3, 1, 2), distances.reshape(shape).permute(0, 3, 1, 2)


def require_same(ours: list[Boxes], theirs: list[Boxes]) -> int:
    """How many boxes both sides found.

    Raises:
        RuntimeError: they differ by more than rounding, in number, order or place.
    """
    if [len(boxes) for boxes in ours] != [len(boxes) for boxes in theirs]:
        raise RuntimeError("the two sides found different numbers of faces")
    flat, expected = (
        torch.tensor([box for boxes in side for box in boxes]) for side in (ours, theirs)
    )
    if not torch.allclose(flat, expected, rtol=0, atol=1e-6):
        raise RuntimeError("the two sides found different boxes")
    return len(flat)


@contextmanager
def post_processing(setting: Setting, most: int, empty: float) -> Iterator[Sides]:
    """Decoding, threshold, suppression and unpadding of a batch of 64.

    Ours in one thread, as in a task whose nets run on a GPU.
    """
    levels = raw_outputs(BATCH, most, empty)
    paddings = torch.tensor([0.0, 0.125, 0.0, 0.125]).expand(BATCH, 4)
    ours = partial(_in_one_thread, levels, paddings)
    theirs = partial(baseline.faces, levels, paddings, SIDE)
    boxes = require_same(ours(), theirs())
    if not boxes:
        raise RuntimeError("there are no faces to compare")

    def several(work: Callable[[], list[Boxes]]) -> float:
        """A batch takes milliseconds: many make a figure."""
        rounds = setting.size(20, 1)
        return timed(lambda: [work() for _ in range(rounds)]) / rounds

    yield Sides(lambda: several(ours), lambda: several(theirs), more={"boxes": boxes})


def _in_one_thread(levels: Levels, paddings: Tensor) -> list[Boxes]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return detect(levels, paddings, SIDE)
    finally:
        torch.set_num_threads(threads)


ROWS = (
    Row(
        "faces-sparse",
        "faces of 64 images, most without any",
        10,
        partial(post_processing, most=3, empty=0.6),
    ),
    Row(
        "faces-crowded",
        "faces of 64 images, up to 12 in each",
        10,
        partial(post_processing, most=12, empty=0.0),
    ),
)
