"""Find the widest type of each column over many parquets, in duckdb's words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

FLOATS = ("FLOAT", "DOUBLE")
_SIGNED = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
INTEGERS = (*_SIGNED, *(f"U{kind}" for kind in _SIGNED))
NUMBERS = (*FLOATS, *INTEGERS)
TEXT = "VARCHAR"
NULL = '"NULL"'
_SMALL = tuple(kind for kind in INTEGERS if kind.endswith(("TINYINT", "SMALLINT")))
_WIDE = tuple(kind for kind in INTEGERS if kind.endswith(("BIGINT", "HUGEINT")))


def quoted(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    """A text in SQL."""
    return "'" + value.replace("'", "''") + "'"


def literal(path: str) -> str:
    """A path as a pattern for this path alone: `[ ] ? *` in names are no wildcards."""
    return re.sub(r"([\[*?])", r"[\1]", path)


def listed(paths: Iterable[str]) -> str:
    """Files in SQL, for duckdb's table functions."""
    return f"[{', '.join(text(literal(path)) for path in paths)}]"


def is_lossy(kind: str, wide: str) -> bool:
    """Whether a cast may change a number."""
    return kind in _WIDE and wide in FLOATS


class Layout(NamedTuple):
    """Files of one group with the same columns and types.

    Attributes:
        kinds: each column's type; one mapping for all groups with this layout.
    """

    kinds: dict[str, str]
    paths: tuple[str, ...]


class Widest:
    """Collects columns' types from footers, one group of files after another."""

    def __init__(self, db: DuckDBPyConnection) -> None:
        self._db = db
        self._known: dict[int, dict[str, str]] = {}
        self._renamed: dict[str, str] = {}
        self._groups: list[list[Layout]] = []

    def add(self, paths: Sequence[str]) -> list[Layout]:
        """The layouts in a group; one where all files have the same schema."""
        parts = "row(name, type, repetition_type, num_children, converted_type, logical_type)"
        rows = self._db.execute(
            f"SELECT hash(layout), list(file_name) FROM (SELECT file_name, list({parts}) AS layout "
            f"FROM parquet_schema({listed(paths)}) GROUP BY file_name) GROUP BY ALL"
        ).fetchall()
        layouts = []
        for found, files in rows:
            if found not in self._known:
                self._known[found] = self._described(files[0])
            # The given paths, so that no path is in memory twice.
            layouts.append(Layout(self._known[found], tuple(paths if len(rows) == 1 else files)))
        self._groups.append(layouts)
        return layouts

    @cached_property
    def _found(self) -> dict[str, set[str]]:
        """The types of each column.

        A text column of nulls alone counts for nothing beside another type: earlier versions wrote
        fields without a value like that.
        """
        found: dict[str, set[str]] = {}
        for kinds in self._known.values():
            for name, kind in kinds.items():
                found.setdefault(name, set()).update({kind} - {NULL})
        for name, types in found.items():
            if TEXT in types and len(types) > 1 and not self._has_text(name):
                types.remove(TEXT)
        return found

    def columns(self) -> dict[str, str]:
        """Each column's widest type."""
        return {name: self._wider(kinds) for name, kinds in self._found.items()}

    def notices(self) -> list[str]:
        """A line for each column that is text in some shards only, or has another name here."""
        return [
            f"the column {name!r} is {other!r} here: in conditions, names that differ in capital "
            "letters alone are one"
            for other, name in self._renamed.items()
        ] + [
            f"{name!r} is text in some shards and {', '.join(sorted(kinds - {TEXT})).lower()} in "
            "others; conditions see it as text"
            for name, kinds in self._found.items()
            if TEXT in kinds and len(kinds) > 1
        ]

    def _described(self, path: str) -> dict[str, str]:
        found = self._db.execute(f"DESCRIBE FROM read_parquet({listed([path])})").fetchall()
        kinds: dict[str, str] = {row[0]: row[1] for row in found}
        schema = self._db.execute(
            f"SELECT name, logical_type FROM parquet_schema({listed([path])})"
        ).fetchall()
        # duckdb renames the second of two names that are one without regard to capitals.
        for other in kinds.keys() - {name for name, _ in schema}:
            for name, _ in schema:
                if name not in kinds and other.lower().startswith(f"{name.lower()}_"):
                    self._renamed[other] = name
        # duckdb before 2.0 describes a column of type null as one of integers.
        return kinds | dict.fromkeys((n for n, kind in schema if kind == "NullType()"), NULL)

    def _has_text(self, name: str) -> bool:
        """Whether a column that is text in some files has a value in any of these."""
        for layouts in self._groups:
            paths = [p for found in layouts if found.kinds.get(name) == TEXT for p in found.paths]
            if paths:
                values = f"SELECT 1 FROM read_parquet({listed(paths)}) WHERE {quoted(name)} NOTNULL"
                if self._db.execute(f"{values} LIMIT 1").fetchone():
                    return True
        return False

    def _wider(self, kinds: set[str]) -> str:
        if len(kinds) < 2 or TEXT in kinds:
            return next(iter(kinds)) if len(kinds) == 1 else TEXT
        if kinds <= {*NUMBERS} and kinds & {*FLOATS} and kinds - {*FLOATS, *_SMALL}:
            return "DOUBLE"  # duckdb would choose FLOAT, of 24 bits
        union = " UNION ALL ".join(f"SELECT NULL::{kind} AS x" for kind in sorted(kinds))
        found = self._db.execute(f"DESCRIBE {union}").fetchall()
        return str(found[0][1])
