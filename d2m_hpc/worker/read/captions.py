"""A captions file: JSON lines, a CSV or a parquet with a row a picture, as `datasets` has them."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Container, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2m_hpc.models.preprocessors import Rejected
from d2m_hpc.worker.read import refusal
from d2m_hpc.worker.read.decode import json_object

NAME = "file_name"
"""The column with the pictures' paths, from the captions file's folder on."""
LONGEST = 64 << 20
"""Bytes of a line of JSON."""


def rows(path: str, folder: str, names: set[str]) -> dict[str, list[dict[str, Any]]]:
    """The rows on some files of a folder, by the files' names.

    Paths in the file are compared, and never opened.

    Raises:
        ShardError: the file cannot be read.
    """
    within = os.path.relpath(folder, os.path.dirname(path))
    start = "" if within == "." else f"{within}/"
    wanted = {start + name for name in names}
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for row in READERS[os.path.splitext(path)[1].lower()](path, wanted):
            if (name := row[NAME]) in wanted:
                found.setdefault(name[len(start) :], []).append(row)
    except KeyError:
        raise refusal.unreadable(path, f"a row has no {NAME!r}, the picture's path") from None
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise refusal.unreadable(path, f"it cannot be read: {error}") from None
    return found


def _of_jsonl(path: str, wanted: Container[str]) -> Iterator[dict[str, Any]]:
    number = 0
    with open(path, "rb") as file:
        while line := file.readline(LONGEST):
            number += 1
            if len(line) == LONGEST:
                raise ValueError(f"line {number} has {LONGEST:,} bytes or more")
            if line.strip():
                try:
                    yield json_object(line)
                except Rejected as error:
                    raise ValueError(f"line {number}: {error}") from None


def _of_csv(path: str, wanted: Container[str]) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, restkey="", restval=None)


def _of_parquet(path: str, wanted: Container[str]) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        for batch in file.iter_batches(1024, use_threads=False):
            for number, name in enumerate(batch.column(NAME).to_pylist()):
                if name in wanted:  # to make values of all rows takes far longer
                    yield batch.slice(number, 1).to_pylist()[0]


READERS: dict[str, Callable[[str, Container[str]], Iterator[dict[str, Any]]]] = {
    ".jsonl": _of_jsonl,
    ".csv": _of_csv,
    ".parquet": _of_parquet,
}
