from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import run
from kit import photographs
from safetensors.torch import load_file, save_file
from tiny_nets import OTHERWISE, image_processor, vit
from transformers import (
    CLIPImageProcessor,
    DeiTImageProcessor,
    TextNetImageProcessor,
    pipeline,
)

from d2m_hpc.config import Config
from d2m_hpc.errors import WeightsError
from d2m_hpc.models.families.image_classification import ImageClassification
from d2m_hpc.models.family import Use
from d2m_hpc.models.hub_nets import images
from d2m_hpc.models.inputs import ImageInput

NAMES = {0: "normal", 1: "NSFW, drawn", 2: "nsfw (drawn)"}
ODD = CLIPImageProcessor(size={"shortest_edge": 53}, crop_size={"height": 48, "width": 48})
"""Half of 53 - 48 is none: transformers begins one pixel before torchvision's transforms."""
OWN = DeiTImageProcessor(size={"height": 56, "width": 56}, crop_size={"height": 48, "width": 48})


def keys(folder: Path, *columns: str, features: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "models": [{"own": {"kind": "image-classification", "checkpoint": str(folder)}}],
        "postprocess_columns": list(columns),
        "postprocess_features": list(features),
    }


def theirs(folder: Path, **chosen: Any) -> list[dict[str, float]]:
    """Scores by label, by a pipeline of transformers, with its own processor if none is chosen."""
    run_all = pipeline("image-classification", model=str(folder), top_k=9, **chosen)
    return [{s["label"]: s["score"] for s in run_all(picture)} for picture in photographs(8)]


@pytest.mark.parametrize("processor", [None, ODD])
def test_scores_are_a_pipelines(processor: Any, tmp_path: Path) -> None:
    folder = vit(tmp_path / "net", processor, id2label=NAMES)
    columns = ["own-normal", "own-nsfw-drawn-1", "own-nsfw-drawn-2", "own-label"]
    found = run(keys(folder, *columns, features=("own-scores",)), photographs(8))
    expected = theirs(folder, image_processor=image_processor(folder))
    for column, label in zip(columns, NAMES.values(), strict=False):
        scores = np.array([row[label] for row in expected])
        assert scores.std() > 1e-3
        np.testing.assert_allclose(found.columns[column], scores, atol=1e-5)
    assert found.columns["own-label"] == [max(row, key=row.__getitem__) for row in expected]
    np.testing.assert_allclose(found.features["own-scores"].sum(axis=1), 1, atol=1e-5)
    if OTHERWISE and processor is None:
        return  # the pipeline resizes bytes as this torchvision does
    fast = run({**keys(folder, "own-normal"), "resize": "fast"}, photographs(8))
    scores = [row["normal"] for row in theirs(folder)]
    np.testing.assert_allclose(fast.columns["own-normal"], scores, atol=1e-5)


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_a_processor_that_does_more_prepares_the_pictures_itself(
    resize: str, tmp_path: Path
) -> None:
    folder = vit(tmp_path / "net", OWN, id2label=NAMES, problem_type="multi_label_classification")
    found = run({**keys(folder, "own-normal"), "resize": resize}, photographs(8))
    scores = [row["normal"] for row in theirs(folder)]
    np.testing.assert_allclose(found.columns["own-normal"], scores, atol=1e-5)


def test_pictures_are_described_by_value_where_that_is_possible(tmp_path: Path) -> None:
    use = Use("own", tmp_path, frozenset())
    forms = [
        ImageClassification(checkpoint=str(vit(tmp_path / str(i), p))).inputs(use)[0]
        for i, p in enumerate([None, ODD, OWN])
    ]
    assert [isinstance(form, ImageInput) for form in forms] == [True, True, False]


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    "told",
    [
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 48},
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 53, "crop_size": 48},
        {"image_processor_type": "BitImageProcessorFast", "size": 53, "crop_size": 48},
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 48, "width": 48}},
        {"image_processor_type": "BlipImageProcessor", "size": 48, "do_convert_rgb": None},
        {"image_processor_type": "ViTImageProcessorFast", "size": 48, "do_center_crop": None},
        {"feature_extractor_type": "ViTFeatureExtractor", "image_mean": MEAN, "image_std": STD,
         "resample": 3, "size": 48},
    ],
)  # fmt: skip
def test_configs_that_leave_out_what_their_class_has_are_described_too(
    told: dict[str, Any], tmp_path: Path
) -> None:
    folder = vit(tmp_path / "net", id2label=NAMES)
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    [form] = ImageClassification(checkpoint=str(folder)).inputs(Use("own", tmp_path, frozenset()))
    assert isinstance(form, ImageInput)
    found = run(keys(folder, "own-normal"), photographs(8))
    scores = [row["normal"] for row in theirs(folder, image_processor=image_processor(folder))]
    np.testing.assert_allclose(found.columns["own-normal"], scores, atol=1e-5)


