"""The fingerprints of a run's earlier configs, kept to compare later configs with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.models.entries import name_of
from d2m_hpc.run.damage import undamaged
from d2m_hpc.run.extension import Fingerprint, obstacles, refits
from d2m_hpc.run.folder import RunDir, Submission
from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.records import DERIVED
from d2m_hpc.storage.lease import Lease, held
from d2m_hpc.storage.texts import counted, few


def base(made: str) -> str:
    """The part of a fingerprint without derived columns."""
    return made.partition(DERIVED)[0]


def wider(asked: str) -> str:
    """How fingerprints begin that have all that is asked for, and derived columns besides."""
    return asked + DERIVED if DERIVED not in asked else "/"


def meets(made: str, asked: str) -> bool:
    """Whether a pair by a fingerprint has all that another one asks for."""
    return made == asked or made.startswith(wider(asked))


@contextmanager
def working(submission: Submission) -> Iterator[None]:
    """Show other submits that this `--local` submit is at work, as long as the block lasts."""
    lease = Lease(submission.local)
    lease.claim()
    try:
        yield
    finally:
        lease.release()


def of_local_submits(run: RunDir) -> set[str]:
    """The short hashes of the configs of all `--local` submits that are at work."""
    by_lock = {submission.local: submission for submission in run.submissions()}
    at_work = [by_lock[lock].intent.read_bytes() for lock in held(by_lock)]
    return {str(json.loads(intent)["fingerprint"]) for intent in at_work}


def newest(run: RunDir) -> str:
    """The short hash of the last submit's fingerprint; empty before the first submit.

    Raises:
        D2MError: the file with the hash is damaged.
    """
    for submission in reversed(run.submissions()):
        path = submission.intent
        advice = "remove it and submit again with the config that the run has now"
        # A submit that was killed may have left no file.
        with suppress(FileNotFoundError), undamaged(path, advice):
            return str(json.loads(path.read_bytes())["fingerprint"])
    return ""


def in_known_order(run: RunDir, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint, its models in the order of the run's newest one if that has the same: the
    order changes no value, so finished pairs meet a config that lists its models otherwise."""
    models = {name_of(entry): entry for entry in fingerprint["models"]}
    with suppress(D2MError, OSError):  # told by those who need the files
        path = run.fingerprint(newest(run))
        with undamaged(path, ""):
            known = [name_of(entry) for entry in json.loads(path.read_bytes())["models"]]
            if models.keys() == {*known}:
                return {**fingerprint, "models": [models[name] for name in known]}
    return fingerprint


def extendable(outdated: Mapping[str, Outcome], config: Config) -> dict[str, str]:
    """The fingerprints of outdated shards that can be extended, by stem."""
    return {
        stem: made.fingerprint
        for stem, made in outdated.items()
        if not refits((reason for reason, _ in made.rejected), config)
    }


def require_growth(
    run: RunDir, name: str, stems: Sequence[str], now: Fingerprint, where: str
) -> dict[str, Any]:
    """Read an earlier fingerprint, which the config may only add to.

    Args:
        name: the fingerprint's short hash.
        stems: its finished shards, for messages; empty if live tasks will finish the first.
        now: the fingerprint of the config at hand.
        where: the config's file, for messages.

    Raises:
        ConfigError: the config differs in more than additions; names each difference.
    """
    path = run.fingerprint(name)
    if not path.exists():
        mistakes = [f"{path} is not there: nobody knows by what config some shards were made"]
    else:
        with undamaged(path, "nobody knows by what config some shards were made; restore it"):
            earlier = json.loads(path.read_bytes())
            mistakes = obstacles(earlier, now)
        if not mistakes:
            return dict(earlier)
    made_so = f"{counted(len(stems), 'shard')} ({few(stems)})" if stems else "what live tasks make"
    advice = (
        f"{made_so} of the run in {run.root} were made with other values, and take additional "
        "models, columns, features and fields only; restore the rest, take another "
        "output_metadata_dir, or set `reprocess: true` to compute these shards again"
    )
    one = len(mistakes) == 1
    raise ConfigError(where, [f"{mistakes[0]}; {advice}"] if one else [*mistakes, advice])
