from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from d2m_hpc.errors import WeightsError
from d2m_hpc.models import dedup
from d2m_hpc.models.checkpoint import Weights

CPU = torch.device("cpu")


def _images(rows: int = 2) -> torch.Tensor:
    return torch.rand(rows, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.inference_mode()
def test_descriptor_and_score_are_those_of_the_formula(checkpoints: Path) -> None:
    weights, images = Weights(checkpoints), _images()
    content = weights.load(dedup.CHECKPOINT)
    state = {k.removeprefix("module."): v for k, v in content["state_dict"].items()}
    backbone = timm.create_model("tf_efficientnetv2_b0", features_only=True, pretrained=False)
    prefix = "backbone."
    inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    backbone.load_state_dict(inner)
    maps = backbone.eval()(images)[-1].double().numpy()
    p = {k: v.double().numpy() for k, v in state.items() if not k.startswith(prefix)}
    x = np.maximum(maps, 1e-6).mean(axis=(2, 3)) @ p["fc.weight"].T
    x = (x - p["bn.running_mean"]) / np.sqrt(p["bn.running_var"] + 1e-5)
    x = x * p["bn.weight"] + p["bn.bias"]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    references = weights.load(dedup.REFERENCES).double().numpy()

    descriptors, scores = dedup.IscFtV107(CPU, weights)(images)
    assert descriptors.shape == (2, 256)
    np.testing.assert_allclose(descriptors.numpy(), x, atol=1e-5)
    np.testing.assert_allclose(scores.numpy(), (x @ references.T).max(axis=1), atol=1e-5)


@torch.inference_mode()
def test_the_score_of_a_reference_image_is_one(checkpoints: Path, tmp_path: Path) -> None:
    images = _images(1)
    descriptor, _ = dedup.IscFtV107(CPU, Weights(checkpoints))(images)
    others = torch.nn.functional.normalize(torch.randn(5, 256), dim=1)
    torch.save(torch.cat([others, descriptor]), tmp_path / dedup.REFERENCES)
    (tmp_path / dedup.CHECKPOINT).symlink_to(checkpoints / dedup.CHECKPOINT)
    _, score = dedup.IscFtV107(CPU, Weights(tmp_path))(images)
    assert score.item() == pytest.approx(1, abs=1e-6)


@torch.inference_mode()
def test_the_search_among_references_is_float32_under_autocast(checkpoints: Path) -> None:
    model, images = dedup.IscFtV107(CPU, Weights(checkpoints)), _images()
    with torch.autocast("cpu", torch.bfloat16):
        descriptors, scores = model(images)
    assert descriptors.dtype == scores.dtype == torch.float32
    expected = (descriptors.double() @ model.references.double()).amax(dim=1)
    np.testing.assert_allclose(scores.numpy(), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("old", dedup.RENAMED)
def test_a_renamed_architecture_is_one_that_timm_knows_without_a_warning(old: str) -> None:
    new = dedup.RENAMED[old]
    assert new.split(".")[0] in timm.list_models()
    assert new in timm.list_pretrained()
    assert old not in timm.list_models()
    assert dedup.IscNet(old).fc.in_features == 512


def test_a_checkpoint_of_another_net_is_named(checkpoints: Path, tmp_path: Path) -> None:
    content = Weights(checkpoints).load(dedup.CHECKPOINT)
    del content["state_dict"]["module.fc.weight"]
    torch.save(content, tmp_path / dedup.CHECKPOINT)
    with pytest.raises(WeightsError, match=r"isc_ft_v107\.pth\.tar(.|\n)*fc\.weight"):
        dedup.load(Weights(tmp_path))


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"arch": "no_such_net", "state_dict": {}}])
def test_a_checkpoint_without_a_known_architecture_is_named(
    content: dict[str, object], tmp_path: Path
) -> None:
    torch.save(content, tmp_path / dedup.CHECKPOINT)
    with pytest.raises(WeightsError, match=r"isc_ft_v107\.pth\.tar.*arch|no_such_net"):
        dedup.load(Weights(tmp_path))
