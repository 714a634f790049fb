"""Model outputs to columns and features.

Each function takes `cache`, the outputs of one batch by model name. The names and signatures are
those that custom files of dataset2metadata import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from d2m_hpc.models.family import Post, result_of

Cache = Mapping[str, Any]


def _maybe_cpu(value: Any, to_cpu: bool) -> Any:
    """Lists, of strings for example, are there already."""
    return value.cpu() if to_cpu and isinstance(value, torch.Tensor) else value


def batched_dot_product_index(
    cache: Cache, model: str, i: int, j: int, to_cpu: bool = True
) -> torch.Tensor:
    """Row-wise dot product [B] of the outputs `i` and `j` ([B, D] each) of a model."""
    outputs = cache[model]
    product: torch.Tensor = _maybe_cpu((outputs[i] * outputs[j]).sum(dim=1), to_cpu)
    return product


def batched_dot_product(cache: Cache, model: str, to_cpu: bool = True) -> torch.Tensor:
    """Row-wise dot product [B] of a model's first two outputs: CLIP's score."""
    return batched_dot_product_index(cache, model, 0, 1, to_cpu)


def select(cache: Cache, model: str, index: int, to_cpu: bool = True) -> Any:
    """One of a model's outputs."""
    return _maybe_cpu(cache[model][index], to_cpu)


def identity(cache: Cache, model: str, to_cpu: bool = True) -> Any:
    """A model's only output; with `to_cpu` False also lists, of strings for example."""
    return _maybe_cpu(cache[model], to_cpu)


def transpose_list(cache: Cache, model: str) -> list[list[Any]]:
    """A list of rows as a list of columns."""
    return [list(column) for column in zip(*cache[model], strict=False)]


def build(post: Post) -> Callable[[Cache], Any]:
    """The function of a built-in column or feature."""
    model = result_of(post.model, post.text)
    return partial(globals()[post.function], model=model, **post.options)
