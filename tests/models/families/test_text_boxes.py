from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from bench import run
from PIL import Image, ImageDraw, ImageFont
from rapidocr_onnxruntime import RapidOCR
from skimage import data

from d2m_hpc.models.families.text_boxes import detector

OUTPUTS = ("count", "area", "boxes")


def _columns(pictures: list[Image.Image], **parameters: Any) -> list[Any]:
    entry = {"own": {"kind": "text-boxes", **parameters}}
    keys = {"models": [entry], "postprocess_columns": [f"own-{name}" for name in OUTPUTS]}
    columns = run(keys, pictures).columns
    return [columns[f"own-{name}"] for name in OUTPUTS]


def _masked(boxes: np.ndarray, size: tuple[int, int]) -> float:
    """The share of a fine raster's points that lie in a box."""
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(0.5, size[0]), np.arange(0.5, size[1])))
    inside = np.zeros(len(x), bool)
    for box in boxes:
        sides = zip(box, np.roll(box, -1, axis=0), strict=True)
        signs = [(b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]) for a, b in sides]
        inside |= np.all([s >= 0 for s in signs], axis=0)
    return float(inside.mean())


SMALL = {"limit_side_len": 320, "box_thresh": 0.4, "unclip_ratio": 2.0}


@pytest.mark.parametrize(
    ("options", "names", "fewest"),
    [({}, ["text", "astronaut"], 5), (SMALL, ["page", "text", "coffee", "rocket"], 4)],
)
def test_boxes_are_rapidocrs(options: dict[str, Any], names: list[str], fewest: int) -> None:
    arrays = [*(getattr(data, name)() for name in names), np.zeros((40, 900), np.uint8)]
    pictures = [Image.fromarray(a).convert("RGB") for a in arrays]
    counts, areas, boxes = _columns(pictures, **options)
    given = {f"det_{name}": value for name, value in options.items()}
    library = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1, **given)
    for i, picture in enumerate(pictures):
        found, _ = library(picture, use_det=True, use_cls=False, use_rec=False)
        expected = np.asarray(found or [], np.float32).reshape(-1, 4, 2)
        ours = np.array(boxes[i], np.float32).reshape(-1, 4, 2) * picture.size
        np.testing.assert_allclose(ours, expected, atol=1e-3)
        assert counts[i] == len(expected)
        assert float(areas[i]) == pytest.approx(_masked(expected, picture.size), abs=2e-3)
    assert max(counts) >= fewest
    assert counts[-1] == 0


def test_pictures_too_long_for_the_library_have_boxes_where_the_text_is() -> None:
    pictures = [Image.new("RGB", size, "white") for size in ((300, 3000), (6400, 100))]
    for picture, place in zip(pictures, ((30, 2000), (4000, 20)), strict=True):
        ImageDraw.Draw(picture).text(place, "STATION", "black", ImageFont.load_default(60))
    counts, areas, boxes = _columns([*pictures, Image.new("RGB", (1, 5000))], limit_side_len=256)
    assert list(counts) == [1, 1, 0]
    for i, place in enumerate(([30, 2000, 290, 2070], [4000, 10, 4280, 100])):
        corners = np.array(boxes[i]).reshape(4, 2) * pictures[i].size
        found = [*corners.min(axis=0), *corners.max(axis=0)]
        np.testing.assert_allclose(found, place, atol=40)
    assert 0.01 < float(areas[0]) < 0.04


def test_threads_find_the_same_at_the_same_time() -> None:
    pictures = [Image.fromarray(a).convert("RGB") for a in (data.page(), data.text())]
    detect = detector(limit_side_len=320, thresh=0.3, box_thresh=0.5, unclip_ratio=1.6)
    alone, together = [detect(p) for p in pictures], [None] * 6

    def work(i: int) -> None:
        together[i] = detect(pictures[i % 2])  # type: ignore[call-overload]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone * 3
