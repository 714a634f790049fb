from __future__ import annotations

from collections import OrderedDict
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
        classes_=np.array(["a", "b", "c"], dtype=object),
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


def _trained(*layers: nn.Module) -> nn.Sequential:
    """A net whose batch norms have seen some features."""
    torch.manual_seed(2)
    net = nn.Sequential(*layers)
    net(torch.rand(60, WIDTH))
    return net.eval()


@pytest.mark.parametrize(
    "middle",
    [(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout()), (nn.ReLU(), nn.BatchNorm1d(8, affine=False))],
)
def test_an_activation_is_where_the_numbers_of_a_sequential_leave_it_out(
    middle: tuple[nn.Module, ...], tmp_path: Path
) -> None:
    from d2m_hpc.models.layers import Layers

    first = (nn.BatchNorm1d(WIDTH, affine=False), nn.Linear(WIDTH, 8))
    net, rows = _trained(*first, *middle, nn.Linear(8, 1)), torch.randn(20, WIDTH)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    made = Layers(tmp_path / "net.pth", "relu", "none", normalize=False, epsilon=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(made(rows), net(rows), atol=1e-6)


def test_layers_of_a_safetensors_without_numbers_are_in_the_only_order_that_fits(
    tmp_path: Path,
) -> None:
    from d2m_hpc.models.layers import Layers

    net = nn.Sequential(OrderedDict(fc=nn.Linear(WIDTH, 8), a_out=nn.Linear(8, 1)))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    made = Layers(tmp_path / "net.safetensors", "none", "none", normalize=False, epsilon=1e-5)
    rows = torch.randn(3, WIDTH)
    with torch.no_grad():
        np.testing.assert_allclose(made(rows), net(rows), atol=1e-6)


COEF = {"coef_": np.ones((1, WIDTH)), "intercept_": np.ones(1)}
ONES = np.ones(WIDTH)
SQUARE = {f"{n}.weight": torch.zeros(WIDTH, WIDTH) for n in ("proj", "fc")}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.npz", {**COEF, "scale_": ONES}, "it holds scale_ without mean_"),
        ("a.npz", {**COEF, "mean_": ONES, "var_": ONES}, "it holds var_ without scale_"),
        ("a.npz", {**COEF, "foo": ONES}, "it holds foo, which is not computed"),
        ("a.npz", {**COEF, "mean_": ONES, "scale_": ONES * 0}, "scale_ has values that are 0"),
        ("a.npz", {}, "it holds no linear layer, but nothing"),
        ("a.pth", {}, "it holds no tensors by name"),
        ("a.pth", [1, 2], "it holds no tensors by name"),
        ("a.pth", nn.Linear(WIDTH, 1), "it holds no tensors by name"),
        ("a.pth", {"model": nn.Linear(WIDTH, 1).state_dict()}, "it holds no tensors by name"),
        ("a.pth", nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)).state_dict(), "0.weight"),
        ("a.pth", nn.Sequential(nn.Linear(WIDTH, 1), nn.PReLU()).state_dict(), "1.weight"),
        ("a.pth", {"scale": torch.ones(1)}, "scale is neither a linear nor a batch norm layer's"),
        (
            "a.pth",
            nn.ModuleList([nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)]).state_dict(),
            "do not tell on which side",
        ),
        ("a.safetensors", {**SQUARE, "out.weight": torch.zeros(1, WIDTH)}, "cannot be told"),
    ],
)
def test_what_is_no_head_or_one_of_two_is_told_at_submit(
    name: str, content: Any, told: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if name.endswith(".npz"):
        np.savez(path, **content)
    elif name.endswith(".safetensors"):
        save_file(content, path)
    else:
        torch.save(content, path)
    config = {**EXACT, "models": [MODEL, _head(checkpoint=str(path), activation="relu")]}
    registry, problems = Registry().with_models(config["models"], [], tmp_path)
    assert problems == []
    [problem] = registry.unfit(config["models"])
    assert problem.loc[-1] == "checkpoint"
    assert told in problem.what


def test_a_softmax_of_one_value_is_told() -> None:
    models = [MODEL, _head(checkpoint="/a.pth", final="softmax")]
    [mistake] = registry_mistakes(Config.model_validate({**EXACT, "models": models}), Registry())
    assert "softmax of one value is 1 for every sample" in mistake
