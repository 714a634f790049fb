"""Memory of batches that are done with holds the next ones, and never two at once."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch
from torch import Tensor

from d2m_hpc.models.blocks import SIZES, Largest, Reused
from d2m_hpc.worker.batch import collate

ROWS = 4


def batch(memory: Reused, value: int, rows: int = ROWS, width: int = 1000) -> Tensor:
    made = collate([torch.full((width,), value)] * rows, memory)
    assert isinstance(made, Tensor)
    assert made.shape == (rows, width)
    return made


def test_a_batch_lies_where_one_lay_that_nobody_holds() -> None:
    memory = Reused(ROWS)
    first = batch(memory, 1)
    where = first.data_ptr()
    del first
    assert batch(memory, 2).data_ptr() == where


def test_a_batch_that_is_held_keeps_its_memory() -> None:
    memory = Reused(ROWS)
    first, second = batch(memory, 1), batch(memory, 2)
    assert (first == 1).all()
    assert (second == 2).all()


@pytest.mark.parametrize(
    "part", [lambda b: b[1:], lambda b: b.T, lambda b: b.view(torch.int32), lambda b: b.numpy()]
)
def test_any_part_of_a_batch_holds_it(part: object) -> None:
    memory = Reused(ROWS)
    assert callable(part)
    kept = part(batch(memory, 1))
    expected = kept.tolist()
    gc.collect()
    others = [batch(memory, 2) for _ in range(3)]
    assert kept.tolist() == expected
    assert len({other.data_ptr() for other in others}) == 3


def test_a_shards_last_batch_takes_the_memory_of_a_whole_one() -> None:
    memory = Reused(ROWS)
    where = batch(memory, 1).data_ptr()
    short = batch(memory, 2, rows=3)
    assert short.data_ptr() == where
    assert (short == 2).all()
    del short
    assert batch(memory, 3).data_ptr() == where


def test_a_bound_far_above_what_comes_takes_no_memory() -> None:
    memory = Reused(10**19)
    tracemalloc.start()
    try:
        first = batch(memory, 1, rows=2)
        larger = batch(memory, 2, rows=3)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (first == 1).all()
    assert (larger == 2).all()
    assert held < 6 * 8 * 1000


def test_batches_of_other_types_and_shapes_come_out_right() -> None:
    memory = Reused(ROWS)
    for dtype in (torch.uint8, torch.float32, torch.bool, torch.float16, torch.int64):
        for shape in ((), (3,), (2, 0), (3, 5, 7)):
            samples = [torch.ones(shape, dtype=dtype) * i for i in range(ROWS)]
            assert torch.equal(collate(samples, memory), torch.stack(samples))


def test_shapes_that_always_change_do_not_fill_the_memory() -> None:
    """Batches of one picture, each of its own size."""
    memory = Reused(1)
    tracemalloc.start()
    try:
        for width in range(100_000, 100_100):
            batch(memory, 1, rows=1, width=width)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < (SIZES + 1) * 8 * 100_100


def test_memory_outlives_whoever_gave_it() -> None:
    memory = Reused(ROWS)
    first = batch(memory, 1)
    del memory
    gc.collect()
    assert (first == 1).all()


def test_tensors_of_several_sizes_in_turn_take_the_memory_of_the_largest() -> None:
    memory = Largest()
    small = memory((1000,), torch.float32)
    places = set()
    for size in (4000, 1000, 2000, 4000):
        tensor = memory((size,), torch.float32)
        places.add(tensor.data_ptr())
        del tensor
    assert len(places) == 1
    del small  # of a size that is lent no more
    assert {size: len(blocks) for size, blocks in memory._free.items()} == {16000: 1}


def test_tensors_that_are_made_and_given_back_together_lie_in_the_same_blocks_each_time() -> None:
    memory = Largest()
    memory((4000,), torch.float32)
    places = set()
    for _ in range(3):
        tensors = [memory((size,), torch.float32) for size in (1000, 4000, 2000)]
        places.add(tuple(tensor.data_ptr() for tensor in tensors))
        while tensors:
            tensors.pop(0)
    assert len(places) == 1
