"""OpenAI's CLIP in float16 outright: the same blocks, in fewer kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.clip import ClipB32, OpenClipNet
from d2m_hpc.models.half import HalfBlock, in_half, is_openai

CPU = torch.device("cpu")
QUICK = {"embed_dim": 32, "quick_gelu": True}
VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2}


def _net(**more: object) -> open_clip.CLIP:
    torch.manual_seed(0)
    made = open_clip.CLIP(**{**QUICK, "vision_cfg": VISION, "text_cfg": TEXT, **more})
    net: open_clip.CLIP = made.eval().requires_grad_(False)
    for name, parameter in net.named_parameters():  # biases begin at 0, which would hide them
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
    return net


@pytest.mark.parametrize("tower", ["visual", "text"])
@torch.no_grad()
def test_a_block_is_open_clips_but_for_rounding(tower: str) -> None:
    net = _net()
    block = (net.visual if tower == "visual" else net).transformer.resblocks[0]
    mask = net.attn_mask[:7, :7] if tower == "text" else None
    x = torch.randn(3, 7, 64)
    np.testing.assert_allclose(
        HalfBlock(block)(x, attn_mask=mask), block(x, attn_mask=mask), atol=2e-6
    )


@torch.no_grad()
def test_both_towers_in_half_are_near_those_in_float32() -> None:
    net = _net()
    half, images = in_half(net), torch.randn(5, 3, 32, 32)
    tokens = torch.randint(1, 99, (5, 77))
    assert {p.dtype for p in half.parameters()} == {torch.half}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    for ours, theirs in (
        (
            half.encode_image(images.half(), normalize=True),
            net.encode_image(images, normalize=True),
        ),
        (half.encode_text(tokens, normalize=True), net.encode_text(tokens, normalize=True)),
    ):
        np.testing.assert_allclose(ours.float(), theirs, atol=2e-3)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_block_casts_nothing_and_copies_nothing() -> None:
    block = HalfBlock(_net().visual.transformer.resblocks[0]).half()
    with _Operations() as seen:
        block(torch.randn(3, 7, 64, dtype=torch.half))
    kept = {"aten::addmm", "aten::native_layer_norm", "aten::add", "aten::silu_"}
    assert {"aten::_to_copy", "aten::copy_", "aten::clone"} & set(seen.names) == set()
    assert kept <= set(seen.names)


def _both(net: ClipB32, dtype: torch.dtype | None) -> Tensor:
    images, tokens = torch.randn(2, 3, 224, 224), torch.randint(1, 400, (2, 77))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        return torch.cat(net(images, tokens), dim=1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_only_autocast_to_float16_runs_the_half_net(
    checkpoints: Path, dtype: torch.dtype | None
) -> None:
    """Rows that overflow are computed again without autocast, in float32."""
    made = []
    for halved in (False, True):
        net = ClipB32(CPU, Weights(checkpoints))
        if halved:
            net.to_half()
        torch.manual_seed(1)
        made.append(_both(net, dtype))
    assert torch.equal(*made)


def test_the_half_net_runs_under_autocast_to_float16(checkpoints: Path) -> None:
    net = ClipB32(CPU, Weights(checkpoints))
    torch.manual_seed(1)
    exact = _both(net, None)
    net.to_half()
    net.clip = None  # whatever touches it fails
    torch.manual_seed(1)
    np.testing.assert_allclose(_both(net, torch.half), exact, atol=2e-3)


def test_nets_that_were_not_trained_in_half_stay_under_autocast() -> None:
    assert is_openai(_net())
    assert not is_openai(_net(quick_gelu=False))
    scaled = {**VISION, "ls_init_value": 0.1}
    assert not is_openai(_net(vision_cfg=scaled))
    assert not is_openai(_net(vision_cfg={**VISION, "layers": (1, 1, 1, 1)}))
    assert not OpenClipNet.trained_in_half
