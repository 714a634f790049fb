"""A captions file: JSON lines, a CSV or a parquet with a row a picture, as `datasets` has them."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2m_hpc.errors import Rejected
from d2m_hpc.run.slices import owner
from d2m_hpc.storage.texts import few
from d2m_hpc.worker.read import refusal
from d2m_hpc.worker.read.parse import json_object

NAME = "file_name"
"""The column with the pictures' paths, from the captions file's folder on."""
NOT_UTF8 = "it cannot be read: it is not UTF-8; save it as UTF-8"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""The beginnings of what Windows calls Unicode."""
_PLACE = re.compile(r": line 1 (column \d+) \(char \d+\)")
LONGEST = 64 << 20
"""Bytes of a line of JSON."""


def rows(path: str, wanted: Wanted) -> dict[str, list[dict[str, Any]]]:
    """The rows on some files of a folder, by the files' names.

    Paths in the file are compared, and never opened.

    Raises:
        ShardError: the file cannot be read.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for row in READERS[os.path.splitext(path)[1].lower()](path, wanted):
            if name := wanted.name_of(wanted.path_of(row.get(NAME), row)):
                found.setdefault(name, []).append(row)
    except UnicodeDecodeError:
        raise refusal.unreadable(path, NOT_UTF8) from None
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise refusal.unreadable(path, f"it cannot be read: {error}") from None
    if wanted.nameless and not wanted.is_named:
        what = f"no row has {NAME!r}, the picture's path, as a text; it has "
        raise refusal.unreadable(path, what + (few(wanted.columns) or "nothing"))
    return found


class Wanted(Container[str]):
    """The paths of some files of a folder as a captions file may have them.

    Attributes:
        nameless: rows so far that have no path.
        columns: what the first of them has.
        is_named: whether a row has a path.

    Args:
        path: the captions file.
        names: the files' names.
        listed: these names and all that differ from one of them by the form of letters alone.
        span: names from the first text on, and before the second, may be of interest if they are
            not listed.
        on_other: called with each such name.
    """

    def __init__(
        self,
        path: str,
        folder: str,
        names: set[str],
        listed: set[str],
        span: tuple[str, str],
        on_other: Callable[[str], None],
    ) -> None:
        within = os.path.relpath(folder, os.path.dirname(path))
        self._start = start = "" if within == "." else f"{within}/"
        self._names = {start + name: name for name in names}
        self._listed = {start + name for name in listed}
        self._owner, self._on_other = owner(self._listed), on_other
        self._low, self._high = start + span[0], start + span[1]
        self.nameless, self.is_named = 0, False
        self.columns: list[str] = []

    def path_of(self, name: object, columns: Iterable[str]) -> str:
        """A picture's path as it is compared, which `find .` writes with a dot in front; empty for
        a row that has none, which is counted."""
        if not isinstance(name, str) or not name:
            self.columns = self.columns if self.nameless else sorted(columns)
            self.nameless += 1
            return ""
        self.is_named = True
        return name.removeprefix("./")

    def __contains__(self, path: object) -> bool:
        return self.name_of(str(path)) != ""

    def name_of(self, path: str) -> str:
        """The file's name; empty for a path of none."""
        name = self._names.get(self._owner(path), "")
        # Most rows are of other shards; of these, no more is looked at.
        if not name and self._low <= path < self._high and self._owner(path) not in self._listed:
            other = path[len(self._start) :]
            if path.startswith(self._start) and "/" not in other:
                self._on_other(other)
        return name


def _of_jsonl(path: str, wanted: Wanted) -> Iterator[dict[str, Any]]:
    number = 0
    with open(path, "rb") as file:
        if file.peek(2)[:2] in UTF16:  # a line ends within a character of it
            raise ValueError("it is UTF-16; save it as UTF-8")
        while line := file.readline(LONGEST):
            number += 1
            if len(line) == LONGEST:
                raise ValueError(f"line {number} has {LONGEST:,} bytes or more")
            if line.strip():
                try:
                    yield json_object(line)
                except Rejected as error:
                    what = _PLACE.sub(r" at \1", str(error))
                    raise ValueError(f"line {number}: {what}") from None


def _of_csv(path: str, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Read rows; a quote or a comma in its wrong place would give a picture part of its text."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        names = [name for name in rows.fieldnames or () if name]
        if len({*names}) < len(names):
            raise ValueError("two of its columns have one name")
        if len(names) == 1 and NAME in names[0] != NAME:
            raise ValueError(f"its first line is {names[0]!r}; take commas between values")
        while row := _next(rows):
            more = any(row.pop(None, None) or ())
            row.pop("", None)  # the numbers of rows, as pandas writes them
            if more or None in row.values():
                what = f"line {rows.line_num} has {'more' if more else 'fewer'} values than the "
                what += f"first line has names; a value with a {'comma' if more else 'line break'}"
                raise ValueError(f"{what} stands in double quotes")
            yield row


def _next(rows: csv.DictReader[str]) -> dict[str | Any, Any] | None:
    """The next row; None behind the last."""
    first = rows.line_num + 1
    try:
        return next(rows, None)
    except csv.Error as error:
        is_open = "unexpected end" in str(error)
        what = "has a double quote that is not closed" if is_open else f"cannot be read: {error}"
        raise ValueError(f"the row that begins in line {first} {what}") from None


def _of_parquet(path: str, wanted: Wanted) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        names = file.schema_arrow.names
        for batch in file.iter_batches(1024, use_threads=False):
            paths = batch.column(NAME).to_pylist() if NAME in names else [None] * len(batch)
            for number, name in enumerate(paths):
                if wanted.path_of(name, names) in wanted:  # values of all rows take far longer
                    yield batch.slice(number, 1).to_pylist()[0]


READERS: dict[str, Callable[[str, Wanted], Iterator[dict[str, Any]]]] = {
    ".jsonl": _of_jsonl,
    ".csv": _of_csv,
    ".parquet": _of_parquet,
}
