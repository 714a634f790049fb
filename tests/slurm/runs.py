"""Runs on the devcluster: a workload whose tasks can be held in mid-shard, and what came of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import STATS, d2m, submit, write_config, write_shards
from slurm.cluster import Cluster, wait_until
from test_resume import contents, leftovers, times_computed

from d2m_hpc.run.records import read_records
from d2m_hpc.watch.status import find_run, summarise
from d2m_hpc.watch.verify import verify

GATED = '''
import json
import os
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
ELEMENT = os.environ.get("SLURM_ARRAY_TASK_ID", "")
JOB = os.environ.get("SLURM_ARRAY_JOB_ID", "")
NODE = os.environ.get("SLURMD_NODENAME", "")
RANK = os.environ.get("SLURM_LOCALID", "0")
ATTEMPT = os.environ.get("SLURM_RESTART_COUNT", "0")


class Gated(torch.nn.Module):
    """Stops in mid-shard while the file `hold` or `hold-ELEMENT` is there, after so many shards."""

    name = "gated"
    raw_inputs = ["text"]
    preprocessors = ["identity"]
    dependencies = []
    to_device = False

    def __init__(self, device):
        super().__init__()
        self.batches = 0
        self.rest("load")

    def rest(self, name):
        """As long as a file says."""
        if (HERE / name).exists():
            time.sleep(float((HERE / name).read_text()))

    def forward(self, texts):
        self.batches += 1
        self.rest("pace")
        self.rest(f"pace-{NODE}")
        self.poison(texts)
        if self.batches % 2 == 0 and self.closed():
            self.say()
            while self.closed():
                time.sleep(0.02)
        return torch.tensor([float(len(t)) for t in texts])

    def poison(self, texts):
        """Die of a signal at a shard's captions, while the file `poison` names both."""
        try:
            number, shard = map(int, (HERE / "poison").read_text().split())
        except (FileNotFoundError, ValueError):
            return
        if any(int(text.split()[-1]) // 1000 == shard for text in texts):
            os.kill(os.getpid(), number)

    def closed(self):
        for path in (HERE / "hold", HERE / f"hold-{ELEMENT}"):
            try:
                if self.batches > 2 * int(path.read_text()):
                    return True
            except FileNotFoundError:
                pass
        return False

    def say(self):
        path = HERE / "held" / f"{JOB}_{ELEMENT}.{RANK}.{ATTEMPT}"
        where = {"pid": os.getpid(), "node": os.environ.get("SLURMD_NODENAME", "")}
        path.with_name(f".{path.name}").write_text(json.dumps(where))
        path.with_name(f".{path.name}").rename(path)


model_lookup = {"gated": Gated}
preprocessor_lookup = {}
postprocess_parquet_lookup = {"gated-length": lambda cache: cache["gated"]}
postprocess_feature_lookup = {}
'''
SAMPLES, BATCH = 10, 5
"""Two batches a shard: a task is held between them."""


@dataclass(frozen=True)
class Held:
    """A task that stands still in mid-shard; `element` as scontrol takes it."""

    element: str
    rank: int
    attempt: int
    pid: int
    node: str

    @property
    def index(self) -> int:
        return int(self.element.partition("_")[2])

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


@dataclass(frozen=True)
class Tars:
    """Shards, and what an undisturbed `--local` run makes of them."""

    folder: Path
    outputs: dict[str, Any]

    def of(self, shards: int) -> dict[str, Any]:
        stems = {f"{i:05d}" for i in range(shards)}
        return {name: value for name, value in self.outputs.items() if name[:5] in stems}


def config_of(folder: Path, tars: Path, shards: int, **more: Any) -> Path:
    """A config in `folder`, whose task can be held by files in it."""
    (folder / "held").mkdir(parents=True, exist_ok=True)
    (folder / "gated.py").write_text(GATED)
    values = {
        **STATS,
        "models": [*STATS["models"], "gated"],
        "postprocess_columns": [*STATS["postprocess_columns"], "gated-length"],
        "input_tars": str(tars / f"{{00000..{shards - 1:05d}}}.tar"),
        "output_metadata_dir": str(folder / "out"),
        "custom_pypath": str(folder / "gated.py"),
        "batch_size": BATCH,
        "nworkers": 1,
    }
    return write_config(folder / "c.yml", values, **more)


def make_tars(folder: Path, shards: int) -> Tars:
    """
    Raises:
        AssertionError: the undisturbed run failed.
    """
    write_shards(folder / "tars", shards, SAMPLES)
    ended = submit(config_of(folder, folder / "tars", shards))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Tars(folder / "tars", contents(folder / "out"))


class Run:
    """A user with one config.

    By default a task has a node for itself, so that two run at once.
    """

    def __init__(
        self, cluster: Cluster, tars: Tars, shards: int, folder: Path | None = None, **config: Any
    ) -> None:
        self.cluster, self.tars, self.shards = cluster, tars, shards
        self.folder = folder or cluster.folder
        slurm = {"partition": "low", "cpus_per_task": 4, **config.pop("slurm", {})}
        self.config = config_of(self.folder, tars.folder, shards, slurm=slurm, **config)
        self.out = self.folder / "out"
        self.run_dir = Path(config.get("run_dir", self.out / ".d2m"))

    # --- what a user does ---

    def submit(
        self, *options: object, code: int | None = 0, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        # The preflight imports the custom file, and that torch; one test has it on.
        ended = d2m("submit", self.config, "--no-preflight", *options, **how)
        assert code in (None, ended.returncode), ended.stdout + ended.stderr
        return ended

    def start_submit(self, *options: str) -> subprocess.Popen[str]:
        program = Path(sys.executable).with_name("d2m-submit")
        command = [str(program), str(self.config), "--no-preflight", *options]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def status(self) -> dict[str, Any]:
        return summarise(*find_run(self.run_dir)).to_dict()

    # --- what the test does to its tasks ---

    def hold(self, element: int | None = None, after: int = 0) -> None:
        """Stop every task, or one, in its next shard after so many; before it is submitted."""
        name = "hold" if element is None else f"hold-{element}"
        (self.folder / name).write_text(str(after))

    def let_go(self) -> None:
        for path in self.folder.glob("hold*"):
            path.unlink()

    def pace(self, seconds: float) -> None:
        """How long each batch takes."""
        (self.folder / "pace").write_text(str(seconds))

    def held(self) -> list[Held]:
        """The tasks that are or were held, by element and rank."""
        found = []
        for path in sorted((self.folder / "held").glob("[0-9]*")):
            element, rank, attempt = path.name.split(".")
            found.append(Held(element, int(rank), int(attempt), **json.loads(path.read_text())))
        return found

    def wait_held(self, count: int = 1, attempt: int = 0) -> list[Held]:
        def enough() -> list[Held]:
            found = [h for h in self.held() if h.attempt == attempt]
            return found if len(found) >= count else []

        return wait_until(enough)

    # --- what came of it ---

    def live(self) -> list[str]:
        """`element state` of each of the run's tasks that Slurm has in its queue."""
        shown = self.cluster.run("squeue", "-h", "-r", "-o", "%i %T %j").stdout
        return [
            " ".join(line.split()[:2])
            for line in shown.splitlines()
            if line.split()[2][:4] == "d2m-"
        ]

    def wait_over(self) -> None:
        """Until Slurm has no task of the run any more."""
        wait_until(lambda: not self.live())

    def job_ids(self) -> list[str]:
        """Of all arrays, by the run's own records."""
        return [a["job_id"] for s in self.submissions() for a in s]

    def submissions(self) -> list[list[dict[str, Any]]]:
        paths = sorted((self.run_dir / "submissions").glob("*/jobs.json"))
        return [json.loads(path.read_bytes()) for path in paths]

    def logs(self) -> str:
        """All that tasks and their batch scripts wrote."""
        paths = sorted((self.run_dir / "logs").glob("*"))
        return "".join(p.read_text() for p in paths if p.suffix in (".log", ".out"))

    def computed_by(self, task: str) -> set[str]:
        """The shards on record of one task."""
        return {r.shard for r in read_records(self.run_dir / "records" / f"{task}.jsonl")}

    def finish(self, *options: object) -> None:
        """What is left is done by at most one more submit."""
        self.let_go()
        self.wait_over()
        if self.status()["done"] < self.shards:
            self.submit(*options)
            self.wait_over()
        self.assert_complete()

    def assert_complete(self) -> None:
        """Every shard has one result, the one of an undisturbed run."""
        assert self.status()["done"] == self.shards, self.logs()
        assert contents(self.out) == self.tars.of(self.shards)
        assert times_computed(self.out) == Counter(f"{i:05d}" for i in range(self.shards))
        kept = re.compile(r"\.d2m/(nodes/.*\.json|hashes\.json|rounds\.json)")
        assert [f for f in leftovers(self.out) if not kept.fullmatch(f)] == []
        assert verify(*find_run(self.run_dir)).faults == []
