"""Choose the size of array tasks: shards by what finished ones took, more memory, more walltime."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from d2m_hpc.config import Slurm
from d2m_hpc.config.slurm_values import minutes
from d2m_hpc.launch.ended import KILLED, MEMORY, WALLTIME, End
from d2m_hpc.launch.slurm import Array, Need, Sized, read_arrays
from d2m_hpc.plan import balance, memory
from d2m_hpc.plan.decide import Decision
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import Job

SHARDS_PER_TASK = 16
STARTS = 10
"""A task has at least this many times the work of its start."""
PART_OF_WALLTIME = 0.8
"""The share of its walltime that a task's work may take by the estimate."""


def shards_per_task(decision: Decision) -> int:
    """The most shards of a task: the config's number, or what takes `task_minutes`."""
    config = decision.workload.config
    fixed = config.shards_per_task or config.tars_per_wds or SHARDS_PER_TASK
    if not config.task_minutes or not (pace := decision.pace):
        return fixed
    seconds = 60 * min(config.task_minutes, PART_OF_WALLTIME * minutes(config.slurm.time))
    seconds = max(seconds, STARTS * pace.start)
    sizes = [job.shard.size for job in decision.pending if job.shard.size is not None]
    mean = sum(sizes) / len(sizes) if sizes else pace.bytes
    return max(1, int(seconds / (pace.seconds * max(mean, 1) / pace.bytes)))


def parts(decision: Decision, most: int, options: Mapping[str, Any]) -> list[Sized]:
    """The pending jobs by what their tasks need, those that need no more than usual first."""
    usual = Need(*(str(options.get(name) or "") for name in Need._fields))
    more = decision.raised
    jobs: dict[Need, list[Job]] = {Need(): [], **{need: [] for need in sorted({*more.values()})}}
    numbers = {need: number for number, need in enumerate(jobs)}
    for job in decision.pending if more else ():
        need = more.get(job.stem, Need())
        jobs[need].append(job._replace(need=numbers[need]))
    if not more:
        jobs[Need()] = decision.pending
    found = []
    for need, same in jobs.items():
        if same:
            groups = balance.groups(same)
            tasks = sum(balance.count(group, most) for group in groups)
            chosen = (mine or base for mine, base in zip(need, usual, strict=True))
            found.append(Sized(Need(*chosen), groups, tasks))
    return found


def raised(
    run: RunDir, config: Slurm, ends: Iterable[End], starved: Mapping[str, str]
) -> dict[str, Need]:
    """What shards need whose tasks were short of memory or walltime, doubled up to the bounds.

    A shard that had more before, and whose task ended otherwise, keeps it.

    Args:
        starved: the tasks of shards that failed as their process ran out of memory, by stem.
    """
    if not config.max_mem and not config.max_time:
        return {}
    found: dict[str, Need] = {}
    for end in ends:
        killed, late = end.cause in (MEMORY, KILLED), end.cause == WALLTIME
        found |= dict.fromkeys(end.stems, _need(config, end.array, 1 + killed, 1 + late, end.of))
    known = {s.name: read_arrays(s) for s in run.submissions()} if starved else {}
    for stem, task in starved.items():
        submission, index, _ = task.split("-")
        for array in known.get(submission, ()):
            if int(index) in range(array.first, array.chunks_of(array.elements).start):
                found[stem] = _need(config, array, 2, 1)
    return {stem: need for stem, need in found.items() if any(need)}


def _need(config: Slurm, had: Array, more_mem: int, more_time: int, by_sacct: int = 0) -> Need:
    """What an array had, times two factors; empty where the config's own values are enough.

    Args:
        by_sacct: the bytes of memory that its tasks had; 0 where sacct does not know.
    """
    mem, time = "", ""
    bytes_ = memory.given(had.mem) if had.mem else by_sacct or math.inf
    if config.max_mem and bytes_ < math.inf:
        bytes_ = min(bytes_ * more_mem, memory.given(config.max_mem))
        own = memory.given(config.mem)
        mem = f"{int(bytes_ / (1 << 20))}M" if bytes_ > own or own == math.inf else ""
    least = minutes(had.time)
    if config.max_time and least < math.inf:
        least = min(least * more_time, minutes(config.max_time))
        time = str(math.ceil(least)) if least > minutes(config.time) else ""
    return Need(mem, time)


def told(raised: Mapping[str, Need]) -> list[str]:
    """What a user should know of the raised values."""
    counts: dict[Need, int] = {}
    for need in raised.values():
        counts[need] = counts.get(need, 0) + 1
    return [
        f"shards whose tasks ran out of memory or walltime: {number} get "
        + ", ".join(f"--{name}={value}" for name, value in need._asdict().items() if value)
        for need, number in counts.items()
    ]
