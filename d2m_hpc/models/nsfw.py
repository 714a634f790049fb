"""NSFW score of images: DataComp's classifier on CLIP ViT-L/14 features (arXiv:2304.14108)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from d2m_hpc.models.checkpoint import Weights, state_of

CHECKPOINT = "nsfw_torch.pt"
EPSILON = torch.finfo(torch.float32).tiny
"""None, to a float32 variance of any size that is met; torch 2.10 and 2.11 refuse 0 itself."""


class NsfwImage(nn.Module):
    def __init__(self, device: torch.device, weights: Weights) -> None:
        super().__init__()
        self.head = head()
        with weights.used(CHECKPOINT):
            self.head.load_state_dict(state_of(weights.load(CHECKPOINT)))
        self.head.to(device).eval()

    def forward(self, features: Tensor) -> Tensor:
        """
        Args:
            features: [B, 768], CLIP ViT-L/14's of the images.

        Returns:
            float32 [B], in [0, 1].
        """
        features = features.float()
        # In half precision an overflow would end in the sigmoid as a score of 1, and pass.
        with torch.autocast(features.device.type, enabled=False):
            scores: Tensor = self.head(features).squeeze(1)
        return scores


def head() -> nn.Sequential:
    """The net, named as its checkpoint's keys are."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm1d(768, eps=EPSILON),
            dense=nn.Linear(768, 64),
            relu=nn.ReLU(),
            dense1=nn.Linear(64, 512),
            relu1=nn.ReLU(),
            dense2=nn.Linear(512, 256),
            relu2=nn.ReLU(),
            dense3=nn.Linear(256, 1),
            sigmoid=nn.Sigmoid(),
        )
    )
