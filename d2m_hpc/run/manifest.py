"""The state of each shard that follows from all records of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from sys import intern
from typing import Any, NamedTuple

from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.merge import listed
from d2m_hpc.run.records import DERIVED, DIED, EARLIEST, Order, order, read_values

FAR = 1e13
"""More than any count or time that a record may have; a damaged one may have any."""


class Outcome(NamedTuple):
    """A record as it is held in memory: without the keys of samples and the traceback.

    Attributes:
        rejected: how many samples were rejected, by the gist of their reason.
        texts: the path, size and time of each file of texts or captions.
        The other attributes are those of `Record`.
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
    attempt: int
    notices: tuple[str, ...] = ()
    texts: tuple[tuple[str, int, int], ...] = ()

    @property
    def seconds(self) -> float:
        return max(self.finished - self.started, 1e-3)

    @property
    def is_starved(self) -> bool:
        """Whether the process was killed, as where memory runs out."""
        return self.kind == DIED and "killed by SIGKILL" in self.error

    @property
    def order(self) -> Order:
        """The order among a shard's records; a later record has a larger one."""
        return order(self.attempt, self.task, self.finished)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Outcome:
        """Make an outcome of a record's values, at once, for there are millions.

        Strings that many records have in common are held once.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: the values are no record's.
        """
        get = values.get
        rejections, notices = get("rejections"), get("notices")
        rows, recomputed = get("rows", 0), get("recomputed", 0)
        finished, started = float(get("finished", 0.0)), float(get("started", 0.0))
        if not (0 <= rows + recomputed < FAR and 0 <= started + finished < FAR):
            raise ValueError("no counts or no times")
        # In the order of the fields: passing them by name takes half as long again.
        return cls._make(
            (
                finished,
                started,
                rows,
                recomputed,
                _by_reason(rejections) if rejections else (),
                intern(get("fingerprint", "")),
                intern(get("task", "")),
                intern(get("host", "")),
                get("npz_sha256", ""),
                get("parquet_sha256", ""),
                intern(get("kind", "")),
                intern(get("error", "")),
                int(get("attempt", 0)),
                tuple(map(intern, notices)) if notices else (),
                tuple((intern(path), size, time) for path, (size, time) in texts.items())
                if (texts := get("texts"))
                else (),
            )
        )


def gist(reason: str) -> str:
    """The start of a reason, which many samples have in common, with the text that it is about."""
    start = reason.find(": ") + 2 if reason.startswith("text:") else 0
    return reason[:start] + re.split(r":(?=\s|$)|;", reason[start:], maxsplit=1)[0]


def _by_reason(rejections: Iterable[Sequence[str]]) -> tuple[tuple[str, int], ...]:
    """Count rejections by the gist of their reasons."""
    counts: dict[str, int] = {}
    for rejection in rejections:
        start = gist(rejection[1])
        counts[start] = counts.get(start, 0) + 1
    return tuple((intern(start), count) for start, count in counts.items())


@dataclass
class Manifest:
    """The union of all records of a run.

    Attributes:
        done: the newest `done` record of each shard, by stem.
        failures: the `failed` records since then, by stem, oldest first.
        underived: where that record is of derived columns, the newest one before them, by stem.
    """

    done: dict[str, Outcome] = field(default_factory=dict)
    failures: dict[str, list[Outcome]] = field(default_factory=dict)
    underived: dict[str, Outcome] = field(default_factory=dict)

    def computed(self, done: Mapping[str, Outcome]) -> Mapping[str, Outcome]:
        """The records of finished shards from when their models ran, as `d2m derive` runs none."""
        return {stem: self.underived.get(stem, outcome) for stem, outcome in done.items()}

    def add(self, values: Any) -> None:
        """Add a record by its values; values of no record are left out."""
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
        newer = known = self.done.setdefault(stem, outcome)
        if outcome.order >= known.order:
            self.done[stem] = newer = outcome
            outcome = known
        if DERIVED in newer.fingerprint and DERIVED not in outcome.fingerprint:
            latest = self.underived.get(stem, outcome)
            self.underived[stem] = max(latest, outcome, key=attrgetter("order"))

    def settle(self) -> None:
        """Drop failures that a later `done` record makes void, and count lines read twice once."""
        for stem in [s for s in self.underived if DERIVED not in self.done[s].fingerprint]:
            del self.underived[stem]
        for stem, failed in list(self.failures.items()):
            since = self.done[stem].order if stem in self.done else EARLIEST
            later = {f for f in failed if f.order > since}
            self.failures[stem] = sorted(later, key=lambda f: f.order)
            if not later:
                del self.failures[stem]

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Manifest:
        """Make a manifest of records' values, in any order."""
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
    """Read the values of all lines of all records files; a line may come twice or be no record."""
    for path in listed(run.records):
        with suppress(FileNotFoundError):
            yield from read_values(path)
