"""What tasks write down of each attempt at a shard: append-only lines, each on disk at once."""

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
"""The kind of a failure of which the process died: it crashed, was killed, or stalled."""
Order = tuple[int, int, float]
EARLIEST: Order = (-1, -1, float("-inf"))


def order(attempt: int, task: str, finished: float) -> Order:
    """What tells which of a shard's records is the later one.

    The shard's own attempt number, which is given under its lease, tells it. Records from before
    there were such numbers come first, by their submission; clocks, which differ between nodes,
    are asked last.
    """
    submission = task.partition("-")[0]
    number = int(submission) if submission.isdecimal() else -1
    return attempt, number, 0.0 if attempt else finished


class Shard(NamedTuple):
    """One input tar.

    Attributes:
        stem: names its outputs.
        size: in bytes; None when not known.
    """

    stem: str
    url: str
    size: int | None = None


class Job(NamedTuple):
    """What a task is to do with a shard.

    Attributes:
        extends: the fingerprint of the shard's finished pair, of which only what that lacks is to
            be computed; empty where the shard is to be computed whole.
        attempt: the number of the last attempt that the submit knew of.
        failures: how many attempts have failed, by the config at hand.
        alone: an attempt never ended; while the shard is tried, the task holds no other.
        again: a pair that was made by that attempt or an earlier one is to be replaced.
    """

    shard: Shard
    extends: str = ""
    attempt: int = 0
    failures: int = 0
    alone: bool = False
    again: bool = False

    @property
    def stem(self) -> str:
        return self.shard.stem

    def replaces(self, record: Record | None) -> bool:
        """Whether the pair that lies there, with this record, is one to replace."""
        return self.again and record is not None and record.attempt <= self.attempt


class Rejection(NamedTuple):
    """A sample, or a stray tar member, that became no row."""

    key: str
    reason: str


@dataclass
class Record:
    """One finished or failed attempt at a shard.

    Attributes:
        shard: the shard's stem.
        state: `done` or `failed`.
        rows: rows written.
        attempt: the shard's own count of attempts; a later attempt has a larger one.
        rejections: every sample without a row, with its reason.
        notices: what was noted once of the whole shard, and makes no sample a rejection.
        recomputed: rows that were run again in float32 because they came out non-finite.
        fingerprint: of the config that made the outputs.
        npz_sha256, parquet_sha256: of the committed files.
        started, finished: seconds since the epoch, by the clock of the task's node; they are
            shown, and decide nothing.
        seconds: how long stage, decode, wait, compute and write took; they overlap.
        task: `submission-index-attempt` of the array task.
        error, kind, traceback: why a failed shard failed.
        tar_size, tar_mtime_ns: of the local tar that was read, in bytes and nanoseconds.
        rebuilt: the record was lost and made again from the parquet's metadata.
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

    @property
    def order(self) -> Order:
        """Larger than that of all earlier records of the shard."""
        return order(self.attempt, self.task, self.finished)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v or k in ("shard", "state", "rows")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        """Unknown keys are dropped: a newer version may have written more.

        Raises:
            ValueError, TypeError: these are no record's values.
        """
        if not isinstance(values, dict) or not isinstance(values.get("shard"), str):
            raise ValueError("not a record")
        known = {k: v for k, v in values.items() if k in _RECORD_FIELDS}
        known["rejections"] = [Rejection(*r[:2]) for r in known.get("rejections", ())]
        return cls(**known)


_RECORD_FIELDS = frozenset(f.name for f in fields(Record))


def died(stem: str, attempt: Attempt, fingerprint: str, error: str) -> Record:
    """An attempt at a shard whose process ended in the middle of it."""
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
    """A record's line: valid UTF-8 without raw control characters, its texts escaped and cut."""
    line = json.dumps(escaped(record.to_dict()), ensure_ascii=False, separators=(",", ":"))
    return json_escaped(line).encode() + b"\n"


APPENDS = 3
"""Tries to append; more than two are for a filesystem that knows its own files not again."""


class Recorder:
    """The one writer of one records file; a line is on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Record) -> None:
        data = encode(record)
        # A submit may set the file aside, to merge it, after it was opened here: whoever finds it
        # gone cannot know whether the line was seen, and writes it once more.
        any(self._append(data) for _ in range(APPENDS))

    def _append(self, data: bytes) -> bool:
        """Write a line; False where the file has moved since it was opened."""
        # One write of one line on O_APPEND; what a kill leaves of it has no newline.
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
    """The records of one file; a torn line is one that was never committed."""
    for values in read_values(path):
        with suppress(ValueError, TypeError):
            yield Record.from_dict(values)


def read_values(path: Path) -> Iterator[Any]:
    """What the lines of a file hold, records or not."""
    with open(path, "rb") as file:
        while lines := file.readlines(1 << 20):
            yield from _parsed(lines)


def _parsed(lines: Sequence[bytes]) -> list[Any]:
    """In one go, which takes two thirds of the time; one by one where any is no JSON."""
    text = b"[%b]" % b",".join(lines)
    with suppress(ValueError, RecursionError):
        values: list[Any] = json.loads(text.decode("utf-8", "surrogatepass"))
        if len(values) == len(lines):
            return values
    return [value for line in lines for value in _parsed([line])] if len(lines) > 1 else []
