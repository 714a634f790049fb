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
from torch import Tensor, nn
from torchvision import transforms

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.families.watermark import Watermark
from d2m_hpc.models.family import ParameterError, Use
from d2m_hpc.models.published import Checkpoint

SIDE = 64  # LAION's own is 256


def net(seen: Tensor) -> Any:
    """A random net in LAION's form: EfficientNet-B3 with three linear layers on top.

    Args:
        seen: pictures, whose scores it spreads between 0 and 1.
    """
    made = timm.create_model("efficientnet_b3", num_classes=2)
    layers = [nn.Linear(1536, 625), nn.ReLU(), nn.Dropout(0.3), nn.Linear(625, 256), nn.ReLU()]
    made.classifier = nn.Sequential(*layers, last := nn.Linear(256, 2))
    lively(made)
    with torch.no_grad():
        spread = made(seen).std()
        last.weight.div_(spread), last.bias.div_(spread)
    return made


def prepared(side: int, count: int) -> Tensor:
    """The first photographs as LAION's example prepares them."""
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    steps = [transforms.Resize((side, side)), transforms.ToTensor(), normalise]
    return torch.stack([transforms.Compose(steps)(picture) for picture in photographs(count)])


def test_scores_are_those_of_laions_example(tmp_path: Path) -> None:
    seen = prepared(SIDE, 3)
    torch.save((made := net(seen)).state_dict(), tmp_path / "net.pt")
    entry = {"kind": "watermark", "checkpoint": str(tmp_path / "net.pt"), "size": SIDE}
    keys = {"models": [{"own": entry}], "postprocess_columns": ["own-score"]}
    found = run(keys, photographs(3)).columns["own-score"]
    with torch.no_grad():
        expected = made(seen).softmax(dim=1)[:, 0]
    assert 0.001 < expected.min() < expected.max() < 0.999
    np.testing.assert_allclose(found, expected, atol=1e-5)


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
