from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import run
from insightface.app import FaceAnalysis
from kit import photographs, write_config
from PIL import Image
from torch import Tensor, nn

from d2m_hpc.config import load
from d2m_hpc.errors import ConfigError, WeightsError
from d2m_hpc.models.families import insightface
from d2m_hpc.models.families.insightface import InsightFace, _unpacked, files_of
from d2m_hpc.models.family import ParameterError, Use
from d2m_hpc.models.published import Checkpoint

SIDE = 160
COLUMNS = ("boxes", "scores", "landmarks", "sex", "age")


class _Detector(nn.Module):
    """Scores, boxes and landmarks of two anchors a cell, at three strides, as SCRFD's nets."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3, 30, s, s) for s in (8, 16, 32))
        for level in self.levels:
            nn.init.normal_(level.weight, std=0.02)
            nn.init.constant_(level.bias, 2.0)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = [level(x)[0].permute(1, 2, 0).reshape(-1, 15) for level in self.levels]
        scores = [(row[:, :1] * 4 - 9).sigmoid() for row in rows]
        return (*scores, *(row[:, 1:5] for row in rows), *(row[:, 5:] for row in rows))


class _Flat(nn.Module):
    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3 * (side // 8) ** 2, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found


def _export(net: nn.Module, path: Path, side: int) -> None:
    with warnings.catch_warnings(action="ignore"):  # of the exporter by tracing
        example = torch.zeros(1, 3, side, side)
        torch.onnx.export(net.eval(), (example,), str(path), dynamo=False, opset_version=17)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random pack in the layout of buffalo_l."""
    folder = tmp_path_factory.mktemp("weights") / "small"
    folder.mkdir()
    torch.manual_seed(1)
    _export(_Detector(), folder / "det_10g.onnx", SIDE)
    _export(_Flat(112, 512), folder / "w600k_r50.onnx", 112)
    _export(_Flat(96, 3), folder / "genderage.onnx", 96)
    return folder


def _theirs(pack: Path, picture: Image.Image) -> list[Any]:
    app = FaceAnalysis(name=str(pack), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=0, det_size=(SIDE, SIDE))
    return app.get(np.ascontiguousarray(np.asarray(picture)[..., ::-1]))  # type: ignore[no-any-return]


def test_faces_are_those_of_face_analysis(pack: Path) -> None:
    pictures = [*photographs(5), Image.new("RGB", (60, 60)), Image.new("RGB", (1, 900))]
    entry = {"kind": "insightface", "pack": "small", "det_size": SIDE}
    keys = {
        "models": [{"own": entry}],
        "postprocess_columns": [f"own-{name}" for name in COLUMNS],
        "postprocess_features": ["own-embedding"],
        "weights_dir": str(pack.parent),
    }
    ours = run(keys, pictures)
    number = 0
    for i, picture in enumerate(pictures):
        boxes, scores, landmarks, sex, age = (ours.columns[f"own-{name}"][i] for name in COLUMNS)
        expected = [] if min(picture.size) == 1 else _theirs(pack, picture)
        number += len(expected)
        assert len(boxes) == len(expected)
        assert list(sex) == [face.sex for face in expected]
        assert list(age) == [face.age for face in expected]
        size = np.array(picture.size)
        for j, face in enumerate(expected):
            np.testing.assert_allclose(boxes[j] * np.tile(size, 2), face.bbox, atol=1e-3)
            np.testing.assert_allclose(np.reshape(landmarks[j], (5, 2)) * size, face.kps, atol=1e-3)
            assert scores[j] == pytest.approx(float(face.det_score), abs=1e-6)
        areas = [np.prod(face.bbox[2:] - face.bbox[:2]) for face in expected]
        largest = expected[int(np.argmax(areas))].normed_embedding if expected else np.zeros(512)
        np.testing.assert_allclose(ours.features["own-embedding"][i], largest, atol=1e-5)
    assert number > 10


def test_a_missing_pack_is_one_mistake(tmp_path: Path) -> None:
    """Though a built-in model gives a column `face-boxes`, too."""
    model, columns = {"face": {"kind": "insightface", "pack": "./none"}}, ["face-boxes"]
    keys = {"models": [model], "postprocess_columns": columns, "input_tars": "x.tar"}
    with pytest.raises(ConfigError, match=r"1 mistake\n.*pack: .*none is no folder of"):
        load(write_config(tmp_path / "c.yml", {**keys, "output_metadata_dir": str(tmp_path)}))


