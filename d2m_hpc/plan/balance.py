"""Pending shards to chunks, one for each array task."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from d2m_hpc.run.manifest import Shard


def by_base(shards: Iterable[Shard]) -> list[list[Shard]]:
    """Shards that a task can do with the same models: those with the same base, in their order.

    A shard at which a process died comes last, and has a task of its own.
    """
    groups: dict[str, list[Shard]] = {}
    alone = []
    for shard in shards:
        if shard.alone:
            alone.append([shard])
        else:
            groups.setdefault(shard.base, []).append(shard)
    return [*groups.values(), *alone]


def count(shards: Sequence[Shard], per_task: int) -> int:
    """The fewest chunks of at most `per_task` shards that these fit into."""
    return -(-len(shards) // per_task)


def balanced(shards: Sequence[Shard], per_task: int) -> list[list[Shard]]:
    """As few chunks of at most `per_task` shards as can be, of about the same number of bytes.

    The largest shard goes to the lightest chunk with room, and so on (LPT, Graham, 1969); shards of
    unknown size weigh as much as the mean. Each chunk keeps the shards' order.
    """
    known = [s.size for s in shards if s.size is not None]
    if not known:
        return chunk(shards, per_task)
    mean = sum(known) / len(known)
    weights = np.array([mean if s.size is None else s.size for s in shards])
    heaviest_first = np.argsort(-weights, kind="stable")
    heap = [(0.0, i) for i in range(count(shards, per_task))]
    chosen: list[list[int]] = [[] for _ in heap]
    for i, weight in zip(heaviest_first.tolist(), weights[heaviest_first].tolist(), strict=True):
        total, lightest = heap[0]
        chosen[lightest].append(i)
        if len(chosen[lightest]) < per_task:
            heapq.heapreplace(heap, (total + weight, lightest))
        else:
            heapq.heappop(heap)
    return [[shards[i] for i in sorted(indices)] for indices in chosen]


def chunk(shards: Sequence[Shard], per_task: int) -> list[list[Shard]]:
    """Consecutive chunks of at most `per_task` shards."""
    return [list(shards[i : i + per_task]) for i in range(0, len(shards), per_task)]
