"""The records of tasks, one for each attempt at a shard: append-only lines, each synced to disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from d2m_hpc.run.attempts import Attempt
from d2m_hpc.storage.files import FILE_MODE, named
from d2m_hpc.storage.texts import escaped, json_escaped

DIED = "ProcessDied"
"""The kind of a failure in which the process died: it crashed, was killed, or stalled."""
DERIVED = "+"
"""Between the short hash of a config and that of its derived columns, where a pair has these."""
Order = tuple[int, int, float]
EARLIEST: Order = (-1, -1, float("-inf"))


def order(attempt: int, task: str, finished: float) -> Order:
    """The order of a record among its shard's records; a later record has a larger one.

    It is by the shard's attempt number, which a task takes under the shard's lease. Records of
    earlier versions, without such numbers, come first, by submission and then by clock: clocks
    differ between nodes.
    """
    submission = task.partition("-")[0]
    number = int(submission) if submission.isdecimal() else -1
    return attempt, number, 0.0 if attempt else finished


class Shard(NamedTuple):
    """One input tar.

    Attributes:
        stem: the name of its outputs.
        size: in bytes; None if not known.
    """

    stem: str
    url: str
    size: int | None = None


class Job(NamedTuple):
    """A shard to do, and how.

    Attributes:
        extends: the fingerprint of the finished pair to extend; empty to compute the whole shard.
        attempt: the number of the last attempt known to the submit.
        failures: how many attempts have failed, by the config at hand.
        alone: whether an attempt never ended, so the task holds no other shard meanwhile.
        again: whether to replace a pair made by that attempt or an earlier one.
        need: 0 for the usual memory and walltime; tasks take jobs of their own number only.
    """

    shard: Shard
    extends: str = ""
    attempt: int = 0
    failures: int = 0
    alone: bool = False
    again: bool = False
    need: int = 0

    @property
    def stem(self) -> str:
        return self.shard.stem

    def replaces(self, record: Record | None) -> bool:
        """Whether to replace the pair in the output folder, given its record."""
        return self.again and record is not None and record.attempt <= self.attempt


class Rejection(NamedTuple):
    """A sample, or a stray tar member, without a row."""

    key: str
    reason: str


@dataclass
class Record:
    """One finished or failed attempt at a shard.

    Attributes:
        shard: the shard's stem.
        state: `done` or `failed`.
        rows: rows written.
        attempt: the attempt's number; a later attempt at the shard has a larger one.
        rejections: every sample without a row, with its reason.
        notices: notes on the whole shard, which reject no sample.
        recomputed: rows that were computed again in float32 because they came out non-finite.
        fingerprint: the short hash of the config that made the outputs.
        npz_sha256, parquet_sha256: the hashes of the committed files.
        started, finished: seconds since the epoch, by the clock of the task's node; for display
            only.
        seconds: the times of stage, decode, wait, compute and write, which overlap.
        task: `submission-index-attempt` of the array task.
        error, kind, traceback: the reason of a failure.
        tar_size, tar_mtime_ns: the size and time of the local tar that was read.
        texts: the size and time of each local parquet of texts that only this shard has, by path.
        rebuilt: whether the record was lost and made again from the parquet's metadata.
    """

    shard: str
    state: Literal["done", "failed"]
    rows: int = 0
    rejections: list[Rejection] = field(default_factory=list)
    recomputed: int = 0
    fingerprint: str = ""
    npz_sha256: str = ""
    parquet_sha256: str = ""
    started: float = 0.0
    finished: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    task: str = ""
    host: str = ""
    error: str = ""
    kind: str = ""
    traceback: str = ""
    tar_size: int = 0
    tar_mtime_ns: int = 0
    rebuilt: bool = False
    attempt: int = 0
    notices: list[str] = field(default_factory=list)
    texts: dict[str, list[int]] = field(default_factory=dict)

    @property
    def order(self) -> Order:
        """The order among the shard's records; a later record has a larger one."""
        return order(self.attempt, self.task, self.finished)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v or k in ("shard", "state", "rows")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        """Make a record of its values; unknown keys, of a newer version, are dropped.

        Raises:
            ValueError, TypeError: the values are no record's.
        """
        if not isinstance(values, dict) or not isinstance(values.get("shard"), str):
            raise ValueError("not a record")
        known = {k: v for k, v in values.items() if k in _RECORD_FIELDS}
        known["rejections"] = [Rejection(*r[:2]) for r in known.get("rejections", ())]
        return cls(**known)


_RECORD_FIELDS = frozenset(f.name for f in fields(Record))


def died(stem: str, attempt: Attempt, fingerprint: str, error: str) -> Record:
    """Make the record of an attempt whose process died during the attempt."""
    return Record(
        stem,
        "failed",
        attempt=attempt.number,
        fingerprint=fingerprint,
        task=attempt.task,
        host=attempt.host,
        kind=DIED,
        error=error,
        finished=time.time(),
    )


def encode(record: Record) -> bytes:
    """Encode a record as a line: UTF-8 without control characters, its texts escaped and cut."""
    line = json.dumps(escaped(record.to_dict()), ensure_ascii=False, separators=(",", ":"))
    return json_escaped(line).encode() + b"\n"


APPENDS = 3
"""Tries to append; the third is for a filesystem whose inode numbers are unstable."""


class Recorder:
    """The only writer of a records file; a line is on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Record) -> None:
        data = encode(record)
        # A submit may rename the file, to merge it, after this task has opened the file. The merge
        # may have missed the line then, so the line is written once more.
        any(self._append(data) for _ in range(APPENDS))

    def _append(self, data: bytes) -> bool:
        """Write a line; return False if the file was renamed since this task opened it."""
        # One write of one line on O_APPEND; a line that a kill has torn lacks its newline.
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, FILE_MODE)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                data = b"\n" + data
            with named(self.path):
                while data:
                    data = data[os.write(fd, data) :]
                os.fsync(fd)
            with suppress(FileNotFoundError):
                return os.path.samestat(os.stat(self.path), os.fstat(fd))
            return False
        finally:
            os.close(fd)


def read_records(path: Path) -> Iterator[Record]:
    """Read the records of one file; a torn line was never committed, and is left out."""
    for values in read_values(path):
        with suppress(ValueError, TypeError):
            yield Record.from_dict(values)


def read_values(path: Path | str) -> Iterator[Any]:
    """Read the values of a file's lines; a value may be no record."""
    with open(path, "rb") as file:
        while lines := file.readlines(1 << 20):
            yield from _parsed(lines)


def _parsed(lines: Sequence[bytes]) -> list[Any]:
    """Parse lines at once, in two thirds of the time, or one by one if a line is no JSON."""
    text = b"[%b]" % b",".join(lines)
    with suppress(ValueError, RecursionError):
        values: list[Any] = json.loads(text.decode("utf-8", "surrogatepass"))
        if len(values) == len(lines):
            return values
    return [value for line in lines for value in _parsed([line])] if len(lines) > 1 else []
