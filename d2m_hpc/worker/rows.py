"""Memory of batches that decode threads fill row by row, so that nobody has to copy them together.

A picture that is copied while it is still in its core's cache, by the thread that made it, costs a
fraction of one that waits for its batch; and what it lay in is free for the thread's next one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2m_hpc.models.blocks import Allocate


class Placed:
    """An array that lies in a row of a block.

    Attributes:
        block: [rows, ...], of several samples.
    """

    def __init__(self, block: Tensor, row: int) -> None:
        self.block, self.row = block, row

    @property
    def array(self) -> NDArray[Any]:
        found: NDArray[Any] = self.block.numpy()[self.row, ...]
        return found


class Tray:
    """Rows for samples that follow each other; each thread fills rows of its own.

    Args:
        rows: how many there are.
        allocate: makes the blocks, one for each array that a sample consists of.
        largest: bytes from which an array is not copied: one that takes so much may end its batch.
    """

    def __init__(self, rows: int, allocate: Allocate, largest: float = math.inf) -> None:
        self.rows, self._allocate, self._largest = rows, allocate, largest
        self._lock = Lock()
        self._blocks: dict[Hashable, tuple[Tensor, NDArray[Any]] | None] = {}

    def put(self, row: int, name: Hashable, value: Any) -> Any:
        """A sample's value, with the arrays in it placed in a row.

        Those of another shape or type than the first one's stay as they are.

        Args:
            name: of what the value is, the same for all samples.
        """
        if isinstance(value, tuple):
            return tuple(self.put(row, (name, i), part) for i, part in enumerate(value))
        if not isinstance(value, np.ndarray) or value.nbytes >= self._largest:
            return value
        found = self._blocks[name] if name in self._blocks else self._made(name, value)
        if not found or found[1].shape[1:] != value.shape or found[1].dtype != value.dtype:
            return value
        found[1][row] = value
        return Placed(found[0], row)

    def _made(self, name: Hashable, first: NDArray[Any]) -> tuple[Tensor, NDArray[Any]] | None:
        with self._lock:
            if name not in self._blocks:
                block = self._block(first)
                self._blocks[name] = None if block is None else (block, block.numpy())
            return self._blocks[name]

    def _block(self, first: NDArray[Any]) -> Tensor | None:
        """Memory for rows of such arrays; None where torch has no such type."""
        with suppress(TypeError, ValueError):
            dtype = torch.from_numpy(np.empty(0, first.dtype)).dtype
            return self._allocate((self.rows, *first.shape), dtype)
        return None


def taken_out(value: Any, copy: bool = False) -> Any:
    """A sample's value with arrays for what was placed.

    Args:
        copy: have arrays of their own, so that the blocks may be lent again.
    """
    if isinstance(value, tuple):
        return tuple(taken_out(part, copy) for part in value)
    if not isinstance(value, Placed):
        return value
    return value.array.copy() if copy else value.array


def gathered(placed: Sequence[Any], allocate: Allocate) -> Tensor | None:
    """The rows in order: a part of a block where they follow each other in it, else a copy.

    None where some are in no row, or in blocks of other types or shapes: those are the first
    sample's, in each tray anew.
    """
    runs: list[tuple[Tensor, int, int]] = []
    for one in placed:
        if not isinstance(one, Placed):
            return None
        if runs and runs[-1][0] is one.block and runs[-1][2] == one.row:
            runs[-1] = (one.block, runs[-1][1], one.row + 1)
        else:
            runs.append((one.block, one.row, one.row + 1))
    parts = [block[first:end] for block, first, end in runs]
    if len(parts) == 1:
        return parts[0]
    if len(kinds := {(part.dtype, part.shape[1:]) for part in parts}) > 1:
        return None
    ((dtype, shape),) = kinds
    return torch.cat(parts, out=allocate((len(placed), *shape), dtype))
