from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from d2m_hpc.models.buckets import (
    MOST_COMPUTED,
    TOGETHER,
    by_length,
    in_shapes,
    run_by_length,
    run_in_shapes,
)

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 520), min_size=1, max_size=80).map(torch.tensor)


@given(lengths=LENGTHS)
def test_every_row_is_in_one_bucket(lengths: Tensor) -> None:
    rows = torch.cat(by_length(lengths))
    assert sorted(rows.tolist()) == list(range(len(lengths)))


@given(lengths=LENGTHS)
def test_no_text_is_longer_than_those_of_the_next_bucket(lengths: Tensor) -> None:
    buckets = [lengths[rows] for rows in by_length(lengths)]
    assert all(a.max() < b.min() for a, b in itertools.pairwise(buckets))


@given(lengths=LENGTHS)
def test_results_come_back_in_the_order_of_the_texts(lengths: Tensor) -> None:
    def run(rows: Tensor, _: int) -> Tensor:
        return torch.stack([rows, lengths[rows]], dim=1)

    expected = torch.stack([torch.arange(len(lengths)), lengths], dim=1)
    assert torch.equal(run_by_length(lengths, run, CPU), expected)


@given(lengths=LENGTHS)
def test_a_bucket_is_run_at_the_length_of_its_longest_text(lengths: Tensor) -> None:
    def run(rows: Tensor, longest: int) -> Tensor:
        assert longest == int(lengths[rows].max())
        return torch.full((len(rows),), longest)

    assert bool((run_by_length(lengths, run, CPU) >= lengths).all())


def _computed(buckets: list[Tensor], lengths: Tensor) -> int:
    return sum(len(rows) * int(lengths[rows].max()) for rows in buckets)


@given(lengths=LENGTHS)
def test_little_is_computed_in_vain_whatever_the_lengths(lengths: Tensor) -> None:
    assert _computed(by_length(lengths), lengths) <= MOST_COMPUTED * int(lengths.sum())


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9).map(torch.tensor))
def test_no_fewer_buckets_would_do(lengths: Tensor) -> None:
    """By trying every way to cut the sorted lengths one time less."""
    order, fewer = torch.argsort(lengths), len(by_length(lengths)) - 1
    for cuts in itertools.combinations(range(1, len(order)), max(fewer - 1, 0)):
        buckets = list(torch.tensor_split(order, cuts))
        if fewer:
            assert _computed(buckets, lengths) > MOST_COMPUTED * int(lengths.sum())


def test_texts_of_one_length_are_one_bucket() -> None:
    assert len(by_length(torch.full((100,), 17))) == 1


@pytest.mark.parametrize("limit", [77, 512])
@pytest.mark.parametrize("rows", [64, 256])
def test_few_buckets_do_for_lengths_like_those_of_the_web(limit: int, rows: int) -> None:
    """Alt texts: log-normal, median 14 tokens, a tail to the limit."""
    drawn = np.random.default_rng(0).lognormal(np.log(14), 0.7, rows).astype(int)
    lengths = torch.from_numpy(drawn.clip(3, limit))
    assert len(by_length(lengths)) <= 8
    # Without buckets, the whole batch is padded to its longest text.
    assert _computed([torch.arange(rows)], lengths) > 3 * int(lengths.sum())


@given(lengths=LENGTHS)
def test_shapes_hold_every_row_once_and_whole(lengths: Tensor) -> None:
    found = in_shapes(lengths, 520)
    assert sorted(torch.cat([chosen for chosen, _, _ in found]).tolist()) == [*range(len(lengths))]
    for chosen, rows, length in found:
        assert len(chosen) <= rows
        assert int(lengths[chosen].max()) <= length
        assert rows * length <= max(TOGETHER, 4 * length)


@pytest.mark.parametrize(("limit", "most"), [(77, 10), (512, 21)])
def test_shapes_are_few_however_texts_are_drawn(limit: int, most: int) -> None:
    """Each is recorded on its own."""
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(2000):
        rows, median = random.integers(1, 600), random.integers(2, 200)
        drawn = random.lognormal(np.log(median), 0.9, rows).astype(int).clip(1, limit)
        seen |= {shape[1:] for shape in in_shapes(torch.from_numpy(drawn), limit)}
    assert len(seen) <= most


@given(lengths=LENGTHS)
def test_texts_in_shapes_come_back_in_their_order(lengths: Tensor) -> None:
    tokens = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
    for row, length in enumerate(lengths.tolist()):
        tokens[row, :length] = torch.arange(length) + row

    def run(ids: Tensor, long: Tensor) -> Tensor:
        real = torch.arange(ids.shape[1]) < long[:, None]
        return torch.stack([ids[:, 0], ids.masked_fill(~real, 0).sum(dim=1), long], dim=1)

    rows = torch.arange(len(lengths))
    expected = torch.stack([rows, tokens.sum(dim=1), lengths], dim=1)
    assert torch.equal(run_in_shapes(tokens, lengths, 520, -7, run, CPU), expected)
