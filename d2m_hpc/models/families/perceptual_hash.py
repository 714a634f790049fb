"""Perceptual hashes of images."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from d2m_hpc.models.family import Family, Output, ParameterError, Use
from d2m_hpc.models.inputs import OwnInput

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, device

_PDQ = frozenset({"pdq", "pdq-quality"})


class PerceptualHash(Family):
    """Hashes of which near-duplicates differ in few bits: phash (64 bits) and PDQ (256 bits)."""

    kind: ClassVar = "perceptual-hash"

    def inputs(self, use: Use) -> list[Any]:
        needed: list[Any] = [("image", "stats-aug")] if "phash" in use.wanted else []
        if use.wanted & _PDQ:
            if find_spec("pdqhash") is None:
                what = "PDQ needs pdqhash, which is not installed; `pip install 'd2m_hpc[pdq]'`"
                raise ParameterError("kind", what)
            needed.append(OwnInput("image", f"{__name__}:pdq"))
        return needed

    def outputs(self, use: Use) -> list[Output]:
        return [
            Output("phash", "string"),
            Output("pdq", "string"),
            Output("pdq-quality", "int32"),
        ]

    def build(self, use: Use, device: device) -> Callable[..., Any]:
        return Hashes(device, use)


class Hashes:
    """phash on the device; the decode threads have computed PDQ, from pictures of many sizes."""

    def __init__(self, device: device, use: Use) -> None:
        from d2m_hpc.models.checkpoint import Weights
        from d2m_hpc.models.stats import ImageStats

        self._stats = ImageStats(device, Weights(use.folder))
        self._wanted = use.wanted

    def __call__(self, *inputs: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if "phash" in self._wanted:
            found["phash"] = self._stats.hashes(inputs[0])
        if self._wanted & _PDQ:
            found["pdq"], found["pdq-quality"] = inputs[-1]
        return found

    def on_host(self, output: dict[str, Any]) -> dict[str, Any]:
        from d2m_hpc.models.stats import as_hex

        bits: Tensor | None = output.get("phash")
        return output if bits is None else {**output, "phash": as_hex(bits)}


def pdq() -> Callable[[Image], tuple[str, int]]:
    """PDQ's hash of a picture in hexadecimal digits, and its quality in [0, 100]."""
    import numpy as np
    import pdqhash

    def hashed(image: Image) -> tuple[str, int]:
        bits, quality = pdqhash.compute(np.asarray(image))
        return np.packbits(bits.astype(bool)).tobytes().hex(), int(quality)

    return hashed
