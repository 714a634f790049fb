"""Divide pending jobs into chunks, one for each array task."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from d2m_hpc.run.records import Job


def groups(jobs: Iterable[Job]) -> list[list[Job]]:
    """Group jobs that extend pairs of the same fingerprint, as these need the same models.

    A shard at which a process died comes last, in a group of its own.
    """
    found: dict[str, list[Job]] = {}
    alone = []
    for job in jobs:
        if job.alone:
            alone.append([job])
        else:
            found.setdefault(job.extends, []).append(job)
    return [*found.values(), *alone]


def count(jobs: Sequence[Job], per_task: int) -> int:
    """The smallest number of chunks of at most `per_task` jobs."""
    return -(-len(jobs) // per_task)


def balanced(jobs: Sequence[Job], per_task: int) -> list[list[Job]]:
    """Divide jobs into as few chunks of at most `per_task` shards as possible, of similar sizes.

    The largest shard goes to the lightest chunk that is not full, and so on (LPT, Graham, 1969);
    a shard of unknown size weighs as much as the mean. Each chunk keeps the jobs' order.
    """
    known = [j.shard.size for j in jobs if j.shard.size is not None]
    if not known:
        return chunk(jobs, per_task)
    mean = sum(known) / len(known)
    weights = np.array([mean if j.shard.size is None else j.shard.size for j in jobs])
    heaviest_first = np.argsort(-weights, kind="stable")
    heap = [(0.0, i) for i in range(count(jobs, per_task))]
    chosen: list[list[int]] = [[] for _ in heap]
    for i, weight in zip(heaviest_first.tolist(), weights[heaviest_first].tolist(), strict=True):
        total, lightest = heap[0]
        chosen[lightest].append(i)
        if len(chosen[lightest]) < per_task:
            heapq.heapreplace(heap, (total + weight, lightest))
        else:
            heapq.heappop(heap)
    return [[jobs[i] for i in sorted(indices)] for indices in chosen]


def chunk(jobs: Sequence[Job], per_task: int) -> list[list[Job]]:
    """Divide jobs into consecutive chunks of at most `per_task` shards."""
    return [list(jobs[i : i + per_task]) for i in range(0, len(jobs), per_task)]
