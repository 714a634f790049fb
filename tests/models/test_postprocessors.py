from __future__ import annotations

import numpy as np
import pytest
import torch

from d2m_hpc.models import postprocessors
from d2m_hpc.models.family import Post

A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
B = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
CACHE = {"pair": (A, B), "one": A, "words": ["a", "b"], "rows": [[1, "x"], [2, "y"], [3, "z"]]}


def test_the_dot_product_is_taken_row_by_row() -> None:
    scores = postprocessors.batched_dot_product(CACHE, model="pair")
    assert scores.tolist() == [1 * 5 + 2 * 6, 3 * 7 + 4 * 8]


def test_the_dot_product_of_chosen_outputs() -> None:
    scores = postprocessors.batched_dot_product_index(CACHE, model="pair", i=1, j=1)
    assert scores.tolist() == [25 + 36, 49 + 64]


def test_the_dot_product_of_features_is_their_cosine() -> None:
    a, b = (torch.nn.functional.normalize(torch.randn(9, 64), dim=1) for _ in range(2))
    scores = postprocessors.batched_dot_product({"m": (a, b)}, model="m")
    expected = torch.nn.functional.cosine_similarity(a.double(), b.double())
    np.testing.assert_allclose(scores.numpy(), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("index", [0, 1])
def test_select_gives_one_output(index: int) -> None:
    assert torch.equal(postprocessors.select(CACHE, model="pair", index=index), (A, B)[index])


def test_identity_gives_tensors_and_with_to_cpu_false_also_lists() -> None:
    assert torch.equal(postprocessors.identity(CACHE, model="one"), A)
    assert postprocessors.identity(CACHE, model="words", to_cpu=False) == ["a", "b"]


def test_transpose_list_turns_rows_into_columns() -> None:
    assert postprocessors.transpose_list(CACHE, model="rows") == [[1, 2, 3], ["x", "y", "z"]]


def test_build_applies_a_function_by_name_with_its_options() -> None:
    made = postprocessors.build(Post("pair", "select", {"index": 1}))
    assert torch.equal(made(CACHE), B)
