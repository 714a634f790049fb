"""How well a caption fits its image, by checkpoints of BLIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from d2m_hpc.models.family import Output, Tokens, Use
from d2m_hpc.models.hub_family import HubFamily

if TYPE_CHECKING:
    import torch


class ImageTextMatching(HubFamily):
    """The probability that the caption belongs to the image, by BLIP's matching head."""

    kind: ClassVar = "image-text-matching"
    presets: ClassVar = {"blip-itm": {"checkpoint": "Salesforce/blip-itm-base-coco"}}
    on_host: ClassVar = ("text",)

    max_tokens: Tokens | None = None
    """tokens of a caption that are read; by default as many as the checkpoint takes"""

    def inputs(self, use: Use) -> list[Any]:
        return [self.image(use), self.text(use, most=self.max_tokens)]

    def outputs(self, use: Use) -> list[Output]:
        self.document(use)
        return [Output("score", "float32")]

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.hub_nets import Matcher

        return Matcher(device, self.home(use))
