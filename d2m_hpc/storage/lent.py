"""Memory that is lent again once no array lies in it: the system clears what it gives anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lend = Callable[[int], NDArray[np.uint8]]
"""Makes an array of so many bytes, with values not set."""


def new(size: int) -> NDArray[np.uint8]:
    """Memory of an array's own."""
    return np.empty(size, np.uint8)


class Lent:
    """A block that returns to its list once no array lies in it."""

    def __init__(self, block: NDArray[np.uint8], free: list[NDArray[np.uint8]]) -> None:
        self.__array_interface__: dict[str, Any] = block.__array_interface__
        self._block, self._free = block, free

    def __del__(self) -> None:
        self._free.append(self._block)


class Lender:
    """Lends arrays of bytes, of any number of threads, in blocks of powers of two.

    The end of a block, which no array reached, takes no memory. All memory that lay in arrays at
    the same time is kept as long as the lender is.

    Example:
        lend = Lender()
        values = lend(6_144_000).view(np.float16).reshape(4000, 768)
    """

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}

    def __call__(self, size: int) -> NDArray[np.uint8]:
        free = self._free.setdefault(size.bit_length(), [])
        try:
            block = free.pop()  # one step, as is `append`: threads need no lock
        except IndexError:
            block = new(1 << size.bit_length())
        lent: NDArray[np.uint8] = np.asarray(Lent(block, free))[:size]
        return lent
