"""The record of a run that goes on by itself: what its user wants, and what each round found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

from d2m_hpc.run.damage import undamaged
from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage.files import atomic_write
from d2m_hpc.storage.texts import counted

IDLE = 2
"""Rounds that may come to nothing, one after another."""


@dataclass(frozen=True)
class Rounds:
    """How a run goes on by itself once it is submitted.

    Example:
        >>> Rounds(then="sbatch train.sh").most
        20

    Attributes:
        most: rounds after which the run stops, whatever is left.
        then: a shell line that becomes a job of its own once the run is complete.
        notify: a shell line that is run when the last round has ended, with `D2M_RUN` (the run
            folder), `D2M_STATE` (`complete` or `stopped`) and `D2M_WHY` in its environment.
    """

    most: int = 20
    then: str = ""
    notify: str = ""


@dataclass
class Round:
    """What a round found and did.

    Attributes:
        at: in epoch seconds.
        tries: failed attempts on record.
        trouble: why the round submitted nothing, though shards were left.
        taken: whether tasks of the round before were cancelled or lost by no fault of their own.
        causes: why tasks of the round before ended with shards left, as far as that is known.
    """

    at: float
    done: int
    shards: int
    tries: int
    trouble: str = ""
    taken: bool = False
    causes: list[str] = field(default_factory=list)


@dataclass
class Chain:
    """The rounds of a run since a user submitted it.

    Attributes:
        wish: how the user wants the run to go on.
        folder: where the user submitted the run.
        ended: why no further round follows; empty while one does.
        state: `running`, `complete` or `stopped`.
    """

    wish: Rounds
    folder: str
    rounds: list[Round] = field(default_factory=list)
    ended: str = ""
    state: str = "running"

    def end(self, state: str, why: str) -> None:
        self.state, self.ended = state, why

    def is_idle(self) -> bool:
        """Whether the last rounds have submitted tasks that neither finished nor tried a shard,
        all for one reason, and that nobody took away."""
        last = self.rounds[-IDLE - 1 :]
        if len(last) <= IDLE:
            return False
        same = len({(r.done, r.tries) for r in last}) == 1
        excused = any(r.trouble for r in last) or any(r.taken for r in last[1:])
        # A task that is killed once, and a disk that is full once, are no reason that lasts.
        lasting = set[str].intersection(*(set(r.causes) or {""} for r in last[1:]))
        return same and bool(lasting) and not excused

    def troubles(self) -> int:
        """The number of the last rounds, one after another, that could submit nothing."""
        return len([*takewhile(lambda r: r.trouble, reversed(self.rounds))])

    def __str__(self) -> str:
        # The last one may only have seen that there were enough.
        number = min(len(self.rounds), self.wish.most)
        what = f"{number} of at most {counted(self.wish.most, 'round')}"
        if trouble := self.rounds[-1].trouble if self.rounds else "":
            what += f"; the last submit failed: {trouble}"
        return f"{what}; {self.ended}" if self.ended else what


def read(run: RunDir) -> Chain | None:
    """The rounds of a run; None where the run does not go on by itself."""
    if not run.rounds.exists():
        return None
    with undamaged(run.rounds, "remove it, and submit again with --until-done"):
        told: dict[str, Any] = json.loads(run.rounds.read_bytes())
        wish, rounds = Rounds(**told.pop("wish")), [Round(**r) for r in told.pop("rounds")]
        return Chain(wish, rounds=rounds, **told)


def write(run: RunDir, chain: Chain) -> None:
    # The user's shell lines may hold secrets.
    atomic_write(run.rounds, json.dumps(asdict(chain), indent=1).encode(), private=True)