def test_the_library_warns_nobody(pack: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        find = insightface.load(["CPUExecutionProvider"], str(pack), SIDE, 0.5, "embedding")
        assert any(find(picture)[0].any() for picture in photographs(3))
    assert [w for w in told if w.category is FutureWarning] == []


@pytest.mark.parametrize("inside", ["", "small/"])
def test_a_zip_as_it_is_published_is_taken(inside: str, pack: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "small.zip", "w") as archive:
        archive.writestr("__MACOSX/._det_10g.onnx", b"a Mac's notes")
        for path in pack.iterdir():
            archive.write(path, f"{inside}{path.name}")
    keys: dict[str, Any] = {
        "models": [{"own": {"kind": "insightface", "pack": "small", "det_size": SIDE}}],
        "postprocess_columns": ["own-boxes", "own-age"],
    }
    found = [
        run({**keys, "weights_dir": str(folder)}, photographs(3)).columns
        for folder in (tmp_path, pack.parent)
    ]
    assert found[0] == found[1]
    assert any(found[0]["own-boxes"])
    assert [*tmp_path.iterdir()] == [tmp_path / "small.zip"]


def test_a_zip_is_bounded_and_leads_nowhere_else(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, use = tmp_path / "a.zip", Use("own", tmp_path, frozenset({"boxes"}))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(pack / "det_10g.onnx", "../../det_10g.onnx")
        archive.writestr("../..", b"")
        archive.writestr("/etc/evil.sh", b"")
    assert [*files_of(path)] == ["det_10g.onnx"]
    assert InsightFace(pack="a").checkpoints(use) == [path]
    with _unpacked(path) as folder:
        assert [p.name for p in folder.iterdir()] == ["det_10g.onnx"]
    assert not folder.exists()
    monkeypatch.setattr(insightface, "LARGEST", 1000)
    with pytest.raises(ParameterError, match=r"a\.zip: it holds \S+ bytes; valid are up to 1,000"):
        InsightFace(pack="a").outputs(use)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ParameterError, match=r"a\.zip: it cannot be read as a zip .*fetch it"):
        InsightFace(pack="a").outputs(use)


def test_insightfaces_own_packs_are_fetched(tmp_path: Path) -> None:
    use = Use("own", tmp_path, frozenset({"boxes"}))
    [needed] = InsightFace(pack="buffalo_l").checkpoints(use)
    assert isinstance(needed, Checkpoint)
    assert needed.url.endswith("/v0.7/buffalo_l.zip")
    assert InsightFace(pack="buffalo_l").outputs(use)
    (tmp_path / "buffalo_l").mkdir()
    (tmp_path / "buffalo_l" / "det_10g.onnx").write_bytes(b"")
    assert InsightFace(pack="buffalo_l").checkpoints(use) == [tmp_path / "buffalo_l"]


def test_mistakes_are_told_in_a_line(pack: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "models": [{"own": {"kind": "insightface", "pack": "bufalo"}}],
        "postprocess_columns": ["own-boxes"],
        "weights_dir": str(tmp_path),
    }
    with pytest.raises(
        ConfigError,
        match=r"own.pack: the weights folder's bufalo is no folder of \.onnx files, nor a zip",
    ):
        run(keys, [])
    (tmp_path / "none").mkdir()
    keys["models"] = [{"own": {"kind": "insightface", "pack": str(tmp_path / "none")}}]
    with pytest.raises(ConfigError, match=rf"{tmp_path}/none is no folder of \.onnx.* them; insig"):
        run(keys, [])
    (bare := tmp_path / "bare").mkdir()
    (bare / "det.onnx").write_bytes((pack / "det_10g.onnx").read_bytes())
    use = Use("own", tmp_path, frozenset({"age"}))
    with pytest.raises(WeightsError, match=r"bare cannot be used: .*it has no net for genderage"):
        InsightFace(pack=str(bare)).build(use, torch.device("cpu"))
    (bare / "det.onnx").write_bytes(b"no net")
    with pytest.raises(WeightsError, match=r"bare cannot be used"):
        InsightFace(pack=str(bare)).build(use, torch.device("cpu"))
