"""Find the one type that holds all values of a JSON field, and make a column of it.

No cast loses anything: a value stays as it is, becomes its JSON text in a column of texts, or does
not fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import pyarrow as pa

from d2m_hpc.models.types import DEEPEST, KNOWN, misfit, parts

EXACT = 2**53
"""The largest integer up to which float64 holds all integers."""
SHOWN = 40
"""The most characters of a value in a message."""
DIRECT: dict[str, set[type]] = {
    "string": {str},
    "bool": {bool},
    "int64": {int},
    "uint64": {int},
    "float64": {int, float},
}
"""Python's types that Arrow converts by itself; Arrow refuses values that it would change."""
FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}
RANGES = {"int64": range(-(2**63), 2**63), "uint64": range(2**64)}
_parts = cache(parts)


def arrow_type(kind: str) -> pa.DataType:
    """Arrow's type for a type's name in `models.types`."""
    outer, inner = parts(kind)
    if outer == "list":
        return pa.list_(arrow_type(inner))
    if outer == "map":
        return pa.map_(pa.string(), arrow_type(inner))
    return pa.string() if kind == "json" else pa.type_for_alias(kind)


def name_of(kind: pa.DataType) -> str:
    """The name in `models.types` of Arrow's type, or Arrow's own; empty if there is none."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = name_of(kind.value_type)
        return f"list<{inner}>" if inner else ""
    if pa.types.is_map(kind):
        inner = name_of(kind.item_type)
        return f"map<{inner}>" if inner else ""
    if pa.types.is_large_string(kind):
        return "string"
    name = FLOATS.get(str(kind), str(kind))
    with suppress(ValueError):  # of structs, decimals, times in zones
        return name if name != "null" and pa.type_for_alias(name) == kind else ""
    return ""


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _strict(value: Any) -> str:
    """The JSON text of a value without NaN and infinity, which JSON lacks."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise _Misfit(value) from None


def inferred(values: Iterable[Any], depth: int = 0) -> str:
    """The type that holds all of some JSON values; empty if all are nulls or empty lists.

    Numbers are float64, or integers if float64 does not hold some of them. Lists of one type are
    lists. Objects, mixtures and deeper nesting are JSON text.
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
    """The type to agree on for a field, by a shard's values; empty if the values decide none.

    A field of a well-known data set gets its type there, if all values fit.
    """
    kind, known = inferred(values), KNOWN.get(name, "")
    if not known or kind == known:
        return kind
    if known == "string":
        return kind or known
    return known if not column(name, known, values)[1] else kind


def column(name: str, kind: str, values: Sequence[Any]) -> tuple[pa.Array, dict[int, str]]:
    """Make a column of values, with a null for each value that does not fit.

    Returns:
        The column, and by its place the reason why a value does not fit, with the declaration that
        helps.
    """
    wanted = arrow_type(kind)
    if set(map(type, values)) - {type(None)} <= DIRECT.get(kind, set()):
        try:
            return pa.array(values, wanted), {}
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            pass  # an integer is too large, and is found below
    held, bad = [None] * len(values), {}
    for place, value in enumerate(values):
        try:
            held[place] = _fitted(kind, value)
        except _Misfit as odd:
            bad[place] = _reason(name, kind, value, odd.value)
    return pa.array(held, wanted), bad


class _Misfit(Exception):
    """A value, or one within a list or an object, that does not fit the column's type."""

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
    """The declaration that takes a value and all values of the type so far."""
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


def _fitted(kind: str, value: Any) -> Any:
    """Convert a JSON value to a type; raise `_Misfit` if that loses anything."""
    given = type(value)
    if value is None or (kind == "float64" and given is float):
        return value
    if kind == "string":
        return value if given is str else json_text(value)
    if kind == "json":
        return _strict(value)
    if given is bool and kind == "bool":
        return value
    if given is int and kind == "float64" and _is_exact(value):
        return float(value)
    if kind in RANGES and (given is int or (given is float and value.is_integer())):
        if (whole := int(value)) in RANGES[kind]:
            return whole
    elif given is list or given is dict:
        outer, inner = _parts(kind)
        if outer == "list" and given is list:
            return [_fitted(inner, item) for item in value]
        if outer == "map" and given is dict:
            return [(key, _fitted(inner, item)) for key, item in value.items()]
    raise _Misfit(value)
