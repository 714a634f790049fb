"""Record runs on the devcluster, which tests/watch/test_eta.py plays again.

python tests/slurm/record.py tests/watch/recorded.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from slurm.cluster import Cluster
from slurm.runs import Run, make_tars

from d2m_hpc.run.records import read_records
from d2m_hpc.run.tasks import attempts
from d2m_hpc.watch.status import find_run

TWO = {"cpus_per_task": 2}
RUNS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "waves of short tasks": (
        {"shards_per_task": 2, "steal": False, "slurm": TWO},
        {"pace": 2},
    ),
    "a throttled array": (
        {"shards_per_task": 4, "steal": False, "slurm": {**TWO, "max_parallel": 2}},
        {"pace": 1},
    ),
    "a throttled array whose tasks take from others": (
        {"shards_per_task": 4, "slurm": {**TWO, "max_parallel": 2}},
        {"pace": 1},
    ),
    "slow starts": ({"shards_per_task": 10, "slurm": TWO}, {"pace": 2, "load": 30}),
    "nodes of two speeds": ({"shards_per_task": 10, "slurm": TWO}, {"pace": 1, "pace-n2": 3}),
    "nodes of two speeds, each task its own shards": (
        {"shards_per_task": 4, "steal": False, "slurm": TWO},
        {"pace": 1, "pace-n2": 2},
    ),
}
"""By name: the config, and seconds to rest, by what `GATED` calls them."""


def record(run: Run) -> dict[str, Any]:
    """What was seen of a run until its end: its tasks, their shards, and the queue."""
    run.submit()
    queue = []
    while live := run.live():
        states = [line.split()[1] for line in live]
        counts = [states.count(state) for state in ("RUNNING", "PENDING")]
        queue.append([round(time.time(), 1), *counts])
        time.sleep(0.5)
    run.assert_complete()
    folder, config = find_run(run.run_dir)
    times: dict[str, list[float]] = {}
    for path in folder.records.iterdir():
        for made in read_records(path):
            times.setdefault(made.task, []).append(round(made.finished, 2))
    tasks = [
        {
            "task": task.task,
            "host": task.host,
            "started": round(task.started, 2),
            "ended": round(task.updated, 2),
            "planned": config.shards_per_task,
            "shards": task.shards,
            "finished": sorted(times.get(task.task, [])),
        }
        for task in attempts(folder)
    ]
    return {"queue": queue, "tasks": tasks}


def main(output: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tars, found = make_tars(folder / "tars", 40), {}
        for number, (what, (config, rests)) in enumerate(RUNS.items()):
            values = json.loads(json.dumps(config))
            cluster = Cluster(folder)
            run = Run(cluster, tars, 40, folder / str(number), **values)
            for file, seconds in rests.items():
                (run.folder / file).write_text(str(seconds))
            found[what] = {"steal": values.get("steal", True), **record(run)}
            print(what, len(found[what]["queue"]) / 2, "s")
    output.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
