"""Group texts of similar length, so that short ones are not padded to the longest of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BOUNDS = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 448)
"""Upper bounds of the buckets, in tokens; the last bucket has none."""


def by_length(lengths: Tensor) -> list[Tensor]:
    """Row indices of each bucket that is not empty, short texts first.

    Args:
        lengths: integers [B], tokens of each text.
    """
    bucket = torch.bucketize(lengths, torch.tensor(BOUNDS))
    return [torch.nonzero(bucket == b).flatten() for b in sorted(set(bucket.tolist()))]


def run_by_length(lengths: Tensor, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Run bucket after bucket and put the results back in order.

    Args:
        lengths: integers [B] on the CPU.
        run: given row indices [b] (CPU) and their longest length, returns results [b, ...].

    Returns:
        results [B, ...], in the order of `lengths`.
    """
    buckets = by_length(lengths)
    results = torch.cat([run(rows, int(lengths[rows].max())) for rows in buckets])
    order = torch.argsort(torch.cat(buckets))
    return results[order.to(results.device)]
