"""Rows of tensors, arrays, lists and tuples of these are handled alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutputWithPooling

from d2m_hpc.worker.batch import collate, count, join, non_finite, put, take

Rows = list[float]


def as_tensor(rows: Rows) -> torch.Tensor:
    return torch.tensor([[r, 1.0] for r in rows]).reshape(len(rows), 2)


def as_array(rows: Rows) -> Any:
    return np.array(rows, dtype=np.float32)


def as_list(rows: Rows) -> list[list[float]]:
    return [[r] * 3 for r in rows]


def as_boxes(rows: Rows) -> list[torch.Tensor]:
    """As many boxes as the row's number, plus one."""
    return [torch.full((int(abs(r)) % 3 + 1, 4), r) for r in rows]


def as_tuple(rows: Rows) -> tuple[Any, ...]:
    return (as_tensor(rows), as_list(rows), (as_array(rows), list(map(str, rows))))


def as_dict(rows: Rows) -> dict[str, Any]:
    return {"a": as_tensor(rows), "b": {"c": as_list(rows)}, "d": (as_array(rows),)}


def as_model_output(rows: Rows) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(as_tensor(rows), as_tensor(rows)[:, 0])


FORMS = {
    f.__name__: f
    for f in (as_tensor, as_array, as_list, as_boxes, as_tuple, as_dict, as_model_output)
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
ROWS = st.lists(st.integers(-50, 50).map(float), min_size=1, max_size=8)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


@forms
@given(ROWS, st.data())
def test_taking_rows_is_as_if_there_had_been_no_others(
    form: Any, rows: Rows, data: st.DataObject
) -> None:
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    assert same(take(form(rows), index), form([rows[i] for i in index]))
    assert count(take(form(rows), [])) == 0


@forms
@given(st.lists(ROWS, min_size=1, max_size=4))
def test_joined_parts_are_the_whole(form: Any, parts: list[Rows]) -> None:
    whole = [r for part in parts for r in part]
    assert same(join([form(part) for part in parts]), form(whole))
    assert count(form(whole)) == len(whole)


@forms
@given(ROWS, st.data())
def test_put_changes_these_rows_of_a_copy(form: Any, rows: Rows, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True))
    value, changed = form(rows), [-7.0 if i in index else r for i, r in enumerate(rows)]
    if index:
        assert same(put(value, index, form([-7.0] * len(index))), form(changed))
    assert same(put(value, index, take(value, index)), value)
    assert same(value, form(rows))


def test_put_keeps_the_kind_of_number_that_was_there() -> None:
    half = torch.zeros(3, 2, dtype=torch.float16)
    mended = put(half, [1], torch.tensor([[0.5, 2.0]]))
    assert mended.dtype == torch.float16
    assert mended.tolist() == [[0, 0], [0.5, 2], [0, 0]]


@forms
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@given(rows=ROWS, data=st.data())
def test_rows_with_a_number_that_is_not_finite_are_found(
    form: Any, bad: float, rows: Rows, data: st.DataObject
) -> None:
    if form is as_boxes:
        form = lambda rows: [torch.full((2, 4), r) for r in rows]  # noqa: E731
    index = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1))))
    assert non_finite(form([bad if i in index else r for i, r in enumerate(rows)])) == index


NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        (torch.zeros(3, dtype=torch.int64), []),
        (torch.tensor([True, False]), []),
        (torch.zeros(0, 5), []),
        (torch.zeros(4, 0), []),
        (torch.tensor([[[1.0, NAN]], [[1.0, 1.0]]]), [0]),
        (torch.tensor([1.0, NAN], dtype=torch.float16), [1]),
        (torch.tensor([1.0, NAN], dtype=torch.bfloat16), [1]),
        (np.array(["a", "b"]), []),
        (np.array([1, 2]), []),
        (np.array([[1.0, 2.0], [NAN, 1.0]], dtype=np.float16), [1]),
        (np.array([1.0, NAN]).astype(">f4"), [1]),
        (np.array([1.0, NAN], dtype=np.longdouble), [1]),
        (np.array([NAN, 1.0, NAN])[::-1], [0, 2]),
        (np.broadcast_to(np.float32(NAN), (2,)), [0, 1]),
        (["a", None, NAN], [2]),
        ([[], [[NAN]], [[1.0]]], [1]),
        ([np.array([1.0]), np.array([NAN])], [1]),
        ([np.float32(NAN), np.float32(1)], [0]),
        ([(1.0, 2.0), (1.0, NAN)], [1]),
        ([torch.tensor(NAN), torch.tensor(1)], [0]),
        ([np.array(["x"]), np.array([NAN, 1.0])], [1]),
        ([{"a": 1}, "x"], []),
        ([{"a": 1.0}, {"a": [NAN]}], [1]),
        ({"a": torch.tensor([1.0, NAN]), "b": ["x", "y"]}, [1]),
        (([1.0, NAN], torch.tensor([NAN, 1.0])), [0, 1]),
        (([1, 2], np.array(["a", "b"])), []),
        ((np.array(["a"]),), []),
        ([], []),
    ],
)
def test_non_finite_rows_of_any_kind(value: Any, rows: list[int]) -> None:
    assert non_finite(value) == rows


