from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from bench import run
from kit import photographs
from tiny_nets import lively
from torch import nn
from torchvision import transforms

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.families.watermark import Watermark
from d2m_hpc.models.family import ParameterError, Use
from d2m_hpc.models.published import Checkpoint

SIDE = 64  # LAION's own is 256


def net() -> Any:
    """A random net in LAION's form: EfficientNet-B3 with three linear layers on top."""
    made = timm.create_model("efficientnet_b3", num_classes=2)
    layers = [nn.Linear(1536, 625), nn.ReLU(), nn.Dropout(0.3), nn.Linear(625, 256), nn.ReLU()]
    made.classifier = nn.Sequential(*layers, nn.Linear(256, 2))
    return lively(made)


def test_scores_are_those_of_laions_example(tmp_path: Path) -> None:
    made, pictures = net(), photographs(3)
    torch.save(made.state_dict(), tmp_path / "net.pt")
    entry = {"kind": "watermark", "checkpoint": str(tmp_path / "net.pt"), "size": SIDE}
    found = run({"models": [{"own": entry}], "postprocess_columns": ["own-score"]}, pictures)
    prepare = transforms.Compose(
        [
            transforms.Resize((SIDE, SIDE)),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    with torch.no_grad():
        expected = made(torch.stack([prepare(p) for p in pictures])).softmax(dim=1)[:, 0]
    assert expected.std() > 1e-3
    np.testing.assert_allclose(found.columns["own-score"], expected, atol=1e-5)


def test_the_preset_names_the_published_file_and_another_net_is_told(tmp_path: Path) -> None:
    use, path = Use("own", tmp_path, frozenset({"score"})), tmp_path / "other.pt"
    [needed] = Watermark().checkpoints(use)
    assert isinstance(needed, Checkpoint)
    assert needed.name.endswith("/models/watermark_model_v1.pt")
    torch.save(nn.Linear(3, 2).state_dict(), path)
    own = Watermark(checkpoint=str(path))
    with pytest.raises(ParameterError, match=r"other\.pt is of another net: it has no classifier"):
        own.check(use, [])
    with pytest.raises(WeightsError, match=r"other\.pt cannot be used: "):
        own.build(use, torch.device("cpu"))
