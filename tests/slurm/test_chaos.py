"""Random faults, and a user who submits again until the run is complete."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable

from slurm.cluster import Cluster
from slurm.runs import Run, Tars

SECONDS = float(os.environ.get("D2M_CHAOS_SECONDS", "60"))
SHARDS = 40


class Chaos:
    """Does harm to a run; each fault says whether there was anything to harm."""

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.random = run, random.Random(seed)
        self.done: Counter[str] = Counter()

    def one(self) -> None:
        """A fault of a random kind."""
        fault: Callable[[], bool] = self.random.choice([self.kill, self.preempt, self.cancel])
        self.done[fault.__name__] += fault()

    def whole(self) -> bool:
        """Whether there was a fault of each kind."""
        return min(self.done[kind] for kind in ("kill", "preempt", "cancel")) > 0

    def kill(self) -> bool:
        command = f"^{sys.executable} -P -u -m d2m_hpc.worker {re.escape(str(self.run.run_dir))} "
        found = subprocess.run(["pgrep", "-f", command], capture_output=True, check=False).stdout
        if not found:
            return False
        try:
            os.kill(int(self.random.choice(found.split())), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def preempt(self) -> bool:
        running = [line for line in self.run.live() if line.endswith(" RUNNING")]
        node = self.random.choice(["n1", "n2"])
        where = ["--partition=high", "--exclusive", f"--nodelist={node}"]
        self.run.cluster.submit("true", *where)
        return bool(running)

    def cancel(self) -> bool:
        live = [line.split()[0] for line in self.run.live()]
        if not live:
            return False
        element = self.random.choice(live)
        whole = self.random.random() < 0.3
        job = element.partition("_")[0] if whole else element
        return self.run.cluster.run("scancel", job, check=False).returncode == 0


def test_faults_at_random_lose_nothing_and_double_nothing(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, SHARDS, shards_per_task=5)
    run.pace(SECONDS / 100)
    chaos = Chaos(run, seed=20261122)
    run.submit()
    end = time.monotonic() + SECONDS
    while run.status()["done"] < SHARDS and (time.monotonic() < end or not chaos.whole()):
        if not run.live() or chaos.random.random() < 0.2:
            run.submit()
            chaos.done["submit"] += 1
        time.sleep(chaos.random.uniform(0.5, 5))
        chaos.one()
    in_chaos = run.status()["done"]
    run.pace(0)
    run.wait_over()
    for _ in range(3):
        if run.status()["done"] < SHARDS:
            run.submit()
            run.wait_over()
    print(f"\n{dict(chaos.done)}, {in_chaos} shards done meanwhile")
    assert chaos.whole()
    assert '"failed"' not in "".join(p.read_text() for p in (run.run_dir / "records").iterdir())
    run.assert_complete()
