"""Toxicity of captions."""

from __future__ import annotations

from typing import Any, ClassVar

from d2m_hpc.models.family import Family, Output, Use
from d2m_hpc.models.published import Checkpoint

_NET = "multilingual_debiased-0b549669.ckpt"
_DETOXIFY = "https://github.com/unitaryai/detoxify/releases/download/v0.4-alpha"
_XLMR = "https://huggingface.co/FacebookAI/xlm-roberta-base/resolve/main"


class Toxicity(Family):
    """Toxicity of the caption in [0, 1], by Detoxify's multilingual model."""

    kind: ClassVar = "nsfw-detoxify"
    built_by: ClassVar = "d2m_hpc.models.toxicity:Detoxify"
    presets: ClassVar = {"nsfw-detoxify": {}}
    to_device: ClassVar = False

    def inputs(self, use: Use) -> list[Any]:
        return [("text", "identity")]

    def outputs(self, use: Use) -> list[Output]:
        return [Output("score", "float32", function="identity")]

    def licence(self) -> str:
        return "Apache-2.0"

    def checkpoints(self, use: Use) -> list[Checkpoint]:
        files = ("config.json", "tokenizer.json", "tokenizer_config.json")
        return [
            Checkpoint(_NET, f"{_DETOXIFY}/{_NET}", "0b549669"),
            *(Checkpoint(f"xlm-roberta-base/{file}", f"{_XLMR}/{file}") for file in files),
        ]
