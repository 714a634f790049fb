"""Classes of images, by checkpoints of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from d2m_hpc.models.family import Output, Use
from d2m_hpc.models.hub_family import HubFamily

if TYPE_CHECKING:
    import torch


class ImageClassification(HubFamily):
    """Scores of the image's classes, a column for each label of the checkpoint."""

    kind: ClassVar = "image-classification"
    presets: ClassVar = {"nsfw-falconsai": {"checkpoint": "Falconsai/nsfw_image_detection"}}

    def inputs(self, use: Use) -> list[Any]:
        return [self.image(use)]

    def outputs(self, use: Use) -> list[Output]:
        return self.scores(use)

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.hub_nets import Classifier

        auto = "AutoModelForImageClassification"
        return Classifier(device, self.home(use), auto, self.labels(use))
