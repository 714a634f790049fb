"""Memory that is lent again once no array lies in it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from d2m_hpc.storage.lent import Lender


def place(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_lent_again_once_no_array_lies_in_it() -> None:
    lend = Lender()
    array = lend(24)
    where, values = place(array), array.view(np.float16).reshape(4, 3)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 3)
    del array, values
    other = lend(24)
    other[:] = 1
    assert place(other) != where  # Arrow has it
    del lists
    assert place(lend(24)) == where


def test_arrays_of_nearly_one_size_share_memory() -> None:
    lend = Lender()
    assert len({place(lend(size)) for size in range(1025, 2048, 100)}) == 1
    array = lend(1)
    assert (array.dtype, array.shape) == (np.uint8, (1,))
