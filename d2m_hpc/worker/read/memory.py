"""Memory for batches: page-locked for a GPU to copy from, or that of batches that are done with;
and how much decoding may take at a time."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Makes a tensor of a shape and type, whose values are not set."""

SIZES = 16
"""Of blocks that are kept: more are of shapes that change with every batch."""


def plain(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Page-locked, which torch itself uses again."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


class Reused:
    """Gives the memory of batches that nobody holds any more to the next ones.

    A kernel zeroes each page that it hands out, which takes a tenth of the loader's time where
    every batch of 140 MB is a new one. What lay in batches at the same time is kept.

    A batch takes as much memory as the largest one so far, that blocks may be of one size: not as
    `batch_size` says, which may be far above what a shard has.

    Args:
        rows: the most that a batch has.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._most = 0
        self._free: dict[int, list[NDArray[np.uint8]]] = {}

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        needed = math.prod(shape) * dtype.itemsize
        if shape:
            self._most = max(self._most, min(shape[0], self._rows))
        size = max(needed, self._most * math.prod(shape[1:]) * dtype.itemsize)
        if size not in self._free and len(self._free) >= SIZES:
            self._free = {}
        free = self._free.setdefault(size, [])
        try:
            block = free.pop()  # one step, as is `append`: threads need no lock
        except IndexError:
            block = np.empty(size, np.uint8)  # NumPy asks for huge pages
        lent = np.asarray(_Lent(block, free))
        return torch.from_numpy(lent[:needed]).view(dtype).view(shape)


class _Lent:
    """A block that is free again once no tensor lies in it."""

    def __init__(self, block: NDArray[np.uint8], free: list[NDArray[np.uint8]]) -> None:
        self.__array_interface__: dict[str, Any] = block.__array_interface__
        self._block, self._free = block, free

    def __del__(self) -> None:
        self._free.append(self._block)


class Budget:
    """Lets threads in while what they hold together is within a bound; first come, first served.

    Args:
        most: the bound; who asks for more waits until nobody else holds anything.
    """

    def __init__(self, most: int) -> None:
        self._most = self._free = most
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    def take(self, amount: int) -> int:
        """Wait for it; returns what is to be given back."""
        amount = min(amount, self._most)
        with self._changed:
            if self._waiting or self._free < amount:
                me = object()
                self._waiting.append(me)
                self._changed.wait_for(lambda: self._waiting[0] is me and self._free >= amount)
                self._waiting.popleft()
                self._changed.notify_all()  # there may be enough for the next one, too
            self._free -= amount
        return amount

    def give(self, amount: int) -> None:
        with self._changed:
            self._free += amount
            if self._waiting:
                self._changed.notify_all()


class Held:
    """What one sample holds of a budget, until the context ends.

    Never more than once at a time: who held some and waited for more could wait for ever.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget, self._amount = budget, 0

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.give(self._amount)
        self._amount = 0

    def need(self, amount: int) -> None:
        """Wait until the sample may hold as much."""
        if amount > self._amount:
            self.__exit__()
            self._amount = self._budget.take(amount)
