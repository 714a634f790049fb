"""OpenAI's CLIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from d2m_hpc.models.family import Family, Output, Use
from d2m_hpc.models.published import Checkpoint

if TYPE_CHECKING:
    import torch

_SHA256 = {
    "ViT-B-32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-L-14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
}
_WIDTH = {"ViT-B-32": 512, "ViT-L-14": 768}


class OaiClip(Family):
    """OpenAI's CLIP as DataComp used it: features of image and text, and their cosine."""

    kind: ClassVar = "oai-clip"
    presets: ClassVar = {
        "oai-clip-vit-b32": {"net": "ViT-B-32"},
        "oai-clip-vit-l14": {"net": "ViT-L-14"},
    }
    on_host: ClassVar = ("text",)

    net: Literal["ViT-B-32", "ViT-L-14"]
    """the architecture"""

    def inputs(self, use: Use) -> list[Any]:
        return [("image", "clip-aug"), ("text", "clip-tokens")]

    def outputs(self, use: Use) -> list[Output]:
        shape = (_WIDTH[self.net],)
        return [
            Output("score", "float32", function="batched_dot_product"),
            Output("image", shape=shape, options={"index": 0}, of_text=False),
            Output("text", shape=shape, options={"index": 1}),
        ]

    def licence(self) -> str:
        return "MIT"

    def checkpoints(self, use: Use) -> list[Checkpoint]:
        name, sha256 = f"{self.net}.pt", _SHA256[self.net]
        url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}"
        return [Checkpoint(name, url, sha256)]

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models import clip
        from d2m_hpc.models.checkpoint import Weights

        made = {"ViT-B-32": clip.ClipB32, "ViT-L-14": clip.ClipL14}[self.net]
        return made(device, Weights(use.folder))
