"""Classes of captions, by checkpoints of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from d2m_hpc.models.family import Output, Tokens, Use
from d2m_hpc.models.hub_family import HubFamily

if TYPE_CHECKING:
    import torch


class TextClassification(HubFamily):
    """Scores of the caption's classes, a column for each label of the checkpoint."""

    kind: ClassVar = "text-classification"
    on_host: ClassVar = ("text",)

    max_tokens: Tokens | None = None
    """tokens of a caption that are read; by default as many as the checkpoint takes"""

    def inputs(self, use: Use) -> list[Any]:
        return [self.text(use, most=self.max_tokens)]

    def outputs(self, use: Use) -> list[Output]:
        return self.scores(use)

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.hub_nets import Classifier

        auto = "AutoModelForSequenceClassification"
        return Classifier(device, self.home(use), auto, self.labels(use))
