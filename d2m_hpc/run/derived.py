"""Derived columns: the files that their first steps have kept, and SQL over a shard's columns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from d2m_hpc.errors import D2MError, ShardError
from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage.texts import counted, nearest


def kept_file(run: RunDir, pattern: str) -> Path | None:
    """The file of one result; each is named `KEY-RESULT.npz`, by two hashes."""
    return next(run.derived.glob(f"{pattern}.npz"), None)


def kept_for(run: RunDir, digest: str) -> Path | None:
    """The file of an entry's first step, by the entry's hash in a fingerprint.

    Raises:
        D2MError: the file is gone.
    """
    result = digest.partition("-")[2]
    path = kept_file(run, f"*-{result}") if result else None
    if result and path is None:
        raise D2MError(f"{run.derived}: a file *-{result}.npz is gone; run `d2m derive` again")
    return path


KINDS = {"int64": "BIGINT", "float32": "FLOAT", "string": "VARCHAR", "bool": "BOOLEAN"}


_CLOCK = {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"}
"""Words of SQL that are calls without parentheses, unless a column has the name."""
_VARYING = """
    SELECT function_name FROM duckdb_functions() WHERE function_name != 'error' AND (
        stability = 'VOLATILE' OR stability = 'CONSISTENT_WITHIN_QUERY' AND len(parameters) = 0)
"""


def require_steady(expression: str, columns: list[str]) -> None:
    """Refuse SQL that gives other values each time, by DuckDB's own word on its functions.

    Raises:
        ShardError: it does.
    """
    import duckdb

    with duckdb.connect() as db:
        varying = {name for (name,) in db.execute(_VARYING).fetchall()}
        query = "SELECT json_serialize_sql(?)"
        [(tree,)] = db.execute(query, [f"SELECT ({expression}\n)"]).fetchall()
    clock = _CLOCK - {name.lower() for name in columns}
    for node in _nodes(json.loads(tree)):
        name = str(node.get("function_name", "")).lower()
        given = node.get("arguments", node.get("children", []))
        if (name == "age" and len(given) == 1) or name in varying:
            found = f"{name}()"
        elif len(names := node.get("column_names", [])) == 1 and names[0].lower() in clock:
            found = names[0]
        else:
            continue
        why = f"{found} gives another value each time; valid is what depends on the row alone"
        raise ShardError(f"found {expression!r}: {why}")


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(part)


def evaluated(expression: str, kind: str, table: pa.Table) -> pa.Array:
    """The value of an SQL expression for each row of a table; the expression can read no file.

    A NaN is null to it, as to `d2m select`: duckdb's is above all numbers.

    Raises:
        ShardError: the expression is wrong, or gives no value for each row.
    """
    import duckdb

    for place, column in enumerate(table.schema):
        if pa.types.is_float32(column.type) or pa.types.is_float64(column.type):
            values = table.column(place)
            without = pc.if_else(pc.is_nan(values), pa.scalar(None, column.type), values)
            table = table.set_column(place, column.name, without)
    with duckdb.connect() as db:
        rows = db.from_arrow(table)
        db.execute("SET threads = 1; SET memory_limit = '2GB'; SET temp_directory = ''")
        db.execute("SET enable_external_access = false; SET lock_configuration = true")
        try:
            value = f"CAST(({expression}\n) AS {KINDS[kind]}) AS value"
            found = rows.project(value).to_arrow_table()
        except duckdb.Error as error:
            why = str(error).splitlines()[0]
            if unknown := re.search(r'Referenced column "(.*?)" not found', why):
                why = f"unknown column {unknown[1]!r}{nearest(unknown[1], table.column_names)}"
            raise ShardError(f"found {expression!r}: {why}") from None
    if found.column_names != ["value"] or len(found) != len(table):
        given = f"{counted(len(found), 'row')} of {counted(len(found.column_names), 'column')}"
        what = f"{given} for {counted(len(table), 'row')}"
        raise ShardError(f"found {expression!r}, which gives {what}; valid is a value for each row")
    return found["value"].combine_chunks()