def _mistakes(config: dict[str, Any], tmp_path: Path) -> list[str]:
    from d2m_hpc.config.mistakes import checkpoint_mistakes, registry_mistakes
    from d2m_hpc.models.registry import Registry

    given = {"input_tars": ["none.tar"], "output_metadata_dir": "out", "device": "cpu"}
    made = Config.model_validate({**given, **config, "weights_dir": str(tmp_path)})
    found = registry_mistakes(made, Registry())
    return [*map(str, found or checkpoint_mistakes(made, made.registry(Registry())[0]))]


def test_labels_are_taken_as_they_come_until_a_repository_is_fetched(tmp_path: Path) -> None:
    config = keys(Path("some/nets"), "own-anything", "own-label")
    assert _mistakes(config, tmp_path) == []
    folder = vit(tmp_path / "hub" / "some--nets@main", id2label=NAMES)
    [mistake] = _mistakes(config, tmp_path)
    assert "'own-anything'" in mistake
    assert "own-normal" in mistake
    assert _mistakes(keys(Path("some/nets"), "own-normal"), tmp_path) == []
    (folder / "config.json").write_text("{")
    [mistake] = _mistakes(config, tmp_path)
    assert "config.json cannot be read" in mistake


def test_a_folder_without_a_checkpoint_is_told_at_once(tmp_path: Path) -> None:
    [mistake] = _mistakes(keys(tmp_path / "none", "own-normal"), tmp_path)
    assert "models.0.own.checkpoint: " in mistake
    assert "config.json cannot be read" in mistake
    folder = vit(tmp_path / "net", id2label=NAMES)
    (folder / "model.safetensors").unlink()
    [mistake] = _mistakes(keys(folder, "own-normal"), tmp_path)
    assert "no file of weights" in mistake


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        ({"image_mean": None}, "preprocessor_config.json: `image_mean` is null"),
        ({"image_std": None}, "preprocessor_config.json: `image_std` is null"),
        (
            {"size": {"shortest_edge": 48}},
            "`size` is {'shortest_edge': 48}: pictures have no fixed size",
        ),
    ],
)
def test_a_processor_that_fits_no_picture_is_told_at_once(
    change: dict[str, Any], mistake: str, tmp_path: Path
) -> None:
    """With null, the net would be given bytes; pictures of several sizes make no batch."""
    folder = vit(tmp_path / "net", DeiTImageProcessor(do_center_crop=False), id2label=NAMES)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    [found] = _mistakes(keys(folder, "own-normal"), tmp_path)
    assert mistake in found


def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path: Path) -> None:
    folder = vit(tmp_path, id2label=NAMES)
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks tensors of a ViTFor\w+: classifier.weight"):
        run(keys(folder, "own-normal"), photographs(1))
    net = vit(tmp_path / "other", id2label=NAMES | {3: "more"})
    (net / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(
        WeightsError, match=r"classifier.bias has the shape \[4\], and by its config"
    ):
        run(keys(net, "own-normal"), photographs(1))
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(WeightsError, match="cannot be used: Safetensor") as told:
        run(keys(folder, "own-normal"), photographs(1))
    assert "\n" not in str(told.value)
    config = json.loads((folder / "config.json").read_bytes())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(WeightsError, match="trust_remote_code"):
        run(keys(folder, "own-normal"), photographs(1))


def test_a_processor_that_makes_pictures_of_several_sizes_is_told_before_any_shard(
    tmp_path: Path,
) -> None:
    TextNetImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="gives pictures of several sizes, which make no batch"):
        images(str(tmp_path))


@pytest.mark.parametrize("labels", [{"0": "a", "1": "b", "5": "c"}, {}, ["a"], {"a": "b"}])
def test_labels_that_are_not_numbered_from_0_are_told(labels: Any, tmp_path: Path) -> None:
    folder = vit(tmp_path / "net", id2label=NAMES)
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": labels}))
    [mistake] = _mistakes(keys(folder, "own-label"), tmp_path)
    assert "net/config.json: the labels in its id2label are no names numbered from 0" in mistake


def test_a_label_without_letters_has_a_column_by_its_number(tmp_path: Path) -> None:
    folder = vit(tmp_path, id2label={0: "", 1: "b", 2: "!"})
    model = ImageClassification(checkpoint=str(folder))
    labels = model.labels(Use("own", tmp_path, frozenset()))
    assert labels == {"label_0": "", "b": "b", "label_2": "!"}
