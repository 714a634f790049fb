"""JSON values of a field as one type."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from kit import calls

from d2m_hpc.models.types import is_field_type, split
from d2m_hpc.run.values import agreeable, arrow_type, column, inferred, name_of


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([], ""),
        ([None, None], ""),
        ([[], None], ""),
        ([3, None], "float64"),
        ([3, 2.5], "float64"),
        ([2**53, -(2**53)], "float64"),
        ([3, 2**53 + 1], "int64"),
        ([2**63, 1], "uint64"),
        ([2**63, -1], "json"),
        ([2**70], "json"),
        ([2**53 + 1, 0.5], "json"),
        ([2**60, 0.5], "float64"),
        ([float("nan"), 1], "float64"),
        ([True, None], "bool"),
        ([True, 1], "json"),
        (["a", None], "string"),
        (["a", 1, {}], "string"),
        ([{"a": 1}, {}], "json"),
        ([[1], [], [2.5, None]], "list<float64>"),
        ([["a"], []], "list<string>"),
        ([["a", 1]], "json"),
        ([["a"], [1]], "json"),
        ([[[0.5, 1]], [[]]], "list<list<float64>>"),
        ([[[[[1]]]]], "list<list<list<list<float64>>>>"),
        ([[[[[[1]]]]]], "json"),
        ([[[[[[]]]]]], "json"),
        ([[{"a": 1}]], "json"),
        ([[1], 1], "json"),
        ([[1], "a"], "string"),
    ],
)
def test_the_type_of_some_values(values: list[Any], kind: str) -> None:
    assert inferred(values) == kind
    if kind:
        made, bad = column("x", kind, values)
        assert (made.type, bad) == (arrow_type(kind), {})


@pytest.mark.parametrize(
    ("kind", "value", "held"),
    [
        ("int64", 5.0, 5),
        ("uint64", 2**64 - 1, 2**64 - 1),
        ("float64", 7, 7.0),
        ("float64", 2**60, float(2**60)),
        ("string", 5.5, "5.5"),
        ("string", "5.5", "5.5"),
        ("string", ["é"], '["é"]'),
        ("json", "a", '"a"'),
        ("json", {"a": [None]}, '{"a": [null]}'),
        ("list<string>", ["a", 1, None], ["a", "1", None]),
        ("map<int64>", {"a": 1, "b": None}, [("a", 1), ("b", None)]),
        ("map<json>", {"a": {"b": 1}}, [("a", '{"b": 1}')]),
        ("list<map<string>>", [{"a": "b"}, {}], [[("a", "b")], []]),
    ],
)
def test_what_a_type_holds(kind: str, value: Any, held: Any) -> None:
    made, bad = column("x", kind, [None, value])
    assert (made.to_pylist(), bad) == ([None, held], {})


@pytest.mark.parametrize(
    ("kind", "value", "helps"),
    [
        ("int64", 5.5, "float64"),
        ("int64", "5", "string"),
        ("int64", True, "json"),
        ("int64", 2**64, "json"),
        ("float64", 2**53 + 1, "int64"),
        ("float64", 10**400, "json"),
        ("float64", "n/a", "string"),
        ("float64", [1], "json"),
        ("bool", 0, "json"),
        ("list<float64>", 1.5, "json"),
        ("list<float64>", [1.5, "a"], "json"),
        ("map<string>", [1], "json"),
        ("uint64", -1, "json"),
        ("uint64", 0.5, "float64"),
    ],
)
def test_what_does_not_fit_is_named_with_the_type_that_helps(
    kind: str, value: Any, helps: str
) -> None:
    good = {"bool": True, "map<string>": {"a": "b"}}.get(kind, [1.5] if "list" in kind else 7)
    made, bad = column("dc:score", kind, [good, value])
    assert made.null_count == 1
    assert list(bad) == [1]
    assert bad[1].startswith("field 'dc:score' does not fit its type: found ")
    assert bad[1].endswith(
        f"where the run has {kind}; `dc:score: {helps}` under additional_fields takes it"
    )
    assert len(bad[1]) < 300
    if helps == "float64" or helps == "string" or helps == "json":
        assert column("dc:score", helps, [good, value])[1] == {}


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("original_width", [5, None], "int64"),
        ("original_width", [None], "int64"),
        ("original_width", [5.5], "float64"),
        ("original_width", ["5"], "string"),
        ("caption", [None], "string"),
        ("caption", [5], "float64"),
        ("face_bboxes", [[]], "list<list<float64>>"),
        ("id", ["a"], "string"),
        ("of_my_own", [5], "float64"),
        ("of_my_own", [None], ""),
    ],
)
def test_known_fields_have_their_type_unless_the_values_are_of_another(
    name: str, values: list[Any], kind: str
) -> None:
    assert agreeable(name, values) == kind


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["json", "list<json>", "map<json>"])
def test_json_texts_are_strict(kind: str, odd: float) -> None:
    deep: Any = {"a": [1.5, {"b": odd}]}
    value = {"json": deep, "list<json>": [1, deep], "map<json>": {"k": deep}}[kind]
    held, bad = column("exif", kind, [None, value])
    assert held.to_pylist() == [None, None]
    assert "found" in bad[1]
    assert f"where the run has {kind}" in bad[1]


def test_a_column_of_strings_takes_what_no_json_holds() -> None:
    """As the reason of the misfit says."""
    (reason,) = column("exif", "json", [{"a": float("nan")}])[1].values()
    assert "`exif: string` under additional_fields takes it" in reason
    assert column("exif", "string", [{"a": float("nan")}])[0].to_pylist() == ['{"a": NaN}']


def test_the_cost_of_objects_grows_with_their_keys_alone() -> None:
    """Of 30,000 objects with 20 keys of their own each; a struct of them has 600,000 columns."""
    values = [{f"{i}-{j}": j for j in range(20)} for i in range(30_000)]
    for kind in (inferred(values), "map<int64>"):
        made, bad = column("tags", kind, values)
        assert (len(made), bad) == (30_000, {})
        assert not pa.types.is_struct(made.type)
        half, whole = (calls(column, "tags", kind, values[:n]) for n in (1000, 2000))
        assert whole < 2.1 * half
    half, whole = (calls(inferred, values[:n]) for n in (1000, 2000))
    assert whole < 2.1 * half
    assert json.loads(column("tags", "json", values[:1])[0][0].as_py()) == values[0]


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.list_(pa.list_(pa.float32())), pa.uint8(), pa.string(), pa.bool_(), pa.float64()),
        *(pa.list_(pa.binary()), pa.timestamp("us"), pa.date32(), pa.duration("s"), pa.float16()),
    ],
)
def test_types_have_names(kind: pa.DataType) -> None:
    assert arrow_type(name_of(kind)) == kind


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.null(), pa.list_(pa.null()), pa.struct([("a", pa.int8())]), pa.timestamp("us", "UTC")),
        *(pa.decimal128(3, 1), pa.list_(pa.struct([])), pa.dictionary(pa.int8(), pa.string())),
    ],
)
def test_what_has_no_name(kind: pa.DataType) -> None:
    assert name_of(kind) == ""


def test_entries_of_a_config() -> None:
    assert split("score: float64") == ("score", "float64")
    assert split("dc:title") == ("dc:title", "")
    assert split("a: b: list<int64>") == ("a: b", "list<int64>")
    assert is_field_type("map<list<json>>")
    assert not any(
        map(is_field_type, ["list<>", "float", "list<x>", "list<" * 9 + "bool" + ">" * 9])
    )
