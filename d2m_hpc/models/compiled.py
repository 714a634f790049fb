"""Compile image nets, whose shapes are fixed, for batches of one size (`compile`)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from d2m_hpc.models.transfer import each

log = logging.getLogger(__name__)

PAYS_AFTER = 100
"""Full batches after which `compile: auto` compiles. On an H200 the descriptor's net took 24 s to
compile, and then half of its time (measured at 224 pixels: 37 ms in place of 74 for 512). A task
that has run so long loses little if it ends soon, and gains if it goes on."""


def is_convolutional(net: nn.Module) -> bool:
    """Whether compiling saves much: norms and activations then take no passes of their own through
    memory. Transformers spend their time in products, which stay as they are."""
    return any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def _padded(images: Tensor, rows: int) -> Tensor:
    """So many images, that lie in memory as these do: other strides would be compiled anew."""
    if len(images) == rows:
        return images
    shape, device = (rows, *images.shape[1:]), images.device
    made = torch.empty_strided(shape, images.stride(), dtype=images.dtype, device=device)
    made[: len(images)] = images
    made[len(images) :] = images[:1]
    return made


def compile_for(
    rows: int, net: nn.Module, backend: Any = "inductor", after: int = 0, need: bool = True
) -> None:
    """Compile a net in place, at a batch of so many rows.

    A batch that is more than half full, as the last one of many shards, is padded, whose rows the
    net computes one by one. Smaller ones (halves after running out of memory, rows that are run
    again) go through the net as it was: each new shape would be compiled for minutes. So does what
    is run at another precision than the first one.

    Args:
        after: full batches that are run first as the net was.
        need: an error of the compiler, as without a C compiler on the node, is raised; otherwise it
            is logged, and the net stays as it was.
    """
    eager = net.forward
    compiled = torch.compile(eager, dynamic=False, backend=backend)
    waiting, mixed = after, None

    def forward(images: Tensor) -> Any:
        nonlocal waiting, mixed
        now = torch.is_autocast_enabled(images.device.type)
        given = len(images)
        if not (given == rows or rows // 2 + 1 < given < rows) or mixed not in (None, now):
            return eager(images)
        if waiting:
            waiting -= given == rows
            return eager(images)
        mixed = now
        try:
            made = compiled(_padded(images, rows))
            return made if given == rows else each(made, lambda part: part[:given])
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            if need:
                raise
            said = " ".join(str(error).split())[:200]
            log.warning("%s cannot be compiled and runs as it is: %s", type(net).__name__, said)
            net.forward = eager
            return eager(images)

    net.forward = forward