# --- collate ---


@given(st.lists(st.integers(-50, 50).map(float), min_size=1, max_size=6))
def test_collating_the_samples_of_a_batch_gives_the_batch(rows: Rows) -> None:
    samples = [(torch.tensor([r, 1.0]), str(r), (np.full((2, 1), r), r)) for r in rows]
    tensors, texts, (arrays, numbers) = collate(samples)
    assert same(tensors, as_tensor(rows))
    assert texts == list(map(str, rows))
    assert arrays.shape == (len(rows), 2, 1)
    assert numbers.tolist() == rows
    assert arrays[:, 0, 0].tolist() == rows


@pytest.mark.parametrize(
    ("samples", "dtype"),
    [
        ([np.zeros((2, 3), np.uint8)] * 2, torch.uint8),
        ([np.zeros(2, np.float16)] * 2, torch.float16),
        ([1, 2], torch.int64),
        ([1, 2.5], torch.float32),
        ([True, False], torch.bool),
        ([torch.tensor(1), torch.tensor(2)], torch.int64),
        ([np.zeros(2, np.complex64), np.zeros(2, np.uint8)], torch.complex64),
        ([torch.zeros(2, requires_grad=True)] * 2, torch.float32),
    ],
)
def test_numbers_become_a_tensor(samples: list[Any], dtype: torch.dtype) -> None:
    batch = collate(samples)
    assert isinstance(batch, torch.Tensor)
    assert batch.dtype == dtype
    assert len(batch) == 2


def test_arrays_that_may_not_be_written_or_run_backwards_are_stacked() -> None:
    """What `np.asarray(image)` and a flip make."""
    fixed = np.arange(6, dtype=np.uint8).reshape(2, 3)
    fixed.flags.writeable = False
    batch = collate([fixed, fixed[::-1], fixed[:, ::-1]])
    assert batch.tolist() == [
        [[0, 1, 2], [3, 4, 5]],
        [[3, 4, 5], [0, 1, 2]],
        [[2, 1, 0], [5, 4, 3]],
    ]
    batch += 1
    assert fixed[0, 0] == 0


@pytest.mark.parametrize("numbers", [[1, 2**40], [1.0, 1e5], [1, 2.5], [True, 7]])
def test_the_first_tensors_type_does_not_narrow_the_others(numbers: list[Any]) -> None:
    narrow = {int: torch.int32, float: torch.float16, bool: torch.bool}[type(numbers[0])]
    batch = collate([torch.tensor(numbers[:1], dtype=narrow), torch.tensor(numbers[1:])])
    assert batch.flatten().tolist() == numbers
    assert not batch.requires_grad


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (
            [torch.zeros(2).to_sparse()],
            "torch.sparse_coo on cpu; valid: dense, on the CPU",
        ),
        ([torch.zeros(2, device="meta")], "a tensor of torch.strided on meta"),
        ([torch.zeros(2), None], "Tensor and NoneType"),
        ([np.zeros(2), None], "ndarray and NoneType"),
        ([np.zeros(i) for i in range(9)], r"arrays of different shapes: \(0,\), .* and 4 more"),
        ([torch.zeros(i) for i in (2, 1)], r"tensors of different shapes: \(1,\), \(2,\)"),
        ([()], "an empty tuple"),
        ([("a", "b"), "xy"], "tuple and str"),
        ([("a", "b"), ("a",)], r"tuples of different lengths: \[1, 2\]"),
        ([(1, 2), (1, None)], "int and NoneType"),
    ],
)
def test_what_does_not_match_is_named(samples: list[Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        collate(samples)


@pytest.mark.parametrize(
    "samples", [["a", "b"], [None, None], [{"a": 1}, {}], [[1], [1, 2]], [np.array(["a"])] * 2]
)
def test_all_else_becomes_a_list(samples: list[Any]) -> None:
    batch = collate(samples)
    assert isinstance(batch, list)
    assert batch == samples


@pytest.mark.parametrize(
    "samples",
    [
        [torch.zeros(2), torch.zeros(3)],
        [np.zeros(2), np.zeros((2, 1))],
        [(torch.zeros(2), 1), (torch.zeros(3), 1)],
        [(1, 2), (1, 2, 3)],
        [torch.zeros(1), None],
        [np.zeros(1), None],
        [1, None],
        [1, "x"],
        [(1, 2), None],
        [(1, 2), 3],
        [2**70, 1],
    ],
)
def test_samples_that_do_not_match_are_a_value_error(samples: list[Any]) -> None:
    with pytest.raises(ValueError, match="values do not match: "):
        collate(samples)
