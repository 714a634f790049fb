"""The configs that a run's shards were made by, kept to compare later ones with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.run.damage import undamaged
from d2m_hpc.run.extension import Fingerprint, obstacles, refits
from d2m_hpc.run.folder import RunDir, Submission
from d2m_hpc.run.manifest import Outcome
from d2m_hpc.storage.lease import Lease


@contextmanager
def working(submission: Submission) -> Iterator[None]:
    """Tell other submits that this `--local` one is at work, for as long as the block lasts."""
    lease = Lease(submission.local)
    lease.claim()
    try:
        yield
    finally:
        lease.release()


def of_local_submits(run: RunDir) -> set[str]:
    """The short hashes of the configs that `--local` submits work by now."""
    names = set()
    for submission in run.submissions():
        if submission.local.exists():
            lease = Lease(submission.local)
            if lease.claim():  # it was killed
                lease.release()
            else:
                names.add(str(json.loads(submission.intent.read_bytes())["fingerprint"]))
    return names


def newest(run: RunDir) -> str:
    """The short hash of the last submit's fingerprint; empty where there was none.

    Raises:
        D2MError: what tells it is damaged.
    """
    for submission in reversed(run.submissions()):
        path = submission.intent
        advice = "remove it and submit again with the config that the run has now"
        with suppress(FileNotFoundError), undamaged(path, advice):  # its submit was killed
            return str(json.loads(path.read_bytes())["fingerprint"])
    return ""


def extendable(outdated: Mapping[str, Outcome], config: Config) -> dict[str, str]:
    """Of finished shards, by stem, the fingerprints of those that need not be computed whole."""
    return {
        stem: made.fingerprint
        for stem, made in outdated.items()
        if not refits((reason for reason, _ in made.rejected), config)
    }


def require_growth(
    run: RunDir, name: str, stems: Sequence[str], now: Fingerprint, where: str
) -> dict[str, Any]:
    """An earlier fingerprint, of which nothing was lost or changed since.

    Args:
        name: its short hash.
        stems: of the shards that were made by it, for messages; none if live tasks will make them.
        now: the fingerprint of the config at hand.
        where: its file, for messages.

    Raises:
        ConfigError: with what differs.
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
    few = f"{len(stems)} shards ({', '.join(stems[:3])})" if stems else "what live tasks make"
    advice = (
        f"{few} of the run in {run.root} were made with other values, and take additional models, "
        "columns, features and fields only; restore the rest, take another output_metadata_dir, "
        "or set `reprocess: true` to compute these shards again"
    )
    raise ConfigError(where, [*mistakes, advice])
