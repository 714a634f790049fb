"""Batch, from reading to computing, and Outputs, from computing to writing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2m_hpc.models.blocks import Allocate, like
from d2m_hpc.models.inputs import Input
from d2m_hpc.run.records import Rejection
from d2m_hpc.worker.rows import Placed, Tray, gathered, taken_out

SHOWN = 5
"""Shapes that are named of values that do not match."""


def plain(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


@dataclass
class Batch:
    """Samples after decoding and preprocessing.

    Attributes:
        keys: B keys.
        inputs: for each distinct prepared input, B rows of the preprocessor's values.
        fields: for each additional field, B values from the samples' JSON.
    """

    keys: list[str]
    inputs: dict[Input, Any]
    fields: dict[str, list[Any]]


@dataclass
class Outputs:
    """A batch's outputs, ready to be written.

    Attributes:
        columns: B values each, as arrays or lists.
        features: [B, ...] each, float32.
        rejections: samples of the batch without a row.
        recomputed: the number of rows that were computed again in float32.
    """

    keys: list[str]
    columns: dict[str, Any] = field(default_factory=dict)
    features: dict[str, NDArray[Any]] = field(default_factory=dict)
    fields: dict[str, list[Any]] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)
    recomputed: int = 0


# A batch's values are tensors or arrays with B rows, lists of B items, or tuples or dicts of these.


def each_part(change: Callable[..., Any], *values: Any) -> Any:
    """Apply `change` to the parts of tuples or dicts of one form; return the same form."""
    first = values[0]
    if isinstance(first, tuple):
        return tuple(change(*parts) for parts in zip(*values, strict=True))
    # A dict's own type is kept: outputs of transformers are read by attributes.
    return type(first)({key: change(*(value[key] for value in values)) for key in first})


def collate(samples: Sequence[Any], allocate: Allocate = plain) -> Any:
    """Make a batch of preprocessed samples: stack numbers, arrays and tensors, transpose tuples,
    and list the rest.

    Args:
        allocate: makes the tensors for stacking.

    Raises:
        ValueError: the samples are of different shapes or kinds.
    """
    try:
        return _collate(samples, allocate)
    except torch.AcceleratorError:  # a GPU's failure, seen by whoever calls CUDA next
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"its values do not match: {error}") from None


def _collate(samples: Sequence[Any], allocate: Allocate) -> Any:
    first = samples[0]
    if isinstance(first, tuple):
        _require(samples, tuple)
        if not first:
            raise ValueError("an empty tuple")
        if len(lengths := {len(sample) for sample in samples}) > 1:
            raise ValueError(f"tuples of different lengths: {sorted(lengths)}")
        return tuple(_collate(parts, allocate) for parts in zip(*samples, strict=True))
    if isinstance(first, Placed) and (batch := gathered(samples, allocate)) is not None:
        return batch
    samples = [taken_out(sample) for sample in samples]
    first = samples[0]
    if isinstance(first, np.ndarray):
        tray = Tray(len(samples), allocate)
        placed = [tray.put(row, "", sample) for row, sample in enumerate(samples)]
        if (batch := gathered(placed, allocate)) is not None:
            return batch
    if isinstance(first, Tensor):
        return _stack(samples, allocate)
    if isinstance(first, np.ndarray | np.generic):
        _require(samples, bool, int, float, complex, np.generic, np.ndarray, Tensor)
        _require_one_shape("arrays", map(np.shape, samples))
        # A fresh array: torch warns of read-only arrays, and refuses some.
        stacked = np.stack(list(samples))
        return torch.from_numpy(stacked) if stacked.dtype.kind in "biufc" else list(samples)
    if isinstance(first, bool | int | float):
        _require(samples, bool, int, float, np.number, np.bool, np.ndarray, Tensor)
        return torch.tensor(samples)
    return list(samples)


def _require(samples: Sequence[Any], *kinds: type) -> None:
    """Raise `ValueError` if samples are of other kinds."""
    odd = next((s for s in map(taken_out, samples) if not isinstance(s, kinds)), samples[0])
    if not isinstance(odd, kinds):
        raise ValueError(f"{type(samples[0]).__name__} and {type(odd).__name__}")


def _require_one_shape(what: str, shapes: Iterable[tuple[int, ...]]) -> None:
    if len(found := sorted(set(shapes))) > 1:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        shown = ", ".join(map(str, found[:SHOWN]))
        raise ValueError(f"{what} of different shapes: {shown}{more}")


def _stack(tensors: Sequence[Tensor], allocate: Allocate) -> Tensor:
    """Stack like `torch.stack`, with the first tensor's order of axes in memory.

    Pictures stay channels last: taking channels apart costs more than resizing.
    """
    _require(tensors, Tensor)
    _require_one_shape("tensors", (tuple(t.shape) for t in tensors))
    for odd in tensors:
        if odd.layout != torch.strided or odd.device.type != "cpu":
            raise ValueError(f"a tensor of {odd.layout} on {odd.device}; valid: dense, on the CPU")
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    # A net in a preprocessor makes tensors that require gradients.
    alike = [t.detach().to(dtype) for t in tensors]
    stacked = like(alike[0], allocate, [len(tensors)])
    torch.stack(alike, out=stacked)
    return stacked


def take(value: Any, rows: Sequence[int] | slice) -> Any:
    """Some rows of a batch's value; of tensors and arrays a slice is no copy."""
    if isinstance(value, tuple | dict):
        return each_part(lambda part: take(part, rows), value)
    if isinstance(rows, slice):
        return value[rows]
    if isinstance(value, Tensor):
        return value[torch.as_tensor(rows, dtype=torch.long, device=value.device)]
    if isinstance(value, np.ndarray):
        return value[list(rows)]
    return [value[i] for i in rows]


