"""A chain of linear layers, built from what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from d2m_hpc.models.chain import Layer, activated, layers_of, require_scale
from d2m_hpc.models.checkpoint import Weights, state_of
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
            own = _arrays(path) if path.suffix == ".npz" else state_of(weights.load(path.name))
            layers = layers_of({n: tuple(v.shape) for n, v in own.items()}, path.suffix)
            places = activated(layers) if activation != "none" else []
            chain = []
            for i, layer in enumerate(layers):
                chain.append(_built(layer, own, epsilon))
                if i in places:
                    chain.append(FUNCTIONS[activation]())
        self.values = layers[-1].gives
        self.net = nn.Sequential(*chain, FUNCTIONS[final]()).eval()
        self.normalize = normalize

    def forward(self, features: Tensor) -> Tensor:
        """float32 [B, D] to float32 [B, C]."""
        # In half precision an overflow would end in a sigmoid as a score of 1, and pass.
        with torch.autocast(features.device.type, enabled=False):
            rows = F.normalize(features.float(), dim=1) if self.normalize else features.float()
            values: Tensor = self.net(rows)
        return values


def _built(layer: Layer, own: Mapping[str, Tensor], epsilon: float) -> nn.Module:
    """A layer with its tensors."""
    if layer.name != layer.prefix:  # of a state dict
        if not layer.is_norm:
            return _linear(own[layer.name], own.get(f"{layer.prefix}bias"))
        norm = nn.BatchNorm1d(layer.takes, eps=epsilon)
        given = {n: own.get(f"{layer.prefix}{n}") for n in norm.state_dict()}
        # Weight and bias, which `affine=False` leaves out, are 1 and 0 in a new one.
        norm.load_state_dict({n: v for n, v in given.items() if v is not None}, strict=False)
        return norm
    if layer.is_norm:
        scale = own.get("scale_", torch.ones_like(own["mean_"]))
        require_scale(scale)
        norm = nn.BatchNorm1d(layer.takes, eps=EPSILON, affine=False)
        norm.running_mean, norm.running_var = own["mean_"], scale**2
        return norm
    weight, bias = own[layer.name], own.get(layer.name.replace("coef", "intercept"))
    if layer.name == "coef_":
        return _linear(weight.reshape(-1, layer.takes), bias)
    return _linear(weight.T, bias)


def _arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as file:
        return {name: _tensor(file[name]) for name in file.files if name != "classes_"}


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias.reshape(-1)}))
    return layer
