"""How much an array task is given: shards by minutes, memory and walltime by how tasks ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kit import d2m, submit
from launch.scripted import six_tasks

from d2m_hpc.config import Slurm, load
from d2m_hpc.config.slurm_values import minutes
from d2m_hpc.launch import sizes, slurm
from d2m_hpc.launch.ended import End, told
from d2m_hpc.launch.slurm import Array, Need
from d2m_hpc.plan.decide import Decision, Pace, pace
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.records import Record, Shard


def outcome(task: int, started: float, finished: float) -> Outcome:
    made = Record("x", "done", task=f"000-{task}-0", started=started, finished=finished)
    return Outcome.of(made.to_dict())


def test_the_pace_is_from_first_to_last_as_shards_of_a_task_overlap() -> None:
    done = {
        "a": outcome(0, 0, 90),  # 60 s of it are the nets'
        "b": outcome(0, 10, 120),
        "c": outcome(0, 40, 150),
        "d": outcome(1, 0, 90),
        "e": outcome(1, 5, 120),
    }
    found = pace(done, [Shard(stem, stem, 2000) for stem in "abcde"])
    assert found == Pace(30, 2000, 64)
    assert pace({}, []) is None


@pytest.mark.parametrize(
    ("task_minutes", "time", "measured", "expected"),
    [
        (60, None, None, 16),  # nothing is known yet
        (60, None, Pace(30, 2000, 4), 60),  # as the shards that are left are of twice the size
        (60, "0:30:00", Pace(30, 2000, 4), 24),
        (1, None, Pace(30, 2000, 64), 10),  # ten times the start
        (1, None, Pace(3000, 2000, 4), 1),
        (None, None, Pace(30, 2000, 4), 16),
    ],
)
def test_shards_of_a_task_by_minutes(
    tmp_path: Path, task_minutes: int | None, time: str | None, measured: Any, expected: int
) -> None:
    config = six_tasks(tmp_path, task_minutes=task_minutes, slurm={"time": time})
    config.write_text(config.read_text().replace("shards_per_task: 1\n", ""))
    shards = [Shard(str(i), str(i), 4000) for i in range(100)]
    decision = Decision(inspect(load(config), str(config)), shards, pace=measured)
    assert sizes.shards_per_task(decision) == expected


def test_a_number_of_shards_and_minutes_are_one_too_many(tmp_path: Path) -> None:
    config = six_tasks(tmp_path, task_minutes=60)
    said = d2m("plan", config)
    assert said.returncode == 2
    assert "task_minutes: found a number of shards, too" in said.stderr


def test_finished_shards_tell_how_many_a_task_is_given(tmp_path: Path) -> None:
    config = six_tasks(tmp_path)
    assert submit(config, "--set", f"input_tars={tmp_path}/tars/00000.tar").returncode == 0
    planned = d2m("plan", config, "--set", "task_minutes=5", "--set", "shards_per_task=")
    assert "1 task of at most 5 shards" in planned.stdout


ARRAY = Array("d2m-x-000-0", 0, 4, job_id="7", mem="4G", time="1:00:00")


def end(cause: str, array: Array = ARRAY, of: int = 0) -> End:
    run = RunDir(Path("/none"))
    return End(run.submission("000"), array, 0, (0,), frozenset({"a", "b"}), cause=cause, of=of)


@pytest.mark.parametrize(
    ("cause", "array", "config", "expected"),
    [
        ("memory", {}, {"max_mem": "64G"}, Need("8192M")),
        ("killed", {}, {"max_mem": "64G"}, Need("8192M")),
        ("memory", {}, {"max_mem": "6G"}, Need("6144M")),
        ("memory", {"mem": "8G"}, {"max_mem": "8G"}, Need("8192M")),
        ("memory", {}, {}, None),
        ("memory", {}, {"mem": "32G", "max_mem": "64G"}, None),  # raised by hand meanwhile
        ("memory", {"mem": ""}, {"mem": None, "max_mem": "64G"}, None),  # had all of a node
        ("walltime", {}, {"max_time": "1-0"}, Need(time="120")),
        ("walltime", {}, {"max_time": 90}, Need(time="90")),
        ("walltime", {"time": ""}, {"max_time": 90}, None),
        ("walltime", {}, {"max_mem": "64G"}, None),
        ("cancelled", {"mem": "16G"}, {"max_mem": "64G"}, Need("16384M")),  # what it had before
        ("cancelled", {}, {"max_mem": "64G", "max_time": "1-0"}, None),
    ],
)
def test_what_tasks_were_short_of_is_doubled_up_to_its_bound(
    cause: str, array: dict[str, Any], config: dict[str, Any], expected: Need | None
) -> None:
    asked = Slurm(**{"mem": "4G", "time": "1:00:00", **config})
    found = sizes.raised(RunDir(Path("/none")), asked, [end(cause, replace(ARRAY, **array))], {})
    assert found == ({} if expected is None else {"a": expected, "b": expected})


@pytest.mark.parametrize(
    ("cause", "array", "config", "helps"),
    [
        ("memory", {}, {}, "raise slurm.mem, or set slurm.max_mem"),
        ("memory", {}, {"max_mem": "64G"}, "a submit doubles slurm.mem for them, up to slurm.max_"),
        ("memory", {"mem": "64G"}, {"max_mem": "64G"}, "slurm.max_mem is reached: raise it, or"),
        (
            "memory",
            {"mem": "0"},
            {"max_mem": "64G"},
            "slurm.max_mem is reached: raise it, or lower",
        ),
        ("memory", {"mem": ""}, {"max_mem": "64G"}, "set slurm.mem, which submits double up to"),
        ("walltime", {}, {}, "raise slurm.time, or set slurm.max_time"),
        ("walltime", {}, {"max_time": "2:00:00"}, "a submit doubles slurm.time for them, up to"),
        ("walltime", {"time": "2:00:00"}, {"max_time": 120}, "slurm.max_time is reached: raise it"),
        ("walltime", {"time": ""}, {"max_time": 120}, "set slurm.time, which submits double up to"),
        ("node", {}, {"max_mem": "64G", "max_time": 120}, "`sinfo -R` says whether it is back"),
    ],
)
def test_what_helps_is_not_what_the_config_has_already(
    cause: str, array: dict[str, Any], config: dict[str, Any], helps: str
) -> None:
    asked = Slurm(**{"mem": "4G", "time": "1:00:00", **config})
    [found] = told([end(cause, replace(ARRAY, **array))], asked)
    assert found.help.startswith(helps)


def test_sacct_tells_what_a_task_had_where_the_config_says_nothing() -> None:
    asked = Slurm(max_mem="64G")
    ended = end("memory", replace(ARRAY, mem=""), of=2 << 30)
    assert sizes.raised(RunDir(Path("/none")), asked, [ended], {})["a"] == Need("4096M")


def test_shards_that_need_more_have_arrays_and_elements_of_their_own(tmp_path: Path) -> None:
    usual, more = (5, Need("4G")), (3, Need("8G"))
    arrays = slurm.split([usual, more], 2, 2, 4, "x")
    told = [(a.first, a.elements, a.mem, a.parallel, a.after) for a in arrays]
    assert told == [
        (0, 2, "4G", 1, None),
        (4, 1, "4G", 1, None),
        (6, 2, "8G", 1, 0),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (90, 90),
        ("90", 90),
        ("1:30", 1.5),
        ("4:00:00", 240),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("2-0:0:30", 2880.5),
        ("unlimited", float("inf")),
        (0, float("inf")),
        (None, float("inf")),
    ],
)
def test_minutes_of_a_walltime(text: str | int | None, expected: float) -> None:
    assert minutes(text) == expected
