"""Lend memory again and again, page-locked where a GPU reads or writes it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2m_hpc.errors import NodeError
from d2m_hpc.storage.lent import Lent

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
"""Makes a tensor of a shape and type, with values not set."""

SIZES = 16
"""The number of distinct block sizes kept; more are of shapes that change with each batch."""
PAGE = 4096


class Reused:
    """Lends the memory of earlier batches to later ones.

    A kernel zeroes each new page, which takes a tenth of the loader's time where every batch of 140
    MB is new. All memory that lay in batches at the same time is kept.

    Blocks have the size of the largest batch so far, so that they are of one size; `batch_size` may
    be far larger than any shard.

    Torch's own page-locked memory would do, but takes powers of two, and ends the process where
    memory is freed after a GPU has failed.

    Args:
        rows: the most rows of a batch; 0 for tensors of any shape, in blocks of powers of two.
        device: a GPU for which the memory is page-locked. A tensor may be given up only after the
            GPU has done all that was launched with it.
    """

    _next = -1
    """Which free block is lent: the one that was given back last."""

    def __init__(self, rows: int, device: torch.device | None = None) -> None:
        self._rows, self._device = rows, device
        self._most = 0
        self._free: dict[int, list[NDArray[np.uint8]]] = {}

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        needed = math.prod(shape) * dtype.itemsize
        size = self._size(needed, shape, dtype)
        if size not in self._free and len(self._free) >= SIZES:
            self._free = {}
        free = self._free.setdefault(size, [])
        try:
            block = free.pop(self._next)  # one step, as is `append`: threads need no lock
        except IndexError:
            block = np.empty(size, np.uint8) if self._device is None else locked(size, self._device)
        lent = np.asarray(Lent(block, free))
        return torch.from_numpy(lent[:needed]).view(dtype).view(shape)

    def _size(self, needed: int, shape: Sequence[int], dtype: torch.dtype) -> int:
        if not self._rows:
            return max(PAGE, 1 << (needed - 1).bit_length())
        if shape:
            self._most = max(self._most, min(shape[0], self._rows))
        return max(needed, self._most * math.prod(shape[1:]) * dtype.itemsize)


class Largest(Reused):
    """Lends blocks of one size, that of the largest tensor so far; smaller ones are given up.

    Tensors of several sizes that are needed one after the other take no more than the largest.
    Those that are needed together lie in the same blocks each time, as long as they are given back
    in the order in which they were made: else all of every block would be used in the end.
    """

    _next = 0

    def __init__(self) -> None:
        super().__init__(0)

    def _size(self, needed: int, shape: Sequence[int], dtype: torch.dtype) -> int:
        if needed > self._most:
            self._most, self._free = needed, {}
        return self._most


def locked(size: int, device: torch.device) -> NDArray[np.uint8]:
    """Page-locked memory of whole pages, which no other array shares.

    Raises:
        NodeError: the node gives no more, or its GPU has failed.
    """
    pages = -(-size // PAGE) * PAGE
    block = np.empty(pages + PAGE, np.uint8)  # NumPy asks for huge pages
    start = -block.ctypes.data % PAGE
    address, cudart = block.ctypes.data + start, torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        error = cudart.cudaHostRegister(address, pages, 0)
    if int(error):
        raise NodeError(
            f"CUDA gives no {pages:,} bytes of page-locked memory: "
            f"{cudart.cudaGetErrorString(error)}"
        )
    weakref.finalize(block, cudart.cudaHostUnregister, address).atexit = False
    return block[start : start + size]


def like(value: Tensor, allocate: Allocate, rows: Sequence[int] = ()) -> Tensor:
    """Memory for a tensor, or for rows of such tensors, whose axes lie there in the same order."""
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    made = allocate((*rows, *(value.shape[axis] for axis in order)), value.dtype)
    back = (len(rows) + order.index(axis) for axis in range(value.dim()))
    return made.permute(*range(len(rows)), *back)
