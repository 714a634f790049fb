"""Descriptors for near-duplicates."""

from __future__ import annotations

from typing import Any, ClassVar

from d2m_hpc.models.family import Family, Output, Use
from d2m_hpc.models.published import DATASET2METADATA, Checkpoint

_NET, _REFERENCES = "isc_ft_v107.pth.tar", "eval_dedup_embeddings.pt"
_ISC = "https://github.com/lyakaap/ISC21-Descriptor-Track-1st/releases/download/v1.0.1"
_SHA256 = "18aeb08e1d53638761e05ac95254a2ef49653bfdb59a631c9304117ceef23d14"


class Dedup(Family):
    """ISC21's descriptor, and how near it is to the images of DataComp's evaluation sets."""

    kind: ClassVar = "dedup-isc-ft-v107"
    built_by: ClassVar = "d2m_hpc.models.dedup:IscFtV107"
    presets: ClassVar = {"dedup-isc-ft-v107": {}}

    def inputs(self, use: Use) -> list[Any]:
        return [("image", "dedup-aug")]

    def outputs(self, use: Use) -> list[Output]:
        return [
            Output("score", "float32", options={"index": 1}),
            Output("image", shape=(256,), options={"index": 0}),
        ]

    def checkpoints(self, use: Use) -> list[Checkpoint]:
        return [
            Checkpoint(_NET, f"{_ISC}/{_NET}"),
            Checkpoint(_REFERENCES, f"{DATASET2METADATA}/{_REFERENCES}", _SHA256),
        ]
