"""A chain of linear layers, built from what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from d2m_hpc.models.checkpoint import Weights, state_of
from d2m_hpc.models.headers import natural
from d2m_hpc.models.nsfw import EPSILON

FUNCTIONS: Mapping[str, Any] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softmax": lambda: nn.Softmax(dim=1),
}


class Layers(nn.Module):
    """Linear and batch norm layers, in float32 whatever the precision around them.

    Args:
        path: of a state dict, or of an `.npz` of sklearn's arrays.
        activation: between two linear layers.
        final: after the last one.
        normalize: divide rows by their length first.
        epsilon: of batch norm layers.

    Attributes:
        values: how many the last layer gives.
    """

    def __init__(
        self, path: Path, activation: str, final: str, normalize: bool, epsilon: float
    ) -> None:
        super().__init__()
        weights = Weights(path.parent)
        with weights.used(path.name):
            if path.suffix == ".npz":
                layers = [*_of_sklearn(path)]
            else:
                state = state_of(weights.load(path.name))
                if path.suffix == ".safetensors":  # which has not kept their order
                    state = {name: state[name] for name in sorted(state, key=natural)}
                layers = [*_of_state(state, epsilon)]
            chain = [*_activated(layers, FUNCTIONS[activation])]
        self.values = [layer.out_features for layer in chain if isinstance(layer, nn.Linear)][-1]
        self.net = nn.Sequential(*chain, FUNCTIONS[final]()).eval()
        self.normalize = normalize

    def forward(self, features: Tensor) -> Tensor:
        """float32 [B, D] to float32 [B, C]."""
        # In half precision an overflow would end in a sigmoid as a score of 1, and pass.
        with torch.autocast(features.device.type, enabled=False):
            rows = F.normalize(features.float(), dim=1) if self.normalize else features.float()
            values: Tensor = self.net(rows)
        return values


def _activated(layers: list[nn.Module], activation: Any) -> Iterator[nn.Module]:
    """The layers, and an activation after each linear one but the last."""
    linear = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError("it holds no linear layer")
    for i, layer in enumerate(layers):
        yield layer
        if i in linear[:-1]:
            yield activation()


def _of_state(state: Mapping[str, Tensor], epsilon: float) -> Iterator[nn.Module]:
    """The layers of a state dict, in its order."""
    for name in [n.removesuffix("weight") for n in state if n.endswith("weight")]:
        own = {n.removeprefix(name): v.float() for n, v in state.items() if n.startswith(name)}
        if own["weight"].dim() == 2:
            yield _linear(own["weight"], own.get("bias"))
        elif "running_mean" in own:
            norm = nn.BatchNorm1d(len(own["weight"]), eps=epsilon)
            norm.load_state_dict({"num_batches_tracked": torch.tensor(0), **own})
            yield norm
        else:
            raise ValueError(f"{name}weight is neither a linear nor a batch norm layer's")


def _of_sklearn(path: Path) -> Iterator[nn.Module]:
    """The layers of arrays under sklearn's names: of a StandardScaler, a linear model, an MLP."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: _tensor(file[name]) for name in file.files}
    if "mean_" in arrays:
        scale = arrays.get("scale_", torch.ones_like(arrays["mean_"]))
        norm = nn.BatchNorm1d(len(scale), eps=EPSILON, affine=False)
        norm.running_mean, norm.running_var = arrays["mean_"], scale**2
        yield norm
    if "coef_" in arrays:
        weight = arrays["coef_"]
        yield _linear(weight.reshape(-1, weight.shape[-1]), arrays.get("intercept_"))
    for i in count():
        if f"coefs_{i}" not in arrays:
            break
        yield _linear(arrays[f"coefs_{i}"].T, arrays.get(f"intercepts_{i}"))


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias.reshape(-1)}))
    return layer
