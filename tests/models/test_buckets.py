from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from d2m_hpc.models.buckets import by_length, run_by_length

LENGTHS = st.lists(st.integers(1, 520), min_size=1, max_size=80).map(torch.tensor)


@given(lengths=LENGTHS)
def test_every_row_is_in_one_bucket(lengths: Tensor) -> None:
    rows = torch.cat(by_length(lengths))
    assert sorted(rows.tolist()) == list(range(len(lengths)))


@given(lengths=LENGTHS)
def test_results_come_back_in_the_order_of_the_texts(lengths: Tensor) -> None:
    def run(rows: Tensor, _: int) -> Tensor:
        return torch.stack([rows, lengths[rows]], dim=1)

    expected = torch.stack([torch.arange(len(lengths)), lengths], dim=1)
    assert torch.equal(run_by_length(lengths, run), expected)


@given(lengths=LENGTHS)
def test_a_bucket_is_run_at_the_length_of_its_longest_text(lengths: Tensor) -> None:
    def run(rows: Tensor, longest: int) -> Tensor:
        assert longest == int(lengths[rows].max())
        return torch.full((len(rows),), longest)

    assert bool((run_by_length(lengths, run) >= lengths).all())


def _computed(lengths: Tensor) -> int:
    return sum(len(rows) * int(lengths[rows].max()) for rows in by_length(lengths))


def test_texts_of_one_length_are_one_bucket() -> None:
    assert len(by_length(torch.full((100,), 17))) == 1


def test_little_is_computed_in_vain_on_lengths_like_those_of_the_web() -> None:
    """Alt texts: log-normal, median 14 tokens, a tail to the limit of 512."""
    drawn = np.random.default_rng(0).lognormal(np.log(14), 0.7, 512).astype(int)
    lengths = torch.from_numpy(drawn.clip(3, 512))
    real = int(lengths.sum())
    assert _computed(lengths) / real < 1.3
    # Without buckets, the whole batch is padded to its longest text.
    assert len(lengths) * int(lengths.max()) / real > 4