def join(values: Sequence[Any]) -> Any:
    """Join values of consecutive parts."""
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, tuple | dict):
        return each_part(lambda *parts: join(parts), *values)
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    return [item for value in values for item in value]


def put(value: Any, rows: Sequence[int], replacement: Any) -> Any:
    """Copy a value with some rows replaced."""
    if isinstance(value, tuple | dict):
        return each_part(lambda part, new: put(part, rows, new), value, replacement)
    if isinstance(value, Tensor):
        index = torch.as_tensor(rows, dtype=torch.long, device=value.device)
        return value.index_copy(0, index, replacement.to(value))
    copied = value.copy()
    for row, new in zip(rows, replacement, strict=True):
        copied[row] = new
    return copied


def count(value: Any) -> int:
    """The number of rows."""
    if isinstance(value, tuple | dict):
        return count(next(iter(_parts(value))))
    return len(value)


def non_finite(value: Any) -> list[int]:
    """The rows with NaN or infinity."""
    return flagged(flags(value))


def flags(value: Any) -> tuple[Tensor, ...]:
    """For each part with numbers, bool [B]: the rows with NaN or infinity.

    The flags stay on the parts' device, so that no thread waits for it.
    """
    if isinstance(value, tuple | dict):
        return tuple(flag for part in _parts(value) for flag in flags(part))
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim:
        bad = ~np.isfinite(value)
        return (torch.from_numpy(bad.any(axis=tuple(range(1, value.ndim)))),)
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
        finite = torch.isfinite(value)
        return (~(finite.flatten(1).all(dim=1) if value.dim() > 1 else finite),)
    if isinstance(value, list):
        return (torch.tensor([not _finite_item(item) for item in value], dtype=torch.bool),)
    return ()


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def flagged(parts: Sequence[Tensor]) -> list[int]:
    """The rows that any of the flags name."""
    rows = {row for part in parts for row in torch.nonzero(part).flatten().tolist()}
    return sorted(rows)


def _finite_item(item: Any) -> bool:
    if isinstance(item, float):
        return item - item == 0
    if isinstance(item, Tensor):
        return bool(torch.isfinite(item).all()) if item.is_floating_point() else True
    if isinstance(item, np.ndarray | np.generic):
        return bool(np.isfinite(item).all()) if item.dtype.kind == "f" else True
    return all(map(_finite_item, _parts(item))) if isinstance(item, list | tuple | dict) else True
