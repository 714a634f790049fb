"""JSON values of a field as one type: which type holds them, and the values as a column of it.

Nothing is cast silently: a value is kept as it is, becomes its JSON text where the type says so, or
does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa

from d2m_hpc.models.types import DEEPEST, KNOWN, misfit, parts

EXACT = 2**53
"""Integers up to this are float64s."""
SHOWN = 40
DIRECT: dict[str, set[type]] = {
    "string": {str},
    "bool": {bool},
    "int64": {int},
    "uint64": {int},
    "float64": {int, float},
}
"""Types of Python that Arrow converts by itself, refusing what it would have to change."""
FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}
RANGES = {"int64": range(-(2**63), 2**63), "uint64": range(2**64)}


def arrow_type(kind: str) -> pa.DataType:
    """Arrow's type of a name as `models.types` has them."""
    outer, inner = parts(kind)
    if outer == "list":
        return pa.list_(arrow_type(inner))
    if outer == "map":
        return pa.map_(pa.string(), arrow_type(inner))
    return pa.string() if kind == "json" else pa.type_for_alias(kind)


def name_of(kind: pa.DataType) -> str:
    """The name of Arrow's type; empty where it tells nothing or has none of ours."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = name_of(kind.value_type)
        return f"list<{inner}>" if inner else ""
    if pa.types.is_map(kind):
        inner = name_of(kind.item_type)
        return f"map<{inner}>" if inner else ""
    if pa.types.is_large_string(kind):
        return "string"
    plain = pa.types.is_primitive(kind) or pa.types.is_string(kind)
    name = {"float": "float32", "double": "float64", "halffloat": "float16"}.get(
        str(kind), str(kind)
    )
    return name if plain and not pa.types.is_temporal(kind) else ""


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _strict(value: Any) -> str:
    """A text that every JSON parser takes: JSON has no NaN and no infinity."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise _Misfit(value) from None


def inferred(values: Iterable[Any], depth: int = 0) -> str:
    """The type that holds all of some JSON values; empty where nulls and empty lists tell none.

    Numbers are float64, or integers where some are beyond what that holds. Lists of one type are
    lists. Objects, mixtures and deeper nesting become JSON text.
    """
    given = [value for value in values if value is not None]
    types = set(map(type, given))
    if not types:
        return ""
    if types == {str}:
        return "string"
    if types == {bool}:
        return "bool"
    if types <= {int, float}:
        return _number(given)
    if types == {list}:
        items = [item for value in given for item in value]
        if depth + 1 == DEEPEST and any(isinstance(item, list) for item in items):
            return "json"
        inner = inferred(items, depth + 1)
        mixed = inner == "string" and not all(i is None or isinstance(i, str) for i in items)
        if inner == "json" or mixed:
            return "json"
        return f"list<{inner}>" if inner else ""
    return "string" if str in types else "json"


def _number(values: Sequence[float]) -> str:
    whole = [value for value in values if isinstance(value, int)]
    if all(-EXACT <= value <= EXACT for value in whole):
        return "float64"
    if len(whole) < len(values):
        return "float64" if all(map(_is_exact, whole)) else "json"
    return next((k for k, held in RANGES.items() if all(v in held for v in whole)), "json")


def agreeable(name: str, values: Sequence[Any]) -> str:
    """The type that a run agrees on for a field, by a shard's values; empty where they tell none.

    Fields of well-known data sets have the type that they have there, if the values are of it.
    """
    kind, known = inferred(values), KNOWN.get(name, "")
    if not known or kind == known:
        return kind
    if known == "string":
        return kind or known
    return known if not column(name, known, values)[1] else kind


def column(name: str, kind: str, values: Sequence[Any]) -> tuple[pa.Array, dict[int, str]]:
    """Values as a column, null where one does not fit.

    Returns:
        The column, and by its place why a value does not fit, with the declaration that helps.
    """
    wanted = arrow_type(kind)
    if set(map(type, values)) - {type(None)} <= DIRECT.get(kind, set()):
        try:
            return pa.array(values, wanted), {}
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            pass  # an integer that is too large; which one, a closer look tells
    fit, bad = _fitting(kind), {}
    held: list[Any] = [None] * len(values)
    for place, value in enumerate(values):
        try:
            held[place] = None if value is None else fit(value)
        except _Misfit as odd:
            bad[place] = _reason(name, kind, value, odd.value)
    return pa.array(held, wanted), bad


class _Misfit(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


def _reason(name: str, kind: str, value: Any, odd: Any) -> str:
    helps = _helping(kind, value)
    shown = json.dumps(odd)[:SHOWN]
    return (
        f"{misfit(name)}: found {shown} where the run has {kind}; "
        f"`{name}: {helps}` under additional_fields takes it"
    )


def _helping(kind: str, value: Any) -> str:
    """The declaration that takes a value and what the type held so far."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind in RANGES and isinstance(value, float):
        return "float64"
    if kind == "float64" and whole and value in RANGES["int64"]:
        return "int64"
    if not parts(kind)[1] and (kind == "json" or isinstance(value, str)):
        return "string"
    return "json"


def _is_exact(value: float) -> bool:
    """Whether float64 holds a number as it is."""
    try:
        return isinstance(value, float) or int(float(value)) == value
    except OverflowError:
        return False


def _fitting(kind: str) -> Callable[[Any], Any]:
    """What makes a value one of a type, or raises `_Misfit`."""
    outer, inner = parts(kind)
    if kind == "json":
        return _strict
    if kind == "string":
        return lambda value: value if isinstance(value, str) else json_text(value)
    if outer == "list":
        return _listing(_fitting(inner))
    if outer == "map":
        return _mapping(_fitting(inner))
    return {"bool": _bool, "float64": _float}.get(kind) or _whole(RANGES[kind])


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Misfit(value)
    return value


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_exact(value):
        raise _Misfit(value)
    return float(value)


def _whole(held: range) -> Callable[[Any], int]:
    def fit(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value not in held:
            raise _Misfit(value)
        return value

    return fit


def _listing(fit: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def fit_list(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise _Misfit(value)
        return [None if item is None else fit(item) for item in value]

    return fit_list


def _mapping(fit: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def fit_map(value: Any) -> list[tuple[str, Any]]:
        if not isinstance(value, dict):
            raise _Misfit(value)
        return [(key, None if item is None else fit(item)) for key, item in value.items()]

    return fit_map
