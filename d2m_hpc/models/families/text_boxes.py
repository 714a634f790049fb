"""Text in pictures, by PP-OCR's detector."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from d2m_hpc.models.family import Between, Family, Output, Use, shipped_by
from d2m_hpc.models.inputs import OwnInput

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

TALLEST, WIDEST = 8, 60
"""Height to width, and width to height, beyond which pictures are padded. The library makes no less
of the short side however tall a picture is, and refuses those that are too wide."""
LARGE = 1_500_000
"""Pixels given to the net that take half a gigabyte; more are for one thread at a time."""
_alone = threading.Lock()
Detected = tuple[int, float, list[list[float]]]
Share = Annotated[float, Between(0.001, 0.999)]


class TextBoxes(Family):
    """Boxes around text in the image, how many, and the share of the image that they cover.

    A box is the corners [x0, y0, ..., x3, y3] of a tilted rectangle, as fractions of the image's
    width and height, from the top left clockwise. Where boxes overlap, the area counts once.
    """

    kind: ClassVar = "text-boxes"
    presets: ClassVar = {"text-boxes-ppocr": {}}
    packages: ClassVar = {"rapidocr_onnxruntime": "d2m_hpc[text-boxes]"}
    to_device: ClassVar = False

    limit_side_len: Annotated[int, Between(32, 4096)] = 736
    """pixels to which a shorter side is brought; time and memory grow with the square"""
    thresh: Share = 0.3
    """probability from which a pixel is one of text"""
    box_thresh: Share = 0.5
    """mean probability from which a box is kept"""
    unclip_ratio: Annotated[float, Between(0.1, 10)] = 1.6
    """how far a box reaches beyond the text's core"""

    def inputs(self, use: Use) -> list[Any]:
        return [OwnInput("image", f"{__name__}:detector", **self.model_dump())]

    def outputs(self, use: Use) -> list[Output]:
        return [
            Output("count", "int32"),
            Output("area", "float32"),
            Output("boxes", "list<list<float32>>"),
        ]

    def checkpoints(self, use: Use) -> list[Path]:
        """The net that the library brings along."""
        folder = shipped_by("rapidocr_onnxruntime")
        return sorted(folder.glob("models/*det*.onnx")) if folder else []

    def licence(self) -> str:
        return "Apache-2.0"

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        detector(**self.model_dump())
        # The decode threads have detected, each with a core of its own: the pictures are of many
        # sizes, so that no batch can be made of them, and the device goes on meanwhile.
        return lambda found: dict(zip(("count", "area", "boxes"), found, strict=True))


@cache
def detector(**options: Any) -> Callable[[Image], Detected]:
    """Load rapidocr with its detector's options, once a process."""
    import cv2
    import numpy as np
    from rapidocr_onnxruntime import RapidOCR

    cv2.setNumThreads(1)  # all cores decode, each thread with one picture
    given = {f"det_{name}": value for name, value in options.items()}
    made = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1, **given)
    limit = int(options["limit_side_len"])

    def detect(image: Image) -> Detected:
        own = copy(made)
        own.text_det = copy(made.text_det)  # a call leaves its picture's size in there
        pixels = _padded(np.asarray(image))[..., ::-1]
        with _alone if _pixels(pixels.shape, limit) > LARGE else nullcontext():
            boxes, _ = own(np.ascontiguousarray(pixels), use_det=True, use_cls=False, use_rec=False)
        fractions = np.asarray(boxes or [], np.float64).reshape(-1, 4, 2) / image.size
        corners = fractions.clip(0, 1)
        return len(corners), _covered(corners), corners.reshape(-1, 8).tolist()

    return detect


def _padded(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """With black at the right or below, where a side is too long for the other."""
    import numpy as np

    height, width, _ = pixels.shape
    below, right = -(-width // WIDEST) - height, -(-height // TALLEST) - width
    return np.pad(pixels, ((0, max(0, below)), (0, max(0, right)), (0, 0)))


def _pixels(shape: tuple[int, ...], limit: int) -> float:
    """About how many pixels the net is given."""
    short, long = sorted(shape[:2])
    return max(short, limit) ** 2 * long / short


def _covered(boxes: np.ndarray[Any, Any]) -> float:
    """The area that is in any of the boxes, [N, 4, 2] in fractions."""
    import shapely

    hulls = [shapely.MultiPoint(box).convex_hull for box in boxes]
    return float(shapely.union_all(hulls).area)
