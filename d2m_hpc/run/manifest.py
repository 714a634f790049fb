"""What is known of each shard: the state that follows from all records of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from sys import intern
from typing import Any, NamedTuple

from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.merge import listed
from d2m_hpc.run.records import EARLIEST, Order, order, read_values

FAR = 1e13
"""More than any count or time that a record may have; a damaged one may have any."""


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
    attempt: int
    notices: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return max(self.finished - self.started, 1e-3)

    @property
    def order(self) -> Order:
        """Larger than that of all earlier records of the shard."""
        return order(self.attempt, self.task, self.finished)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Outcome:
        """Straight from a record's values, for there are millions.

        Of a string that many of them have in common, one is held.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: these are no record's values.
        """
        get = values.get
        rejections, notices = get("rejections"), get("notices")
        rows, recomputed = get("rows", 0), get("recomputed", 0)
        finished, started = float(get("finished", 0.0)), float(get("started", 0.0))
        if not (0 <= rows + recomputed < FAR and 0 <= started + finished < FAR):
            raise ValueError("no counts or no times")
        # In the order of the fields: by their names, a tuple takes half as long again.
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
            )
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
        if known is None or outcome.order >= known.order:
            self.done[stem] = outcome

    def settle(self) -> None:
        """A shard that is done now has no failures any more; a line read twice is one failure."""
        for stem, failed in list(self.failures.items()):
            since = self.done[stem].order if stem in self.done else EARLIEST
            later = {f for f in failed if f.order > since}
            self.failures[stem] = sorted(later, key=lambda f: f.order)
            if not later:
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
            yield from read_values(path)
