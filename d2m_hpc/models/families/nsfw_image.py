"""DataComp's NSFW score of images."""

from __future__ import annotations

from typing import ClassVar

from d2m_hpc.models.family import Family, Output, Use
from d2m_hpc.models.published import DATASET2METADATA, Checkpoint

_FILE = "nsfw_torch.pt"
_SHA256 = "3c97d5478477c181bfa29a33e6933f710c8ec587e3c3551ff855e293acdaf390"


class NsfwOfClip(Family):
    """NSFW score of the image in [0, 1], of OpenAI's ViT-L/14 features."""

    kind: ClassVar = "nsfw-image"
    built_by: ClassVar = "d2m_hpc.models.nsfw:NsfwImage"
    presets: ClassVar = {"nsfw-image-oai-clip-vit-l-14": {}}
    prefixes: ClassVar = {"nsfw-image-oai-clip-vit-l-14": "nsfw-image"}

    def reads(self) -> list[str]:
        return ["oai-clip-vit-l14-image"]

    def outputs(self, use: Use) -> list[Output]:
        return [Output("score", "float32", function="identity")]

    def checkpoints(self, use: Use) -> list[Checkpoint]:
        return [Checkpoint(_FILE, f"{DATASET2METADATA}/{_FILE}", _SHA256)]
