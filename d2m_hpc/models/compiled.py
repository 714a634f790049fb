"""Compile image nets, whose shapes are fixed, for batches of one size (`compile`)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from d2m_hpc.models.recorded import Runner, as_it_is, image_forward
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


def _warn(net: nn.Module, error: Exception) -> None:
    said = " ".join(str(error).split())[:200]
    log.warning("%s cannot be compiled and runs as it is: %s", type(net).__name__, said)


def compile_for(
    rows: int,
    net: nn.Module,
    backend: Any = "inductor",
    after: int = 0,
    need: bool = True,
    run: Runner = as_it_is,
) -> None:
    """Compile a net in place, at a batch of so many rows.

    One that is more than half full, as the last of many shards, is padded. Smaller ones, and those
    of another precision than the first, run through the net as it was.

    Args:
        after: full batches that are run first as the net was.
        need: an error of the compiler, as without a C compiler on the node, is raised; otherwise it
            is logged, and the net stays as it was.
        run: how the net and what it is compiled to are run.
    """
    code = torch.compile(net.forward, dynamic=False, backend=backend)
    eager = image_forward(net, run)
    waiting, mixed = after, None

    def compiled(images: Tensor) -> Any:
        made = run((id(net), "compiled"), code, _padded(images, rows))
        return each(made, lambda part: part[: len(images)])

    def forward(images: Tensor) -> Any:
        nonlocal waiting, mixed
        now, is_full = torch.is_autocast_enabled(images.device.type), len(images) == rows
        is_small = not is_full and not rows // 2 + 1 < len(images) < rows
        if waiting or is_small or mixed not in (None, now):
            waiting -= bool(waiting and is_full)
            return eager(images)
        mixed = now
        try:
            return compiled(images)
        except Exception as error:
            if need or isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
                raise
            _warn(net, error)
            net.forward = eager
            return eager(images)

    net.forward = forward
