"""What is known of each shard: append-only records, and the state that follows from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from sys import intern
from typing import Any, Literal, NamedTuple

from d2m_hpc.state.merge import listed
from d2m_hpc.state.rundir import FILE_MODE, RunDir
from d2m_hpc.state.texts import escaped, json_escaped


class Shard(NamedTuple):
    """One input tar.

    Attributes:
        stem: names its outputs.
        size: in bytes; None when not known.
        base: the fingerprint of its finished pair, which is to be extended; empty where the shard
            is to be computed whole.
    """

    stem: str
    url: str
    size: int | None = None
    base: str = ""


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
        rejections: every sample without a row, with its reason.
        recomputed: rows that were run again in float32 because they came out non-finite.
        fingerprint: of the config that made the outputs.
        npz_sha256, parquet_sha256: of the committed files.
        started, finished: seconds since the epoch.
        seconds: how long stage, decode, wait, compute and write took; they overlap.
        task: `submission-index-attempt` of the array task.
        error, kind, traceback: why a failed shard failed.
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
    rebuilt: bool = False

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
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
            return os.path.samestat(os.stat(self.path), os.fstat(fd))
        except FileNotFoundError:
            return False
        finally:
            os.close(fd)


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file; a torn line is one that was never committed."""
    for values in _read_values(path):
        with suppress(ValueError, TypeError):
            yield Record.from_dict(values)


def _read_values(path: Path) -> Iterator[Any]:
    """What the lines of a file hold, records or not."""
    with open(path, "rb") as file:
        while lines := file.readlines(1 << 20):
            yield from _parsed(lines)


def _parsed(lines: Sequence[bytes]) -> list[Any]:
    """In one go, which takes two thirds of the time; one by one where any is no JSON."""
    text = b"[%b]" % b",".join(lines)
    with suppress(ValueError):
        values: list[Any] = json.loads(text.decode("utf-8", "surrogatepass"))
        if len(values) == len(lines):
            return values
    return [value for line in lines for value in _parsed([line])] if len(lines) > 1 else []


class Outcome(NamedTuple):
    """What is held of a record in memory: all but the names of its samples and its traceback.

    Attributes:
        rejected: how many samples were rejected, by the start of their reason.
        The others are a `Record`'s.
    """

    finished: float
    started: float
    rows: int
    recomputed: int
    rejected: tuple[tuple[str, int], ...]
    fingerprint: str
    task: str
    host: str
    npz_sha256: str
    parquet_sha256: str
    kind: str
    error: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Outcome:
        """Straight from a record's values, for there are millions.

        Of a string that many of them have in common, one is held.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: these are no record's values.
        """
        get = values.get
        rejections = get("rejections")
        return cls(
            finished=float(get("finished", 0.0)),
            started=float(get("started", 0.0)),
            rows=get("rows", 0),
            recomputed=get("recomputed", 0),
            rejected=_by_reason(rejections) if rejections else (),
            fingerprint=intern(get("fingerprint", "")),
            task=intern(get("task", "")),
            host=intern(get("host", "")),
            npz_sha256=get("npz_sha256", ""),
            parquet_sha256=get("parquet_sha256", ""),
            kind=intern(get("kind", "")),
            error=get("error", ""),
        )


def gist(reason: str) -> str:
    """What a reason says before it goes into one sample's particulars."""
    return reason.split(":", 1)[0].split(";", 1)[0]


def _by_reason(rejections: Iterable[Sequence[str]]) -> tuple[tuple[str, int], ...]:
    """Counts by the gist of a reason."""
    counts: dict[str, int] = {}
    for rejection in rejections:
        start = gist(rejection[1])
        counts[start] = counts.get(start, 0) + 1
    return tuple((intern(start), count) for start, count in counts.items())


@dataclass
class Manifest:
    """The union of all records of a run.

    Attributes:
        done: what the newest `done` record of each shard says, by stem.
        failures: what the `failed` records since then say, by stem, oldest first.
    """

    done: dict[str, Outcome] = field(default_factory=dict)
    failures: dict[str, list[Outcome]] = field(default_factory=dict)

    def add(self, values: Any) -> None:
        """Take a record's values; what is no record is left out."""
        try:
            stem, state, outcome = values["shard"], values["state"], Outcome.of(values)
        except (LookupError, TypeError, ValueError, AttributeError):
            return
        if not isinstance(stem, str):
            return
        if state == "failed":
            self.failures.setdefault(stem, []).append(outcome)
        if state != "done":
            return
        known = self.done.get(stem)
        if known is None or outcome.finished >= known.finished:
            self.done[stem] = outcome

    def settle(self) -> None:
        """A shard that is done now has no failures any more; a line read twice is one failure."""
        for stem, failed in list(self.failures.items()):
            since = self.done[stem].finished if stem in self.done else float("-inf")
            self.failures[stem] = sorted({f for f in failed if f.finished > since})
            if not self.failures[stem]:
                del self.failures[stem]

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Manifest:
        """Of records' values, in any order."""
        manifest = cls()
        for values in lines:
            manifest.add(values)
        manifest.settle()
        return manifest

    @classmethod
    def load(cls, run: RunDir) -> Manifest:
        """Read every records file of a run, though a submit may be merging them."""
        return cls.of(all_values(run))


def all_values(run: RunDir) -> Iterator[Any]:
    """What the lines of all records files of a run hold, records or not; some may come twice."""
    for path in listed(run.records):
        with suppress(FileNotFoundError):
            yield from _read_values(path)
