"""Faces in images."""

from __future__ import annotations

from typing import Any, ClassVar

from d2m_hpc.models.family import Family, Output, Use
from d2m_hpc.models.published import DATASET2METADATA, Checkpoint

_FILE = "scrfd_10g.pt"
_SHA256 = "963570df5e0ebf6bb313239d0f9f3f0c096c1ff6937e8e28e45abad4d8b1d5c7"


class Faces(Family):
    """Boxes of faces, [x0, y0, x1, y1] as fractions of the image, by SCRFD-10G."""

    kind: ClassVar = "faces-scrfd10g"
    built_by: ClassVar = "d2m_hpc.models.faces:Scrfd10G"
    presets: ClassVar = {"faces-scrfd10g": {}}
    prefixes: ClassVar = {"faces-scrfd10g": "face"}

    def inputs(self, use: Use) -> list[Any]:
        return [("image", "faces-aug")]

    def outputs(self, use: Use) -> list[Output]:
        options = {"to_cpu": False}
        return [Output("boxes", "list<list<float32>>", function="identity", options=options)]

    def licence(self) -> str:
        return "of insightface: non-commercial research only"

    def checkpoints(self, use: Use) -> list[Checkpoint]:
        return [Checkpoint(_FILE, f"{DATASET2METADATA}/{_FILE}", _SHA256)]
