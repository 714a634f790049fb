"""The layers of a head, and their order, by the names and shapes of its tensors. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, count, pairwise, permutations
from math import prod
from typing import Any, NamedTuple

from d2m_hpc.models.headers import Axes, natural

UNUSED = ("classes_", "n_features_in_", "n_iter_", "n_samples_seen_")
"""Arrays of sklearn's that change no value."""
MOST = 7
"""Layers whose order is searched where their names do not tell it."""
_PART = re.compile(r"(weight|bias|running_mean|running_var|num_batches_tracked)$")


class Layer(NamedTuple):
    """A linear or batch norm layer.

    Attributes:
        prefix: how the names of its tensors begin; of sklearn's arrays, its first one's name.
        name: of its tensor that a mistake names.
        takes, gives: numbers of values.
    """

    prefix: str
    name: str
    is_norm: bool
    takes: int
    gives: int


def layers_of(found: Mapping[str, Axes], suffix: str) -> list[Layer]:
    """The layers, in their order.

    Example:
        >>> [made.gives for made in layers_of({"0.weight": (8, 768), "2.weight": (1, 8)}, ".pth")]
        [8, 1]

    Args:
        found: the shapes of the tensors by name, as they lie in the file.
        suffix: of the file; `.safetensors` keeps no order.

    Raises:
        ValueError: a tensor belongs to no such layer, or the layers do not fit each other, or do so
            in more than one order.
    """
    made = [*_of_sklearn(found)] if suffix == ".npz" else [*_of_state(found)]
    if suffix == ".safetensors":
        made = _sorted(made)
    if all(layer.is_norm for layer in made):
        raise ValueError(f"it holds no linear layer, but {', '.join([*found][:4]) or 'nothing'}")
    for before, layer in pairwise(made):
        if before.gives != layer.takes:
            what = f"{layer.name} takes {layer.takes} values"
            raise ValueError(f"{what}, and {before.name} gives {before.gives}")
    return made


def activated(layers: Sequence[Layer]) -> list[int]:
    """Behind which layers an activation is: one between two linear layers.

    Where a batch norm is between them too, the numbers of an `nn.Sequential` tell: its layers
    without tensors, such as ReLU, are the numbers left out.

    Raises:
        ValueError: the numbers leave out none there, or more than one place.
    """
    found = []
    linear = [i for i, layer in enumerate(layers) if not layer.is_norm]
    for first, last in pairwise(linear):
        places = [
            i for i in range(first, last) if _has_room(layers[i].prefix, layers[i + 1].prefix)
        ]
        places = [first] if last - first == 1 else places
        if len(places) != 1:
            what = f"between {layers[first].name} and {layers[last].name} is a batch norm, and"
            raise ValueError(
                f"{what} their names do not tell on which side of it the activation is; save the "
                "state dict of an nn.Sequential, with the activations in it and without dropout"
            )
        found += places
    return found


def require_scale(values: Any) -> None:
    """
    Raises:
        ValueError: by one of the array's values nothing can be divided.
    """
    if not ((values > 0) & (values < float("inf"))).all():
        raise ValueError("scale_ has values that are 0, negative or not finite")


def _of_state(found: Mapping[str, Axes]) -> Iterator[Layer]:
    grouped: dict[str, dict[str, Axes]] = {}
    for name, shape in found.items():
        if not (part := _PART.search(name)):
            raise ValueError(f"{name} is neither a linear nor a batch norm layer's")
        grouped.setdefault(name[: part.start()], {})[part[0]] = shape
    for prefix, own in grouped.items():
        is_norm = "running_mean" in own
        name = next(n for n in ("weight", "running_mean", *own) if n in own)
        shape = own[name]
        axes = 1 if is_norm else 2
        if name not in ("weight", "running_mean") or is_norm != ("running_var" in own):
            raise ValueError(f"{prefix}{name} is neither a linear nor a batch norm layer's")
        if len(shape) != axes:
            what = "batch norm" if is_norm else "linear"
            raise ValueError(f"{prefix}{name} has the shape {[*shape]}, which is no {what} layer's")
        for beside in own.keys() & {"bias", "running_mean", "running_var"}:
            if prod(own[beside]) != shape[0]:
                what = f"{prefix}{beside} has {prod(own[beside])} values"
                raise ValueError(f"{what}, and {prefix}{name} gives {shape[0]}")
        yield Layer(prefix, f"{prefix}{name}", is_norm, shape[-1], shape[0])


def _of_sklearn(found: Mapping[str, Axes]) -> Iterator[Layer]:
    """The layers of a StandardScaler, a linear model, an MLP."""
    used = {*UNUSED}
    chain = [f"coefs_{i}" for i in range(next(i for i in count() if f"coefs_{i}" not in found))]
    for name in [n for n in ("mean_", "coef_", *chain) if n in found]:
        shape = found[name]
        takes, gives, beside = shape[:1], shape[1:], name.replace("coef", "intercept")
        if name == "mean_":
            takes, gives, beside = shape, shape, "scale_"
            used |= {"var_"} if "scale_" in found else set()
        elif name == "coef_":
            takes, gives = shape[-1:], (prod(shape[:-1]),)
        if not len(takes) == len(gives) == 1:
            raise ValueError(f"{name} has the shape {[*shape]}, which is no linear layer's")
        if beside in found and prod(found[beside]) != gives[0]:
            raise ValueError(
                f"{beside} has {prod(found[beside])} values, and {name} gives {gives[0]}"
            )
        used |= {name, beside}
        yield Layer(name, name, name == "mean_", takes[0], gives[0])
    if unknown := sorted(found.keys() - used):
        before = {"scale_": "mean_", "var_": "scale_", "intercept_": "coef_"}
        lacks = before.get(unknown[0], f"coefs_{len(chain)}")
        if unknown[0] in before or unknown[0].startswith(("coefs_", "intercepts_")):
            raise ValueError(f"it holds {unknown[0]} without {lacks}; save that, too")
        if {"coef_", "coefs_0"} & found.keys():
            raise ValueError(f"it holds {unknown[0]}, which is not computed; leave it out")


def _sorted(layers: Sequence[Layer]) -> list[Layer]:
    """The layers by their numbers, or in the only order in which they fit.

    Raises:
        ValueError: they fit in more orders than one.
    """
    by_name = sorted(layers, key=lambda layer: natural(layer.prefix))
    if len({_plain(layer) for layer in layers}) < 2:
        return by_name
    orders = []
    if len(layers) <= MOST:
        orders = [[*order] for order in permutations(by_name) if _fits(order)] or [by_name]
    if len(orders) != 1:
        what = f"the order of {', '.join(layer.name for layer in by_name[:4])} cannot be told"
        raise ValueError(f"{what}; number them, or save a `.pth`, which keeps the order")
    return orders[0]


def _fits(layers: Sequence[Layer]) -> bool:
    return all(a.gives == b.takes for a, b in pairwise(layers)) and all(
        natural(a.prefix) < natural(b.prefix)
        for a, b in combinations(layers, 2)
        if _plain(a) == _plain(b)
    )


def _plain(layer: Layer) -> str:
    """A name without its numbers."""
    return re.sub(r"\d+", "0", layer.prefix)


def _has_room(prefix: str, following: str) -> bool:
    """Whether a layer without tensors may be between two."""
    a, b = natural(prefix), natural(following)
    if len(a) < 3 or len(a) != len(b) or a[:-2] != b[:-2] or a[-1] != b[-1]:
        return True
    return int(b[-2]) - int(a[-2]) != 1
