"""Chunks of about the same number of bytes."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from d2m_hpc.plan.balance import balanced, groups
from d2m_hpc.run.records import Job, Shard

SIZES = st.lists(st.none() | st.integers(0, 10**12), max_size=60)


def shards(sizes: list[int | None]) -> list[Job]:
    return [Job(Shard(f"{i:05d}", f"/{i:05d}.tar", size)) for i, size in enumerate(sizes)]


def weights(chunks: list[list[Shard]]) -> list[int]:
    return [sum(s.shard.size or 0 for s in chunk) for chunk in chunks]


@given(SIZES, st.integers(1, 10))
def test_every_shard_is_in_one_chunk_and_chunks_are_as_few_as_can_be(
    sizes: list[int | None], per_task: int
) -> None:
    given_shards = shards(sizes)
    chunks = balanced(given_shards, per_task)
    assert sorted(s for chunk in chunks for s in chunk) == sorted(given_shards)
    assert len(chunks) == -(-len(sizes) // per_task)
    assert all(0 < len(chunk) <= per_task for chunk in chunks)
    assert all(chunk == sorted(chunk) for chunk in chunks)


def test_chunks_of_uneven_shards_are_even() -> None:
    draw = random.Random(1)
    sizes: list[int | None] = [int(draw.lognormvariate(20, 0.8)) for _ in range(160)]
    chunks = balanced(shards(sizes), 16)
    heavy = weights(chunks)
    assert max(heavy) < 1.05 * sum(heavy) / len(heavy)
    consecutive = weights([shards(sizes)[i : i + 16] for i in range(0, 160, 16)])
    assert max(heavy) < max(consecutive)


def test_a_large_shard_gets_the_small_ones_for_company() -> None:
    chunks = balanced(shards([100, 90, 10, 1, 1, 1]), 2)
    assert sorted(weights(chunks)) == [11, 91, 101]


def test_equal_shards_stay_in_order_of_their_names_within_a_chunk() -> None:
    chunks = balanced(shards([5] * 4), 2)
    assert [[s.stem for s in c] for c in chunks] == [["00000", "00002"], ["00001", "00003"]]


def test_a_shard_of_unknown_size_weighs_as_much_as_the_mean() -> None:
    chunks = balanced(shards([100, None, 1, 1]), 2)  # the mean is 34
    assert [[s.stem for s in c] for c in chunks] == [["00000", "00003"], ["00001", "00002"]]


def test_without_any_size_chunks_are_consecutive() -> None:
    chunks = balanced(shards([None] * 3), 2)
    assert [[s.stem for s in c] for c in chunks] == [["00000", "00001"], ["00002"]]


def test_jobs_that_extend_the_same_are_done_together_in_their_order() -> None:
    some = [
        Job(Shard(f"{i}", f"/{i}.tar"), extends)
        for i, extends in enumerate(["", "x", "", "y", "x"])
    ]
    found = groups(some)
    assert [[s.stem for s in group] for group in found] == [["0", "2"], ["1", "4"], ["3"]]
    assert groups([]) == []
