"""Nets of timm, and its way to prepare images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.hub_nets import loading
from d2m_hpc.models.transfer import conv_layout


def images(**told: Any) -> Callable[[Image.Image], Tensor]:
    """Images as timm prepares them for a model, for `inputs.OwnInput`.

    Args:
        told: as `timm.data.resolve_data_config` gives it.
    """
    from timm.data import create_transform

    made: Callable[[Image.Image], Tensor] = create_transform(**told, is_training=False)
    return made


class TimmNet(nn.Module):
    """A model of timm, which computes what is wanted of it.

    Args:
        name: of the architecture, with its tag if it has one.
        path: of the checkpoint.
        told: how the model is published (timm's `pretrained_cfg`).
        given: arguments of the architecture.
        wanted: of `feature`, `scores` and `label`.
    """

    def __init__(
        self,
        device: torch.device,
        name: str,
        path: Path,
        told: Mapping[str, Any],
        given: Mapping[str, Any],
        wanted: Collection[str],
    ) -> None:
        super().__init__()
        import timm

        if not path.is_file():
            raise WeightsError(f"{path} is missing; run `d2m weights check`")
        kept = {"file": str(path), "source": "", "custom_load": path.suffix == ".npz"}
        told = {**told, **kept, "num_classes": given["num_classes"]}
        with loading(path):
            net = timm.create_model(
                name.partition(".")[0], pretrained=True, pretrained_cfg=told, **given
            )
        self.net: Any = net.to(device, memory_format=conv_layout(device)).eval()
        self.wanted = wanted

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images: float32 [B, 3, H, W], normalised.

        Returns:
            what is wanted of `feature`, float32 [B, D]; `scores`, probabilities float32
            [B, classes]; and `label`, int64 [B], the class with the highest one.
        """
        maps, found = self.net.forward_features(images), {}
        if "feature" in self.wanted:
            found["feature"] = self.net.forward_head(maps, pre_logits=True).flatten(1).float()
        if {"scores", "label"} & {*self.wanted}:
            found["scores"] = self.net.forward_head(maps).float().softmax(dim=1)
            found["label"] = found["scores"].argmax(dim=1)
        return found
