"""OpenAI's CLIP in float16 outright, in which it was trained, with few kernels a block."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUICK = 1.702
"""QuickGELU(x) = x sigmoid(1.702 x), which is SiLU(1.702 x) / 1.702."""


class HalfBlock(nn.Module):
    """A residual block of open_clip's transformer, with QuickGELU, in ten kernels.

    Autocast keeps what runs between the blocks in float32 and casts it before each product; here
    all of it is float16, half the memory to move. QuickGELU's factor lies in the weights around
    it, as `silu` is one kernel and QuickGELU is three.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention, mlp = block.attn, block.mlp
        self.heads = attention.num_heads
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.qkv = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.widen = _linear(mlp.c_fc.weight * QUICK, mlp.c_fc.bias * QUICK)
        self.narrow = _linear(mlp.c_proj.weight / QUICK, mlp.c_proj.bias)

    def get_weight_dtype(self) -> torch.dtype:
        """open_clip asks the first block for it."""
        return self.qkv.weight.dtype

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x: float16 [B, L, W].
            attn_mask: the causal one, or None: each token sees all.
        """
        rows, length, width = x.shape
        packed = self.qkv(self.ln_1(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        causal = attn_mask is not None
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, length, width))
        x = x + self.narrow(F.silu(self.widen(self.ln_2(x)), inplace=True))
        return x


def in_half(clip: Any) -> Any:
    """A copy of a net of OpenAI's in float16; the net itself stays as it is.

    >>> import open_clip
    >>> net = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).eval()
    >>> in_half(net).visual.conv1.weight.dtype
    torch.float16
    """
    made = copy.deepcopy(clip)
    for tower in _towers(made):
        tower.transformer.resblocks = nn.ModuleList(map(HalfBlock, tower.transformer.resblocks))
    return made.half().requires_grad_(False)


def is_openai(clip: Any) -> bool:
    """Whether all blocks of a net are as OpenAI's vision transformers have them."""
    blocks = [block for tower in _towers(clip) for block in tower.transformer.resblocks]
    return bool(blocks) and hasattr(clip.visual, "transformer") and all(map(_is_plain, blocks))


def _towers(clip: Any) -> list[Any]:
    return [tower for tower in (clip.visual, clip) if getattr(tower, "transformer", None)]


def _is_plain(block: Any) -> bool:
    unscaled = (isinstance(getattr(block, name, None), nn.Identity) for name in ("ls_1", "ls_2"))
    quick = type(getattr(block.mlp, "gelu", None)).__name__ == "QuickGELU"
    attention = block.attn
    return all(unscaled) and quick and isinstance(attention, nn.MultiheadAttention)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return made
