from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import run
from kit import photographs
from torch import Tensor, nn
from torchvision import transforms

from d2m_hpc.errors import ConfigError, D2MError, WeightsError
from d2m_hpc.models.registry import builtin


class _Net(nn.Module):
    """A trunk, GeM pooling, a linear layer and normalisation, as SSCD's nets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.embed = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.trunk(x).clamp(min=1e-6).pow(3.0).mean(dim=(2, 3)).pow(1 / 3.0)
        return nn.functional.normalize(self.embed(pooled))


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sscd") / "net.torchscript.pt"
    with warnings.catch_warnings(action="ignore"):  # torch calls scripting deprecated
        torch.jit.script(_Net().eval()).save(str(path))
    return path


def _features(checkpoint: Path | str, **parameters: Any) -> np.ndarray:
    entry = {"own": {"kind": "sscd", "checkpoint": str(checkpoint), **parameters}}
    keys = {"models": [entry], "postprocess_features": ["own-image"]}
    return run(keys, photographs(6)).features["own-image"]


def test_a_state_dict_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    torch.save(_Net().state_dict(), tmp_path / "net.pt")
    with pytest.raises(WeightsError, match=r"net.pt cannot be used: it is no TorchScript archive"):
        _features(tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("parameters", "resize"),
    [
        ({}, [transforms.Resize([320, 320])]),
        (
            {"size": 288, "resize": "shortest"},
            [transforms.Resize(288), transforms.CenterCrop(288)],
        ),
    ],
)
def test_descriptors_are_those_of_the_authors_way(
    net: Path, parameters: dict[str, Any], resize: list[Any]
) -> None:
    normalise = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    prepare = transforms.Compose([*resize, transforms.ToTensor(), normalise])
    with torch.no_grad():
        pixels = torch.stack([prepare(picture) for picture in photographs(6)])
        with warnings.catch_warnings(action="ignore"):
            expected = torch.jit.load(str(net))(pixels).numpy()
    assert expected.std(axis=0).max() > 1e-2
    np.testing.assert_allclose(_features(net, **parameters), expected, atol=1e-5)


def test_published_nets_are_named_and_others_are_told_in_a_line(tmp_path: Path) -> None:
    [need] = builtin().models["sscd-disc-mixup"].checkpoints
    assert need.url.endswith("/sscd-copy-detection/sscd_disc_mixup.torchscript.pt")
    with pytest.raises(ConfigError, match=r"unknown net 'disc_mixed'.*disc_mixup"):
        _features("disc_mixed")
    (broken := tmp_path / "broken.pt").write_bytes(b"no net")
    with pytest.raises(D2MError, match=r"broken\.pt cannot be used"):
        _features(broken)
