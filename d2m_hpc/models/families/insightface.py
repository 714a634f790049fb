"""Faces by insightface's model packs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from d2m_hpc.models.family import Between, Family, Output, ParameterError, Use, at_hand
from d2m_hpc.models.inputs import OwnInput

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

WIDTH = 512
"""Numbers of an embedding."""
_NETS = {"embedding": "recognition", "sex": "genderage", "age": "genderage"}
"""What a pack must have beside its detector, by output."""
_RELEASES = "https://github.com/deepinsight/insightface/releases/tag/v0.7"
_loaded: dict[tuple[tuple[str, Any], ...], Callable[[Image], tuple[Any, ...]]] = {}
_loading = threading.Lock()


class InsightFace(Family):
    """Boxes, landmarks, sex and age of faces, and an embedding of the largest, by insightface.

    Boxes [x0, y0, x1, y1] and landmarks [x0, y0, ..., x4, y4] (eyes, nose, corners of the mouth)
    are fractions of the image's width and height, and may lie beyond it. The likeliest face is
    first.
    """

    kind: ClassVar = "insightface"
    paths: ClassVar = ("pack",)
    to_device: ClassVar = False

    pack: str
    """a folder of a model pack's `.onnx` files: its path, or its name in the weights folder"""
    det_size: Annotated[int, Between(32, 4096), Field(multiple_of=32)] = 640
    """side of the square that the detector is given"""
    det_thresh: Annotated[float, Between(0.001, 0.999)] = 0.5
    """score from which a face is one"""

    def inputs(self, use: Use) -> list[Any]:
        options = self.model_dump() | {"pack": str(self._folder(use))}
        wanted = " ".join(sorted(use.wanted))
        return [OwnInput("image", f"{__name__}:finder", wanted=wanted, **options)]

    def outputs(self, use: Use) -> list[Output]:
        if not any(self._folder(use).glob("*.onnx")):
            what = (
                f"{self._folder(use)} is no folder of .onnx files; unpack one of {_RELEASES} there"
            )
            raise ParameterError("pack", what)
        return [
            Output("boxes", "list<list<float32>>"),
            Output("scores", "list<float32>"),
            Output("landmarks", "list<list<float32>>"),
            Output("sex", "list<string>"),
            Output("age", "list<int32>"),
            Output("embedding", shape=(WIDTH,)),
        ]

    def checkpoints(self, use: Use) -> list[Path]:
        return [self._folder(use)]

    def licence(self) -> str:
        return "insightface's own packs are for non-commercial research only"

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.checkpoint import Weights
        from d2m_hpc.models.onnx_session import providers

        [given] = self.inputs(use)
        with Weights(use.folder).used(str(self._folder(use))):
            _loaded[given.options] = load(providers(device), **dict(given.options))
        # The decode threads have found the faces, each its own picture's: insightface takes one
        # picture at a time, and many threads keep a GPU busier than this one could.
        names = sorted(use.wanted)
        return lambda found: dict(zip(names, found, strict=True))

    def _folder(self, use: Use) -> Path:
        return at_hand(self.pack) or use.folder / self.pack


def finder(**options: Any) -> Callable[[Image], tuple[Any, ...]]:
    """What `build` has loaded on the model's device; without one, on the CPU."""
    key = tuple(sorted(options.items()))
    with _loading:
        if key not in _loaded:
            _loaded[key] = load(["CPUExecutionProvider"], **options)
    return _loaded[key]


def load(
    providers: list[Any], pack: str, det_size: int, det_thresh: float, wanted: str
) -> Callable[[Image], tuple[Any, ...]]:
    """Load a pack, less the nets whose outputs are not asked for.

    Raises:
        ValueError: it has no net for one that is.
    """
    import cv2
    import numpy as np
    from insightface.app import FaceAnalysis

    from d2m_hpc.models.onnx_session import options

    cv2.setNumThreads(1)  # all cores decode, each thread with one picture
    names = wanted.split()
    nets = {_NETS[name] for name in names if name in _NETS}
    app = FaceAnalysis(
        name=pack,
        allowed_modules=["detection", *sorted(nets)],
        providers=providers,
        sess_options=options(1),
    )
    if missing := nets - set(app.models):
        raise ValueError(f"it has no net for {', '.join(sorted(missing))}")
    if {"landmarks", "embedding"} & {*names} and not app.det_model.use_kps:
        raise ValueError("its detector gives no landmarks, and so no embedding")
    app.prepare(ctx_id=0, det_size=(det_size, det_size), det_thresh=det_thresh)

    def find(image: Image) -> tuple[Any, ...]:
        size = np.array(image.size, np.float32)
        pixels = np.ascontiguousarray(np.asarray(image)[..., ::-1])
        thin = max(size) >= min(size) * det_size  # a side would be none for the detector
        faces = [] if thin else _detected(app.det_model, pixels)
        for face in faces if "genderage" in nets else ():
            app.models["genderage"].get(pixels, face)
        embedding = np.zeros(WIDTH, np.float32)
        if "recognition" in nets and faces:
            largest = max(faces, key=_area)
            app.models["recognition"].get(pixels, largest)
            embedding = largest.normed_embedding.astype(np.float32)
        return tuple(embedding if n == "embedding" else _READ[n](faces, size) for n in names)

    return find


def _detected(detector: Any, pixels: Any) -> list[Any]:
    from insightface.app.common import Face

    boxes, points = detector.detect(pixels)
    points = [None] * len(boxes) if points is None else points
    pairs = zip(boxes, points, strict=True)
    return [Face(bbox=box[:4], det_score=box[4], kps=kps) for box, kps in pairs]


_READ: dict[str, Callable[[list[Any], Any], list[Any]]] = {
    "boxes": lambda faces, size: [(f.bbox / [*size, *size]).tolist() for f in faces],
    "scores": lambda faces, size: [float(f.det_score) for f in faces],
    "landmarks": lambda faces, size: [(f.kps / size).flatten().tolist() for f in faces],
    "sex": lambda faces, size: [f.sex for f in faces],
    "age": lambda faces, size: [f.age for f in faces],
}
"""How a column is read from the faces of a picture of some width and height."""


def _area(face: Any) -> float:
    x0, y0, x1, y1 = face.bbox
    return float((x1 - x0) * (y1 - y0))
