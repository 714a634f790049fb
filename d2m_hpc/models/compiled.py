"""Compile image nets, whose shapes are fixed, for batches of one size (`compile: true`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def compile_for(rows: int, net: nn.Module, backend: Any = "inductor") -> None:
    """Compile a net in place, at its first batch of so many rows.

    Batches of other sizes (a shard's last one, halves after running out of memory, rows that are
    run again) go through the net as it was: each new shape would be compiled for minutes.
    """
    eager = net.forward
    compiled = torch.compile(eager, dynamic=False, backend=backend)

    def forward(images: Tensor) -> Any:
        return compiled(images) if len(images) == rows else eager(images)

    net.forward = forward
