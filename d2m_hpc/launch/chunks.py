"""Pending shards to chunks, one for each array task."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from d2m_hpc.state.manifest import Shard


def balanced(shards: Sequence[Shard], per_task: int) -> list[list[Shard]]:
    """As few chunks of at most `per_task` shards as can be, of about the same number of bytes.

    The largest shard goes to the lightest chunk with room, and so on (LPT, Graham, 1969); shards of
    unknown size weigh as much as the mean. Each chunk keeps the shards' order.
    """
    known = [s.size for s in shards if s.size is not None]
    mean = sum(known) / len(known) if known else 1
    if not known:
        return chunk(shards, per_task)
    count = -(-len(shards) // per_task)
    heap = [(0.0, i) for i in range(count)]
    chosen: list[list[int]] = [[] for _ in range(count)]
    weight = [mean if s.size is None else s.size for s in shards]
    for i in sorted(range(len(shards)), key=lambda i: -weight[i]):
        total, lightest = heapq.heappop(heap)
        chosen[lightest].append(i)
        if len(chosen[lightest]) < per_task:
            heapq.heappush(heap, (total + weight[i], lightest))
    return [[shards[i] for i in sorted(indices)] for indices in chosen]


def chunk(shards: Sequence[Shard], per_task: int) -> list[list[Shard]]:
    """Consecutive chunks of at most `per_task` shards."""
    return [list(shards[i : i + per_task]) for i in range(0, len(shards), per_task)]
