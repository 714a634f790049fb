"""Decode a sample's text and JSON, and find the JSON's fields. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from typing import Any

from d2m_hpc.errors import Rejected
from d2m_hpc.storage.texts import safe

MARK = "\ufeff"
"""The byte order mark that some editors write in front of UTF-8, and that is no character of it."""


def text(data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix(MARK)
    except UnicodeDecodeError as error:
        raise Rejected(f"the text is not UTF-8: {error.reason} at byte {error.start}") from None


DEEPEST_JSON = 400
"""The deepest nesting of JSON; the library that reads it is recursive, and so is the one that
writes."""
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def _depth(data: bytes) -> int:
    """The depth of a JSON's nesting; 0 where it has too few brackets to be too deep."""
    if data.count(b"[") + data.count(b"{") <= DEEPEST_JSON:
        return 0
    depth = deepest = 0
    for found in _BRACKETS.finditer(data):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    return deepest


MOST_DIGITS = 4000
"""Digits of a number beyond floats; Python refuses integers of more than 4300."""


def _number(text: str) -> float:
    """Parse a float, or an integer beyond all floats, as `1e400` is no infinity; else
    `ValueError`."""
    value = float(text)
    if math.isfinite(value):
        return value
    with suppress(ArithmeticError):
        exact = Decimal(text)
        if exact.adjusted() < MOST_DIGITS and exact == exact.to_integral_value():
            return int(exact)
    raise ValueError(f"the number {text[:40]} is beyond what a column can hold")


_DECODER = json.JSONDecoder(parse_float=_number)


def json_object(data: bytes) -> dict[str, Any]:
    if _depth(data) > DEEPEST_JSON:
        raise Rejected(f"the JSON cannot be parsed: it nests more than {DEEPEST_JSON} deep")
    try:
        values = _DECODER.decode(data.decode(json.detect_encoding(data), "surrogatepass"))
    except UnicodeDecodeError as error:
        what = f"{error.encoding.upper()}: {error.reason} at byte {error.start}"
        raise Rejected(f"the JSON is not {what}") from None
    except (ValueError, RecursionError) as error:
        raise Rejected(f"the JSON cannot be parsed: {error}") from None
    if not isinstance(values, dict):
        raise Rejected(f"the JSON holds {type(values).__name__}, not an object")
    return values


def field(values: Any, name: str) -> Any:
    """The value of a field; None where there is none.

    A dot leads into a mapping, or into a text that holds JSON, as img2dataset keeps `exif`. A field
    whose own name has the dot comes first.
    """
    if isinstance(values, str) and values.startswith("{"):
        with suppress(Rejected):
            values = json_object(values.encode("utf-8", "surrogatepass"))
    if not isinstance(values, dict):
        return None
    if name in values:
        return values[name]
    parts = name.split(".")
    heads = (".".join(parts[:i]) for i in range(1, len(parts)))
    within = (field(values[h], name[len(h) + 1 :]) for h in heads if h in values)
    return next((value for value in within if value is not None), None)


def has_field(values: Mapping[str, Any], name: str) -> bool:
    """Whether a sample's JSON has a field, even as null; one within another needs a value."""
    return name in values or ("." in name and field(values, name) is not None)


def text_in(values: Mapping[str, Any], name: str) -> str:
    """The text in a field of a sample's JSON."""
    value = field(values, name)
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise Rejected(f"no text in the JSON's field {safe(name, 40)!r}: found {found}")
    return value.removeprefix(MARK)
