"""Settings of torch and of nets that decide in how many bits they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn


def _switches() -> list[tuple[Any, str, Any]]:
    """Where torch keeps in how many bits float32 is computed, and the value for all of them.

    Torch 2.9 has newer switches, for each kind of operation. It takes the older ones too, which
    cannot be read where they differ from the newer.
    """
    cuda, cudnn, cpu = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    older = [(cuda.matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    kinds = {cuda: ("matmul",), cudnn: ("conv", "rnn"), cpu: ("matmul", "conv", "rnn")}
    newer = [getattr(owner, kind, None) for owner, names in kinds.items() for kind in names]
    return [*older, *((n, "fp32_precision", "ieee") for n in newer if hasattr(n, "fp32_precision"))]


def use_full_float32() -> None:
    """Compute float32 in all of its bits."""
    torch.set_float32_matmul_precision("highest")
    for owner, name, value in _switches():
        setattr(owner, name, value)


@contextmanager
def restored() -> Iterator[None]:
    """Restore what a block changes of float32's precision."""
    before = []
    for owner, name, _ in _switches():
        with suppress(RuntimeError):
            before.append((owner, name, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def cast_once(model: Any) -> None:
    """Have autocast keep its casts of a net's frozen weights, as it keeps those of trainable ones.

    A class's own parameters stay as they are; NumPy reads none that is trainable.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if type(module).__module__.startswith("torch.nn."):
            for weights in module.parameters(recurse=False):
                if weights.is_floating_point() and not weights.is_inference():
                    weights.requires_grad_()
