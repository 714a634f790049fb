from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from bench import run
from kit import photographs
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from timm.models._registry import _model_default_cfgs
from tiny_nets import lively

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.families import timm as family
from d2m_hpc.models.families.timm import Timm
from d2m_hpc.models.family import ParameterError, Use
from d2m_hpc.models.inputs import ImageInput, OwnInput
from d2m_hpc.models.published import HubRepo

NET = "resnet10t"
SEEN = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "fixed_input_size")


def net(name: str = NET, **given: Any) -> Any:
    """A small random net."""
    return lively(timm.create_model(name, **given))


def outputs(entry: dict[str, Any], columns: list[str], features: list[str]) -> Any:
    keys = {
        "models": [{"own": {"kind": "timm", **entry}}],
        "postprocess_columns": columns,
        "postprocess_features": features,
    }
    return run(keys, photographs(4))


def theirs(made: Any, **data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Feature and probabilities, as the cards of timm's models compute them."""
    transform = create_transform(**resolve_data_config(data, model=made), is_training=False)
    with torch.no_grad():
        maps = made.forward_features(torch.stack([transform(p) for p in photographs(4)]))
        feature = made.forward_head(maps, pre_logits=True)
        return feature, made.forward_head(maps).softmax(dim=1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_of_a_training_gives_what_timm_gives(wrapped: bool, tmp_path: Path) -> None:
    made, path = net(num_classes=5), tmp_path / "net.pth"
    state = {f"module.{k}" if wrapped else k: v for k, v in made.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    entry = {"model": NET, "checkpoint": str(path), "num_classes": 5}
    found = outputs(entry, ["own-label"], ["own-feature", "own-scores"])
    feature, scores = theirs(made)
    assert feature.std(dim=0).max() > 1e-3
    np.testing.assert_allclose(found.features["own-feature"], feature, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found.features["own-scores"], scores, atol=1e-5)
    assert found.columns["own-label"].tolist() == scores.argmax(dim=1).tolist()


@pytest.mark.parametrize("data", [{}, {"crop_mode": "border"}, {"crop_mode": "squash"}])
def test_a_folder_that_timm_wrote_says_how_images_are_prepared(
    data: dict[str, Any], tmp_path: Path
) -> None:
    told = {"input_size": (3, 64, 64), "crop_pct": 0.9, "interpolation": "bilinear", **data}
    made = net("test_vit", img_size=64, num_classes=0, pretrained_cfg_overlay=told)
    save_for_hf(made, tmp_path, model_args={"img_size": 64})
    config = json.loads((tmp_path / "config.json").read_bytes())
    assert config["num_classes"] == 0
    config["pretrained_cfg"]["num_classes"] = 1000  # as timm 1.0.17 leaves that
    (tmp_path / "config.json").write_text(json.dumps(config))
    form = Timm(model=str(tmp_path)).inputs(Use("own", tmp_path, frozenset()))[0]
    assert isinstance(form, OwnInput if data else ImageInput)
    found = outputs({"model": str(tmp_path)}, [], ["own-feature"])
    np.testing.assert_allclose(found.features["own-feature"], theirs(made)[0], atol=1e-5)


def test_another_size_is_the_nets_too(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    from safetensors.torch import save_file

    made = net("test_vit", img_size=96)
    save_file(made.state_dict(), path)
    entry = {"model": "test_vit", "checkpoint": str(path), "image_size": 96}
    found = outputs(entry, [], ["own-feature"])
    feature, _ = theirs(made, input_size=(3, 96, 96))
    np.testing.assert_allclose(found.features["own-feature"], feature, atol=1e-5, rtol=1e-5)


def test_tables_are_timms_own(tmp_path: Path) -> None:
    """Of all models that are published."""
    assert {*timm.list_models()} == {*family.architectures()}
    use = Use("own", tmp_path, frozenset())
    for name in timm.list_pretrained():
        architecture, _, tag = name.partition(".")
        cfg = _model_default_cfgs[architecture].cfgs[tag]
        told = Timm(model=name)._told(use)
        assert {k: told[k] for k in SEEN} == {k: getattr(cfg, k) for k in SEEN}, name
    for architecture, default in _model_default_cfgs.items():
        if default.is_pretrained:
            name = f"{architecture}.{default.tags[0]}".rstrip(".")
            assert family.chosen(architecture, "")[0] == name


def test_published_models_are_fetched_from_the_hub(tmp_path: Path) -> None:
    use, model = Use("own", tmp_path, frozenset()), Timm(model="vit_small_patch14_dinov2.lvd142m")
    assert model.checkpoints(use) == [
        HubRepo("timm/vit_small_patch14_dinov2.lvd142m", files=family.FILES)
    ]
    assert [o.name for o in model.outputs(use)] == ["feature"]
    assert str(model.inputs(use)[0]) == "image of 518 x 518 (shortest, bicubic)"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "resnet51"}, "unknown model 'resnet51'; did you mean 'resnet"),
    ({"model": "resnet50.a9_in1k"}, "unknown tag 'a9_in1k' of resnet50; did you mean"),
    ({"model": "resnet50_mlp"}, "is not published; give `checkpoint`"),
    ({"model": "./none"}, "config.json cannot be used"),
    ({"model": NET, "checkpoint": "/none.pth"}, "which is no file"),
    ({"model": NET, "num_classes": 3}, "leave it out"),
]


def test_a_checkpoint_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path, use = tmp_path / "text.pth", Use("own", tmp_path, frozenset({"feature"}))
    path.write_text("no checkpoint")
    with pytest.raises(WeightsError, match=r"/text\.pth cannot be used: "):
        Timm(model=NET, checkpoint=str(path)).build(use, torch.device("cpu"))


LACKING: list[tuple[Any, str]] = [
    ([], "it has no `architecture`"),
    ({"num_classes": 3}, "it has no `architecture`"),
    ({"architecture": NET, "num_classes": "x"}, "`num_classes` is 'x'; valid is for example 1000"),
    (
        {"architecture": NET, "pretrained_cfg": {"input_size": [1, 48, 48], "mean": [0.5]}},
        "its net takes pictures of 1 channels; valid are 3",
    ),
    ({"architecture": NET, "pretrained_cfg": 3}, "`pretrained_cfg` is 3; valid is a map"),
    (
        {"architecture": NET, "pretrained_cfg": {"input_size": [3, 5]}},
        r"`input_size` is \[3, 5\]; valid is for example \(3, 224, 224\)",
    ),
    ({"architecture": "resnet10tt"}, "unknown architecture 'resnet10tt'; did you mean 'resnet10t'"),
]


@pytest.mark.parametrize(("content", "what"), LACKING)
def test_what_a_folders_config_lacks_is_told_with_its_file(
    content: Any, what: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes(b"")
    made, use = Timm(model=str(tmp_path)), Use("own", tmp_path, frozenset())
    with pytest.raises(ParameterError, match=what) as caught:
        made.outputs(use), made.check(use, [])
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("given", "what"), WRONG)
def test_mistakes_are_told(given: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=what):
        Timm(**given).outputs(Use("own", tmp_path, frozenset()))
