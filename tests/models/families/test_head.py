from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import EXACT, run
from kit import photographs
from safetensors.torch import save_file
from torch import Tensor, nn

from d2m_hpc.config import Config
from d2m_hpc.config.mistakes import registry_mistakes
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.nsfw import CHECKPOINT, NsfwImage
from d2m_hpc.models.registry import Registry

MODEL = {"stats": {"kind": "image-stats"}}
WIDTH = 48  # of its histogram


def _head(**more: Any) -> dict[str, Any]:
    return {"head": {"kind": "head", "on": "stats-histogram", **more}}


def _scores(head: dict[str, Any], *columns: str, count: int = 6) -> tuple[np.ndarray, Tensor]:
    """What a head gives, and the features that it was given."""
    keys = {
        "models": [MODEL, head],
        "postprocess_columns": [f"head-{column}" for column in columns],
        "postprocess_features": ["stats-histogram"],
        "feature_dtype": "float32",
    }
    found = run(keys, photographs(count))
    values = np.stack([found.columns[f"head-{column}"] for column in columns], axis=1)
    return values, torch.from_numpy(found.features["stats-histogram"])


def _mlp() -> nn.Sequential:
    """As LAION's second aesthetic predictor is: linear layers alone."""
    torch.manual_seed(1)
    widths = [(WIDTH, 32), (32, 16), (16, 1)]
    return nn.Sequential(*(m for w in widths for m in (nn.Linear(*w), nn.Dropout(0.2)))).eval()


@pytest.mark.parametrize("end", [".pth", ".safetensors"])
def test_a_chain_of_linear_layers_is_laions_second_aesthetic_predictor(
    end: str, tmp_path: Path
) -> None:
    net, path = _mlp(), tmp_path / f"head{end}"
    state = {f"layers.{name}": value for name, value in net.state_dict().items()}
    save_file(state, path) if end == ".safetensors" else torch.save(state, path)
    found, features = _scores(_head(checkpoint=str(path), normalize=True), "score")
    with torch.no_grad():
        expected = net(features / features.norm(dim=1, keepdim=True)).numpy()
    assert expected.std() > 1e-4
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_linear_layer_is_laions_first_aesthetic_predictor(tmp_path: Path) -> None:
    net = nn.Linear(WIDTH, 1)
    torch.save(net.state_dict(), tmp_path / "linear.pth")
    found, features = _scores(_head(checkpoint=str(tmp_path / "linear.pth")), "score")
    np.testing.assert_allclose(found, net(features).detach().numpy(), atol=1e-6)


def test_sklearns_arrays_give_its_probabilities(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    rows, classes = rng.random((60, WIDTH)), rng.integers(0, 3, 60)
    scaler = StandardScaler().fit(rows)
    fitted = LogisticRegression(max_iter=500).fit(scaler.transform(rows), classes)
    np.savez(
        tmp_path / "probe.npz",
        coef_=fitted.coef_,
        intercept_=fitted.intercept_,
        mean_=scaler.mean_,
        scale_=scaler.scale_,
    )
    names = ("cat", "dog", "bird")
    head = _head(checkpoint=str(tmp_path / "probe.npz"), classes=names, final="softmax")
    found, features = _scores(head, *names)
    expected = fitted.predict_proba(scaler.transform(features.double().numpy()))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_sklearns_mlp_gives_its_values(tmp_path: Path) -> None:
    from sklearn.neural_network import MLPRegressor

    rng = np.random.default_rng(0)
    rows = rng.random((60, WIDTH)).astype(np.float32)
    fitted = MLPRegressor(hidden_layer_sizes=(8, 4), activation="tanh", max_iter=1000).fit(
        rows, rows.sum(axis=1) % 1
    )
    arrays = {f"coefs_{i}": array for i, array in enumerate(fitted.coefs_)}
    arrays |= {f"intercepts_{i}": array for i, array in enumerate(fitted.intercepts_)}
    np.savez(tmp_path / "mlp.npz", **arrays)
    head = _head(checkpoint=str(tmp_path / "mlp.npz"), activation="tanh")
    found, features = _scores(head, "score")
    np.testing.assert_allclose(found[:, 0], fitted.predict(features.numpy()), atol=1e-5)


def test_batch_norm_relu_and_sigmoid_are_datacomps_nsfw_head(checkpoints: Path) -> None:
    from d2m_hpc.models.layers import Layers

    features = torch.nn.functional.normalize(torch.randn(5, 768), dim=1)
    made = Layers(checkpoints / CHECKPOINT, "relu", "sigmoid", normalize=False, epsilon=1e-30)
    theirs = NsfwImage(torch.device("cpu"), Weights(checkpoints))
    with torch.no_grad():
        np.testing.assert_allclose(made(features)[:, 0], theirs(features), atol=1e-6)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"on": "stats-histogrm", "checkpoint": "/a.pth"}, "did you mean 'stats-histogram'?"),
        ({"on": "stats-phash", "checkpoint": "/a.pth"}, "no model gives the feature 'stats-phash'"),
        ({"on": "stats-histo", "checkpoint": "/a.pth"}, "valid: stats-histogram"),
        ({"checkpoint": "a.pth"}, "'a.pth', which is not there"),
        ({"checkpoint": "/a.pth", "final": "sigmod"}, "input should be 'none', 'sigmoid'"),
    ],
)
def test_a_wrong_parameter_is_told(more: dict[str, Any], told: str) -> None:
    config = Config.model_validate({**EXACT, "models": [MODEL, _head(**more)]})
    [mistake] = registry_mistakes(config, Registry())
    assert told in mistake
    assert mistake.loc[:3] == ("models", 1, "head")


def test_other_numbers_of_values_than_classes_are_told(tmp_path: Path) -> None:
    torch.save(nn.Linear(WIDTH, 2).state_dict(), tmp_path / "two.pth")
    with pytest.raises(Exception, match=r"two.pth gives 2 values for 1 classes"):
        _scores(_head(checkpoint=str(tmp_path / "two.pth")), "score")
