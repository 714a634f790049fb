"""A matrix of faults, by a seed, and a user who submits again until the run is complete.

By default each kind is done once. By hand, for an hour or more:

    D2M_CHAOS_FAULTS=1000 D2M_CHAOS_SEED=7 pytest -s tests/slurm/test_chaos.py

With `D2M_CHAOS_BY_ITSELF=1` the run goes on by `--until-done`, and no user submits what is left;
with `alone` in place of 1 the kinds of faults that users do are left out, too.

Its last line counts faults by kind, and shards lost, doubled or with wrong outputs.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from slurm.chaos import KINDS, USERS, Account, Chaos, Truth, order
from slurm.cluster import Cluster
from slurm.runs import Tars

FAULTS = int(os.environ.get("D2M_CHAOS_FAULTS", len(KINDS)))
SEED = int(os.environ.get("D2M_CHAOS_SEED", "20261122"))
BY_ITSELF = os.environ.get("D2M_CHAOS_BY_ITSELF", "")
SHARDS = 40
ROUND = 48
"""Faults of a round at most: the last shard's task would be hit again and again as it starts."""


def test_faults_of_every_kind_lose_nothing_and_double_nothing(
    cluster: Cluster, tars: Tars, tmp_path: Path
) -> None:
    """In rounds, each of a run of its own, until so many faults were done."""
    truth, total, seeds = Truth(tars, tmp_path), Account(), random.Random(SEED)
    kinds = order(SEED, set(KINDS) - USERS if BY_ITSELF == "alone" else KINDS)
    while (done := total.faults.total()) < FAULTS:
        seed = seeds.randrange(2**32)
        folder = tmp_path / f"after-{done}-{seed}"
        chaos = Chaos(cluster, tars, SHARDS, folder, seed, bool(BY_ITSELF))
        try:
            chaos.go(kinds, min(ROUND, FAULTS - done))
            chaos.heal()
        finally:
            account = chaos.close(truth)
        print(f"\nseed {seed}: {account}", flush=True)
        total.add(account)
    print(f"\nall, seed {SEED}: {total}", flush=True)
    assert (total.lost, total.doubled, total.wrong) == ([], [], [])
    assert (total.unfinished, total.tracebacks) == ([], [])
