"""OpenAI's CLIP, by open_clip (Radford et al., 2021, arXiv:2103.00020)."""

from __future__ import annotations

import logging
import warnings
import zipfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m_hpc.models.buckets import run_by_length
from d2m_hpc.models.checkpoint import Weights, state_of
from d2m_hpc.models.transfer import conv_layout, to_device

log = logging.getLogger(__name__)


class OpenAIClip(nn.Module):
    """Image and text features of one batch, L2-normalised."""

    checkpoint: str

    def __init__(self, device: torch.device, weights: Weights) -> None:
        super().__init__()
        self.clip = load(weights, self.checkpoint).to(device).eval()
        self.clip.visual.conv1.to(memory_format=conv_layout(device))
        self.device = device

    @property
    def image_net(self) -> nn.Module:
        """What may be compiled: its shapes are fixed."""
        net: nn.Module = self.clip.visual
        return net

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: float32 [B, 3, 224, 224], normalised.
            tokens: int64 [B, 77], on the CPU: their lengths are looked at before they are sent.

        Returns:
            float32 [B, D] of the images and of the texts, each row of length 1.
        """
        image = self.clip.encode_image(images)
        text = self._encode_text(tokens)
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def _encode_text(self, tokens: Tensor) -> Tensor:
        """The tower is causal and pools at the first end token: nothing after it is computed."""
        ends = tokens.argmax(dim=1)

        def run(rows: Tensor, length: int) -> Tensor:
            chosen = to_device(tokens[rows, :length], self.device)
            return self._encode_cut(chosen, to_device(ends[rows], self.device))

        return run_by_length(ends + 1, run, self.device)

    def _encode_cut(self, tokens: Tensor, ends: Tensor) -> Tensor:
        clip, length = self.clip, tokens.shape[1]
        x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
        x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
        pooled = clip.ln_final(x)[torch.arange(len(x), device=x.device), ends]
        features: Tensor = pooled @ clip.text_projection
        return features


class ClipB32(OpenAIClip):
    checkpoint = "ViT-B-32.pt"


class ClipL14(OpenAIClip):
    checkpoint = "ViT-L-14.pt"


def load(weights: Weights, name: str) -> Any:
    """Build the net from a published TorchScript archive, a plain state dict or a training
    checkpoint, in float32."""
    from open_clip.model import build_model_from_openai_state_dict

    with weights.used(name):
        state = _state_dict(weights, name)
        return build_model_from_openai_state_dict(state, cast_dtype=torch.float32).float()


def _state_dict(weights: Weights, name: str) -> dict[str, Tensor]:
    # The published files are TorchScript archives, which only torch.jit reads.
    if is_torchscript(weights, name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            archive = torch.jit.load(str(weights.path(name)), map_location="cpu")  # type: ignore[no-untyped-call]
        return dict(archive.state_dict())
    content = weights.load(name)
    if isinstance(content, dict) and "state_dict" in content:
        log.warning(
            "%s is a training checkpoint: its state_dict is taken for a net like OpenAI's, "
            "which has QuickGELU",
            weights.path(name),
        )
    return state_of(content)


def is_torchscript(weights: Weights, name: str) -> bool:
    try:
        with zipfile.ZipFile(weights.path(name)) as archive:
            return any(n.split("/")[-1] == "constants.pkl" for n in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
