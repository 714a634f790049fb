"""Statistics of images and captions, which need no checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from d2m_hpc.models.family import Family, Output, Use


def _columns(names: str, kinds: Sequence[str]) -> list[Output]:
    return [
        Output(name, kind, options={"index": i})
        for i, (name, kind) in enumerate(zip(names.split(), kinds, strict=True))
    ]


class StatsOfImage(Family):
    """Brightness, contrast, sharpness, entropy, perceptual hash and histogram of the image."""

    kind: ClassVar = "image-stats"
    built_by: ClassVar = "d2m_hpc.models.stats:ImageStats"
    presets: ClassVar = {"image-stats": {}}
    prefixes: ClassVar = {"image-stats": "image"}

    def inputs(self, use: Use) -> list[Any]:
        return [("image", "stats-aug")]

    def outputs(self, use: Use) -> list[Output]:
        names = "brightness contrast sharpness entropy phash"
        columns = _columns(names, [*["float32"] * 4, "string"])
        return [*columns, Output("histogram", shape=(48,), options={"index": 5})]


class StatsOfText(Family):
    """Characters and words of the caption, and shares of kinds of them."""

    kind: ClassVar = "text-stats"
    built_by: ClassVar = "d2m_hpc.models.stats:TextStats"
    presets: ClassVar = {"text-stats": {}}
    prefixes: ClassVar = {"text-stats": "text"}
    to_device: ClassVar = False

    def inputs(self, use: Use) -> list[Any]:
        return [("text", "identity")]

    def outputs(self, use: Use) -> list[Output]:
        names = "characters words alphanumeric-ratio uppercase-ratio digit-ratio unique-word-ratio"
        return _columns(names, ["int64", "int64", *["float32"] * 4])
