"""The time left, against what it was: runs recorded on the devcluster, played again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.records import Record
from d2m_hpc.run.tasks import Progress
from d2m_hpc.watch.eta import seconds_left

RUNS: dict[str, Any] = json.loads(Path(__file__).with_name("recorded.json").read_text())
"""By tests/slurm/record.py, which says how each was made."""
SHARDS = 40


def seen(task: dict[str, Any], now: float) -> Progress:
    """A task's progress as it was read at a moment."""
    done = sum(at <= now for at in task["finished"])
    over = task["ended"] <= now
    return Progress(
        task["task"],
        task["host"],
        shards=task["shards"] if over else max(task["planned"], done),
        done=done,
        started=task["started"],
        updated=task["ended"] if over else now,
        state="finished" if over else "running",
    )


def predicted(run: dict[str, Any], now: float) -> float | None:
    tasks = [seen(t, now) for t in run["tasks"] if t["started"] <= now]
    done = [
        Outcome.of(Record("x", "done", task=t["task"], started=at, finished=at).to_dict())
        for t in run["tasks"]
        for at in t["finished"]
        if at <= now
    ]
    running, pending = [(r, p) for at, r, p in run["queue"] if at <= now][-1]
    left = SHARDS - len(done)
    return seconds_left(
        now, tasks, done, left, steal=run["steal"], running=running, pending=pending
    )


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", RUNS)
def test_the_time_left_is_right_within_a_fifth(name: str, share: float) -> None:
    run = RUNS[name]
    ends = sorted(at for task in run["tasks"] for at in task["finished"])
    now = ends[int(share * SHARDS) - 1] + 1.0
    told = predicted(run, now)
    assert told is not None
    assert told == pytest.approx(ends[-1] - now, rel=0.2)


@pytest.mark.parametrize("name", RUNS)
def test_the_time_left_is_known_once_a_shard_is_done(name: str) -> None:
    run = RUNS[name]
    ends = sorted(at for task in run["tasks"] for at in task["finished"])
    looks = [at for at, *_ in run["queue"] if ends[0] <= at < ends[-1]]
    assert None not in [predicted(run, at) for at in looks]
    assert predicted(run, ends[0] - 0.1) is None


def test_the_time_between_two_submissions_is_no_gap_between_tasks() -> None:
    """A third submission waits: its task was said to begin a day after another's end, as before."""
    day = 86400.0
    tasks = [
        Progress(f"{i:03d}-0-0", "a", "cpu", done=2, started=at, updated=at + 20, state="finished")
        for i, at in enumerate((0.0, day))
    ]
    done = [
        Outcome.of(Record("x", "done", task=t.task, started=at - 10, finished=at).to_dict())
        for t in tasks
        for at in (t.started + 10, t.started + 20)
    ]
    told = seconds_left(day + 30, tasks, done, 1, steal=False, running=0, pending=1)
    assert told is not None
    assert told < 60
