"""What is known of each shard: append-only records, and the state that follows from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from d2m_hpc.state.rundir import RunDir


class Shard(NamedTuple):
    """One input tar. `stem` names its outputs, `size` is in bytes or None when not known."""

    stem: str
    url: str
    size: int | None = None


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


class Recorder:
    """The one writer of one records file; a line is on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Record) -> None:
        line = json.dumps(record.to_dict(), ensure_ascii=False, separators=(",", ":")) + "\n"
        # One write of one line on O_APPEND; what a kill leaves of it has no newline.
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if not self._ends_whole():
                line = "\n" + line
            data = line.encode("utf-8", "surrogatepass")
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def _ends_whole(self) -> bool:
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            return size == 0 or (file.seek(size - 1) >= 0 and file.read(1) == b"\n")


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file; a torn line is one that was never committed."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = Record.from_dict(json.loads(line.decode("utf-8", "surrogatepass")))
            except (ValueError, TypeError):
                continue
            yield record


@dataclass
class Manifest:
    """The union of all records of a run.

    Attributes:
        done: the newest `done` record of each shard, by stem.
        failures: the `failed` records since then, by stem, oldest first.
    """

    done: dict[str, Record] = field(default_factory=dict)
    failures: dict[str, list[Record]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        if record.state == "failed":
            self.failures.setdefault(record.shard, []).append(record)
        if record.state != "done":
            return
        known = self.done.get(record.shard)
        if known is None or record.finished >= known.finished:
            self.done[record.shard] = record

    def settle(self) -> None:
        """A shard that is done now has no failures any more."""
        for failed in self.failures.values():
            failed.sort(key=lambda r: r.finished)
        for stem in self.done.keys() & self.failures.keys():
            finished = self.done[stem].finished
            later = [r for r in self.failures.pop(stem) if r.finished > finished]
            if later:
                self.failures[stem] = later

    @classmethod
    def of(cls, records: Iterable[Record]) -> Manifest:
        manifest = cls()
        for record in records:
            manifest.add(record)
        manifest.settle()
        return manifest

    @classmethod
    def load(cls, run: RunDir) -> Manifest:
        """Read every records file of a run."""
        paths = sorted(run.records.glob("*.jsonl")) if run.records.is_dir() else []
        return cls.of(record for path in paths for record in read_records(path))
