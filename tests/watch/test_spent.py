"""What became of the time of a run's tasks."""

from __future__ import annotations

import time
from typing import Any

import pytest

from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.records import DIED, Record
from d2m_hpc.run.tasks import Progress
from d2m_hpc.watch.spent import Limits, Spent, account, limits

HOUR = 3600.0


def outcome(task: str, started: float, finished: float) -> Outcome:
    hours = {"started": started * HOUR, "finished": finished * HOUR}
    return Outcome.of(Record("x", "done", task=task, **hours).to_dict())


def task(name: str, until: float, state: str, **more: Any) -> Progress:
    return Progress(name, shard="x", started=0.0, updated=until * HOUR, state=state, **more)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("finished", Spent(useful=5, idle=3)),
        ("stopped", Spent(useful=5, lost=2, idle=1)),
        ("out of time", Spent(useful=5, lost=2, idle=1)),
        ("lost", Spent(useful=5, lost=2, idle=1)),
    ],
)
def test_each_hour_is_useful_lost_or_idle(state: str, expected: Spent) -> None:
    """The task begins its second shard while its first one is written."""
    done = [outcome("000-0-0", 1, 4), outcome("000-0-0", 3, 6)]
    assert account([task("000-0-0", 8, state)], done, []) == expected


def test_failed_shards_are_lost_and_an_attempt_without_one_is_idle() -> None:
    tasks = [task("000-0-0", 5, "finished"), Progress("000-1-0", started=0, updated=HOUR * 2)]
    tasks[1].state = "stopped"
    found = account(tasks, [outcome("000-0-0", 0, 2)], [outcome("000-0-0", 2, 5)])
    assert found == Spent(useful=2, lost=3, idle=2)
    assert str(found) == "7.0 (useful 29%, lost 43%, idle 29%)"


def test_a_dead_process_is_charged_from_the_end_of_its_last_shard() -> None:
    """The record of its death has no start, and whoever found it wrote it, maybe much later."""
    died = Outcome.of(Record("y", "failed", task="000-0-0", finished=9e5, kind=DIED).to_dict())
    tasks = [Progress("000-0-0", shard="y", started=HOUR, updated=4 * HOUR, state="lost")]
    assert account(tasks, [outcome("000-0-0", 1, 2)], [died]) == Spent(useful=1, lost=2)


def test_tasks_without_a_gpu_do_not_count_beside_those_with_one() -> None:
    tasks = [task("000-0-0", 5, "finished"), task("000-1-0", 2, "finished", device="cuda:0")]
    assert account(tasks, [outcome("000-1-0", 0, 1)], []) == Spent(useful=1, idle=1)


@pytest.mark.parametrize(
    ("waited", "busy", "advice"),
    [
        (50, 9.0, "1 of 2 tasks wait for samples over 30% of their time: more cores for each"),
        (10, 9.0, "the GPUs are the limit"),
        (10, 4.0, "the GPUs wait, and not for samples: a larger batch_size may help"),
        (10, 6.0, ""),
        (10, None, ""),
    ],
)
def test_it_is_told_what_the_tasks_wait_for(waited: float, busy: float | None, advice: str) -> None:
    now, looks = time.time(), 0 if busy is None else 10
    tasks = [
        Progress("000-0-0", worked=100, waited=waited, gpu_busy=busy or 0, gpu_looks=looks),
        Progress("000-1-0", worked=100, waited=10, updated=now),
        Progress("000-2-0", worked=900, waited=900, updated=now - HOUR, state="finished"),
    ]
    found = limits(tasks)
    assert found.wait_share == (waited + 10) / 200
    assert found.gpu_busy_share == (None if busy is None else busy / 10)
    assert found.starved == (["000-0-0"] if waited == 50 else [])
    assert found.advice.startswith(advice)
    assert bool(found.advice) == bool(advice)


def test_little_work_tells_nothing_and_the_tasks_of_a_run_that_ended_do() -> None:
    assert limits([Progress("000-0-0", worked=50, waited=50)]) == Limits()
    over = Progress("000-0-0", worked=100, waited=90, state="finished")
    assert limits([over]).starved == ["000-0-0"]
