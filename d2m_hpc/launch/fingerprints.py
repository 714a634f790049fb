"""The configs that a run's shards were made by, kept to compare later ones with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from d2m_hpc.config import Config
from d2m_hpc.config.growth import Fingerprint, obstacles, refits
from d2m_hpc.errors import ConfigError
from d2m_hpc.state.manifest import Outcome
from d2m_hpc.state.rundir import RunDir


def newest(run: RunDir) -> str:
    """The short hash of the last submit's fingerprint; empty where there was none."""
    for submission in reversed(run.submissions()):
        with suppress(FileNotFoundError):  # its submit was killed
            return str(json.loads(submission.intent.read_bytes())["fingerprint"])
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
    elif not (mistakes := obstacles(earlier := json.loads(path.read_bytes()), now)):
        return dict(earlier)
    few = f"{len(stems)} shards ({', '.join(stems[:3])})" if stems else "the shards of live tasks"
    advice = (
        f"{few} of the run in {run.root} were made with other values, and take additional models, "
        "columns, features and fields only; restore the rest, take another output_metadata_dir, "
        "or set `reprocess: true` to compute these shards again"
    )
    raise ConfigError(where, [*mistakes, advice])
