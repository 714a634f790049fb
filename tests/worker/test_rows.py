"""Samples that threads copy into a batch's memory make the batches that stacking would make."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2m_hpc.models.blocks import Reused
from d2m_hpc.worker.batch import collate, plain
from d2m_hpc.worker.rows import Placed, Tray

LARGEST = 1 << 20


def _value(i: int) -> Any:
    return np.full((2, 3), i, np.uint8), (np.array([i, 0.5]), str(i))


def _placed(values: list[Any], rows: int) -> list[Any]:
    """Samples in trays of so many rows."""
    trays = [Tray(rows, plain, LARGEST) for _ in range(-(-len(values) // rows))]
    return [trays[i // rows].put(i % rows, "x", value) for i, value in enumerate(values)]


@given(st.integers(1, 7), st.lists(st.booleans(), min_size=1, max_size=20).filter(any))
def test_whatever_rows_are_left_out_the_batch_is_what_stacking_gives(
    rows: int, kept: list[bool]
) -> None:
    values = [_value(i) for i in range(len(kept))]
    placed = [*itertools.compress(_placed(values, rows), kept)]
    found, expected = collate(placed), collate([*itertools.compress(values, kept)])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1][0], expected[1][0])
    assert found[1][1] == expected[1][1]
    assert [part.dtype for part in (found[0], found[1][0])] == [torch.uint8, torch.float64]


def test_rows_that_follow_each_other_in_a_tray_are_not_copied() -> None:
    placed = _placed([_value(i)[0] for i in range(4)], 4)
    batch = collate(placed[1:])
    assert batch.data_ptr() == placed[0].block[1].data_ptr()
    batches = _placed([_value(i)[0] for i in range(4)], 2)
    assert batches[1].block.data_ptr() != batches[2].block.data_ptr()
    assert collate(batches).tolist() == collate(placed).tolist()


@pytest.mark.parametrize(
    "value",
    [
        "text",
        1.5,
        torch.zeros(3),
        np.array(["a"]),
        np.zeros(LARGEST, np.uint8),
        np.zeros(2, np.longdouble),
        np.zeros(2, ">f4"),
    ],
)
def test_what_is_no_small_array_of_torchs_types_stays_as_it_is(value: Any) -> None:
    tray = Tray(2, plain, LARGEST)
    assert all(tray.put(row, "x", value) is value for row in range(2))


@pytest.mark.parametrize(
    "others", [[np.zeros(3)], [np.zeros((2, 1))], [np.zeros(2), None], [(np.zeros(2),)]]
)
def test_samples_that_do_not_match_are_told_as_ever(others: list[Any]) -> None:
    tray = Tray(8, plain, LARGEST)
    samples = [tray.put(row, "x", value) for row, value in enumerate([np.zeros(2), *others])]
    with pytest.raises(ValueError, match="values do not match: "):
        collate(samples)


def test_types_that_differ_are_widened_as_ever() -> None:
    values = [np.array([1], np.int64), np.array([2.5])]
    tray = Tray(2, plain, LARGEST)
    batch = collate([tray.put(row, "x", value) for row, value in enumerate(values)])
    assert batch.tolist() == [[1.0], [2.5]]
    assert batch.dtype == torch.float64


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (np.array([1], np.int32), np.array([2**40])),
        (np.array([1], np.float16), np.array([1e5])),
        (np.array([1], np.int16), np.array([0.5])),
        (np.array([1.5]), np.array([7], np.uint32)),
        (np.array([1], np.uint16), np.array([7], np.int8)),
    ],
)
def test_the_type_of_a_batchs_first_block_does_not_narrow_the_others(
    first: Any, later: Any
) -> None:
    """Samples of one type to a tray: each tray takes the type of its first one."""
    values = [first, first, later, later]
    batch = collate(_placed(values, 2))
    assert batch.tolist() == [value.tolist() for value in values]
    assert batch.dtype == collate(values).dtype


def test_shapes_that_differ_from_tray_to_tray_are_told() -> None:
    with pytest.raises(ValueError, match=r"arrays of different shapes: \(2,\), \(3,\)"):
        collate(_placed([np.zeros(2), np.zeros(3)], 1))


@pytest.mark.parametrize("first", ["text", None, {"a": 1}, [1]])
def test_what_models_get_in_a_list_is_never_a_row_of_a_tray(first: Any) -> None:
    values = [first, (np.array([1]), "b"), np.array([2]), np.array(3)]
    assert collate(_placed(values, 4)) == values
    assert isinstance(collate(_placed(values, 4))[3], np.ndarray)


def test_threads_fill_one_tray() -> None:
    tray = Tray(256, plain, LARGEST)
    with ThreadPoolExecutor(16) as pool:
        placed = [*pool.map(lambda i: tray.put(i, "x", _value(i)[0]), range(256))]
    assert torch.equal(collate(placed), collate([_value(i)[0] for i in range(256)]))
    assert len({id(one.block) for one in placed}) == 1


def test_memory_is_lent_again_once_a_batch_is_gone() -> None:
    memory = Reused(4)
    first = Tray(4, memory, LARGEST)
    batch = collate([first.put(row, "x", _value(row)[0]) for row in range(4)], memory)
    where = batch.data_ptr()
    del first
    held = Tray(4, memory, LARGEST).put(0, "x", _value(0)[0])
    assert isinstance(held, Placed)
    assert held.block.data_ptr() != where
    del batch
    other = Tray(4, memory, LARGEST).put(0, "x", _value(0)[0])
    assert other.block.data_ptr() == where
