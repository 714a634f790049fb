from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.nsfw import CHECKPOINT, NsfwImage, head

CPU = torch.device("cpu")


def _features(rows: int = 16) -> torch.Tensor:
    drawn = torch.randn(rows, 768, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn, dim=1)


def _by_hand(state: dict[str, torch.Tensor], features: torch.Tensor) -> np.ndarray:
    """The published formula in float64."""
    p = {name: value.double().numpy() for name, value in state.items()}
    x = features.double().numpy()
    x = (x - p["norm.running_mean"]) / np.sqrt(p["norm.running_var"])
    x = x * p["norm.weight"] + p["norm.bias"]
    for name in ("dense", "dense1", "dense2"):
        x = np.maximum(x @ p[f"{name}.weight"].T + p[f"{name}.bias"], 0)
    x = x @ p["dense3.weight"].T + p["dense3.bias"]
    return 1 / (1 + np.exp(-x[:, 0]))


def test_scores_are_those_of_the_formula(checkpoints: Path) -> None:
    weights, features = Weights(checkpoints), _features()
    with torch.inference_mode():
        scores = NsfwImage(CPU, weights)(features)
    expected = _by_hand(weights.load(CHECKPOINT), features)
    assert scores.dtype == torch.float32
    assert expected.std() > 1e-3
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)


def test_batch_norm_has_no_epsilon(checkpoints: Path, tmp_path: Path) -> None:
    state = Weights(checkpoints).load(CHECKPOINT)
    # As of real features of length 1: variances near 1 / 768, where 1e-5 would show.
    state["norm.running_var"] = torch.full((768,), 1e-5)
    torch.save(state, tmp_path / CHECKPOINT)
    features = _features()
    with torch.inference_mode():
        scores = NsfwImage(CPU, Weights(tmp_path))(features)
    np.testing.assert_allclose(scores.numpy(), _by_hand(state, features), atol=1e-5)


def test_the_epsilon_that_every_torch_takes_changes_no_bit() -> None:
    norm, drawn = head().norm.eval(), torch.Generator().manual_seed(2)
    assert norm.eps > 0  # torch 2.10 and 2.11 raise at 0
    norm.running_var = 10.0 ** torch.linspace(-28, 8, 768)
    norm.running_mean = torch.randn(768, generator=drawn)
    features = torch.randn(9, 768, generator=drawn)
    mean, variance = norm.running_mean, norm.running_var
    at_zero = torch.batch_norm(
        features, norm.weight, norm.bias, mean, variance, False, 0.0, 0.0, False
    )
    assert torch.equal(norm(features), at_zero)
    assert at_zero.isfinite().all()


@torch.inference_mode()
def test_scores_are_float32s_under_autocast(checkpoints: Path) -> None:
    """The head is tiny: half precision would save nothing and blur scores near the threshold."""
    model, features = NsfwImage(CPU, Weights(checkpoints)), _features()
    plain = model(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(features), plain)


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    torch.save({"dense.weight": torch.zeros(2, 2)}, tmp_path / CHECKPOINT)
    with pytest.raises(WeightsError, match=r"nsfw_torch\.pt"):
        NsfwImage(CPU, Weights(tmp_path))
