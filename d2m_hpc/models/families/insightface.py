"""Faces by insightface's model packs."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from d2m_hpc.models.family import Between, Family, Output, ParameterError, Use, at_hand, here
from d2m_hpc.models.inputs import OwnInput
from d2m_hpc.models.published import Checkpoint

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

NAME = re.compile(r"\w[\w.+-]{0,99}")
_ENDS = (".onnx", ".json", ".yaml", ".yml", ".txt")
"""Of files that a pack's nets need."""
WIDTH = 512
"""Numbers of an embedding."""
_NETS = {"embedding": "recognition", "sex": "genderage", "age": "genderage"}
"""What a pack must have beside its detector, by output."""
_RELEASE = "https://github.com/deepinsight/insightface/releases/download/v0.7"
_PACKS = {
    "buffalo_l": "80ffe37d8a5940d59a7384c201a2a38d4741f2f3c51eef46ebb28218a7b0ca2f",
    "buffalo_m": "d98264bd8f2dc75cbc2ddce2a14e636e02bb857b3051c234b737bf3b614edca9",
    "buffalo_s": "d85a87f503f691807cd8bb97128bdf7a0660326cd9cd02657127fa978bab8b5e",
    "buffalo_sc": "57d31b56b6ffa911c8a73cfc1707c73cab76efe7f13b675a05223bf42de47c72",
    "antelopev2": "8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
}
"""The packs of that release, and the sha256 of their zips, as others who fetch them have noted."""
LARGEST = 4 << 30
"""Bytes of all files of a pack."""
MOST = 50
"""Files of a pack."""
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
    """a model pack, as a folder of `.onnx` files or zipped as it is published: its path, or its
    name in the weights folder; insightface's own are fetched: `buffalo_l`, `buffalo_m`,
    `buffalo_s`, `buffalo_sc`, `antelopev2`"""
    det_size: Annotated[int, Between(32, 4096), Field(multiple_of=32)] = 640
    """side of the square that the detector is given"""
    det_thresh: Annotated[float, Between(0.001, 0.999)] = 0.5
    """score from which a face is one"""

    def inputs(self, use: Use) -> list[Any]:
        options = self.model_dump() | {"pack": str(self._place(use))}
        wanted = " ".join(sorted(use.wanted))
        return [OwnInput("image", f"{__name__}:finder", wanted=wanted, **options)]

    def outputs(self, use: Use) -> list[Output]:
        place = self._place(use)
        try:
            # One of insightface's own is known by its hash; a damaged one is to be fetched again.
            found = place.is_dir() or self._published or (place.is_file() and files_of(place))
        except ValueError as error:
            raise ParameterError("pack", f"{place}: {error}") from None
        if not found or (place.is_dir() and not any(place.glob("*.onnx"))):
            what = at_hand(self.pack) or f"the weights folder's {self.pack}"
            what = f"{what} is no folder of .onnx files, nor a zip of them{here(self.pack)}"
            raise ParameterError("pack", f"{what}; insightface's own are {', '.join(_PACKS)}")
        return [
            Output("boxes", "list<list<float32>>"),
            Output("scores", "list<float32>"),
            Output("landmarks", "list<list<float32>>"),
            Output("sex", "list<string>"),
            Output("age", "list<int32>"),
            Output("embedding", shape=(WIDTH,)),
        ]

    def checkpoints(self, use: Use) -> list[Checkpoint | Path]:
        place = self._place(use)
        return [self._published if self._published and not place.is_dir() else place]

    def licence(self) -> str:
        return "insightface's own packs are for non-commercial research only"

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.checkpoint import Weights
        from d2m_hpc.models.onnx_session import providers

        [given] = self.inputs(use)
        with Weights(use.folder).used(str(self._place(use))):
            _loaded[given.options] = load(providers(device), **dict(given.options))
        # The decode threads have found the faces, each its own picture's: insightface takes one
        # picture at a time, and many threads keep a GPU busier than this one could.
        names = sorted(use.wanted)
        return lambda found: dict(zip(names, found, strict=True))

    @property
    def _published(self) -> Checkpoint | None:
        name = f"{self.pack}.zip"
        known = self.pack in _PACKS
        return Checkpoint(name, f"{_RELEASE}/{name}", _PACKS[self.pack]) if known else None

    def _place(self, use: Use) -> Path:
        """The folder, or the zip where there is none."""
        given = at_hand(self.pack) or use.folder / self.pack
        zipped = given.with_name(f"{given.name}.zip")
        return zipped if not given.exists() and (self._published or zipped.exists()) else given


def finder(**options: Any) -> Callable[[Image], tuple[Any, ...]]:
    """What `build` has loaded on the model's device; without one, on the CPU."""
    key = tuple(sorted(options.items()))
    with _loading:
        if key not in _loaded:
            _loaded[key] = load(["CPUExecutionProvider"], **options)
    return _loaded[key]


def _settle() -> None:
    """Let OpenCV take one thread, as all cores decode, each thread with one picture; and hide what
    scikit-image says of insightface's calls, which no user can mend."""
    import warnings

    import cv2

    cv2.setNumThreads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="insightface")


def load(
    providers: list[Any], pack: str, det_size: int, det_thresh: float, wanted: str
) -> Callable[[Image], tuple[Any, ...]]:
    """Load a pack, less the nets whose outputs are not asked for.

    Raises:
        ValueError: it has no net for one that is.
    """
    import numpy as np
    from insightface.app import FaceAnalysis

    from d2m_hpc.models.onnx_session import options

    _settle()
    names = wanted.split()
    nets = {_NETS[name] for name in names if name in _NETS}
    with _unpacked(Path(pack)) as folder:
        app = FaceAnalysis(
            name=str(folder),
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


def files_of(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The files of a zipped pack by their names, whatever folder of the zip they are in.

    Raises:
        ValueError: it is no zip of a pack, or takes too much space.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if e.filename.endswith(_ENDS)]
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"it cannot be read as a zip ({error}); fetch it again") from None
    found = {PurePosixPath(entry.filename).name: entry for entry in entries}
    found = {name: entry for name, entry in found.items() if NAME.fullmatch(name)}
    if not any(name.endswith(".onnx") for name in found) or len(entries) > MOST:
        raise ValueError(f"it holds no pack of up to {MOST} files with nets (.onnx)")
    if (size := sum(entry.file_size for entry in found.values())) > LARGEST:
        raise ValueError(f"it holds {size:,} bytes; valid are up to {LARGEST:,}")
    return found


@contextmanager
def _unpacked(pack: Path) -> Iterator[Path]:
    """The folder of a pack, which is removed afterwards where the pack is zipped."""
    if pack.is_dir():
        yield pack
        return
    with (
        tempfile.TemporaryDirectory(prefix="d2m-pack-") as folder,
        zipfile.ZipFile(pack) as archive,
    ):
        for name, entry in files_of(pack).items():
            with archive.open(entry) as source, open(Path(folder, name), "wb") as target:
                shutil.copyfileobj(source, target)
        yield Path(folder)


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
