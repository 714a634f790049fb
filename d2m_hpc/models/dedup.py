"""Near-duplicates: the ISC21 descriptor (Yokoo, 2021, arXiv:2112.04323).

Weights and architecture: github.com/lyakaap/ISC21-Descriptor-Track-1st.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m_hpc.models.checkpoint import Weights, fill, state_of
from d2m_hpc.models.transfer import cast_early, conv_layout

CHECKPOINT = "isc_ft_v107.pth.tar"
REFERENCES = "eval_dedup_embeddings.pt"
RENAMED = {"tf_efficientnetv2_m_in21ft1k": "tf_efficientnetv2_m.in21k_ft_in1k"}
"""timm's names of today for those in the checkpoint."""


class IscNet(nn.Module):
    """Backbone, GeM pooling with p = 1, linear projection, batch norm."""

    def __init__(self, arch: str, width: int = 256) -> None:
        super().__init__()
        import timm

        self.backbone: Any = timm.create_model(
            RENAMED.get(arch, arch), features_only=True, pretrained=False
        )
        self.fc = nn.Linear(self.backbone.feature_info.channels()[-1], width, bias=False)
        self.bn = nn.BatchNorm1d(width)

    def forward(self, images: Tensor) -> Tensor:
        """Descriptors [B, 256] of images [B, 3, 512, 512]; not normalised."""
        pooled = self.backbone(images)[-1].clamp(min=1e-6).mean(dim=(2, 3))
        descriptors: Tensor = self.bn(self.fc(pooled))
        return descriptors


class IscFtV107(nn.Module):
    def __init__(self, device: torch.device, weights: Weights) -> None:
        super().__init__()
        self.layout = conv_layout(device)
        self.net = load(weights).to(device).to(memory_format=self.layout).eval()
        with weights.used(REFERENCES):
            references = weights.load(REFERENCES).float().t().contiguous()
        self.references = references.to(device)

    @property
    def image_net(self) -> nn.Module:
        """What may be compiled: its shapes are fixed."""
        net: nn.Module = self.net
        return net

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: float32 [B, 3, 512, 512], in [-1, 1].

        Returns:
            float32 [B, 256], each row of length 1, and float32 [B]: the largest dot product with
            a reference embedding.
        """
        laid_out = cast_early(images).contiguous(memory_format=self.layout)
        descriptors = F.normalize(self.net(laid_out).float(), dim=1)
        with torch.autocast(descriptors.device.type, enabled=False):
            return descriptors, (descriptors @ self.references).amax(dim=1)


def load(weights: Weights) -> IscNet:
    """Build the net that the checkpoint's own `arch` names."""
    with weights.used(CHECKPOINT):
        content = weights.load(CHECKPOINT)
        net = IscNet(content["arch"])
        fill(net, state_of(content))
    return net
