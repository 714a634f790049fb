"""Group texts of similar length, so that short ones are not padded to the longest of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2m_hpc.models.transfer import to_device

MOST_COMPUTED = 1.2
"""Tokens computed for each real one, at most. A bucket is a launch of the whole net, in which few
texts leave a GPU idle: padding by a fifth costs less than the buckets that would save it."""
TOGETHER = 2048
"""Tokens in a bucket of fixed shape, about: fewer cost more launches, more are padded in vain."""
_LENGTHS = (*range(8, 81, 8), 96, 112, 128, 160, 192, 224, 256, 320, 384, 448)


def by_length(lengths: Tensor, most: float = MOST_COMPUTED) -> list[Tensor]:
    """Row indices of the fewest buckets that compute little in vain, short texts first.

    Args:
        lengths: integers [B] on the CPU, tokens of each text.
        most: tokens computed for each real one, at most; 1 pads no text.
    """
    bucket = np.searchsorted(_longest(lengths.numpy(), most), lengths.numpy())
    return [torch.from_numpy(np.flatnonzero(bucket == b)) for b in range(bucket.max() + 1)]


def _longest(lengths: NDArray[np.int64], most: float) -> NDArray[np.int64]:
    """The longest text of each bucket, ascending, by dynamic programming over the lengths."""
    distinct, rows = np.unique(lengths, return_counts=True)
    shorter = np.concatenate([[0], rows.cumsum()])
    # cost[i, j]: tokens of a bucket from the i-th distinct length to the j-th.
    cost = (shorter[1:] - shorter[:-1, None]) * distinct.astype(float)
    cost[np.tri(len(distinct), k=-1, dtype=bool)] = np.inf
    best, firsts = cost[0], [np.zeros(len(distinct), dtype=int)]
    while best[-1] > most * lengths.sum():
        one_more = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        best, firsts = one_more.min(axis=0), [*firsts, one_more.argmin(axis=0)]
    lasts = [len(distinct) - 1]
    for first in firsts[:0:-1]:
        lasts.insert(0, first[lasts[0]] - 1)
    return distinct[lasts]


def run_by_length(
    lengths: Tensor,
    run: Callable[[Tensor, int], Tensor],
    device: torch.device,
    most: float = MOST_COMPUTED,
) -> Tensor:
    """Run bucket after bucket and put the results back in order, without waiting for any.

    Args:
        lengths: integers [B] on the CPU.
        run: given row indices [b] (CPU) and their longest length, returns results [b, ...].
        device: of the results.
        most: as `by_length` takes it.

    Returns:
        results [B, ...], in the order of `lengths`.
    """
    buckets = by_length(lengths, most)
    results = torch.cat([run(rows, int(lengths[rows].max())) for rows in buckets])
    return results[to_device(torch.argsort(torch.cat(buckets)), device)]


def in_shapes(lengths: Tensor, limit: int) -> list[tuple[Tensor, int, int]]:
    """Buckets of few shapes, however texts are drawn: long texts first, padded in rows as well.

    Args:
        lengths: integers [B] on the CPU, tokens of each text.
        limit: the most tokens of a text.

    Returns:
        of each bucket the row indices, the rows to compute, and the length.
    """
    order, found = torch.argsort(lengths, descending=True, stable=True), list[Any]()
    while len(order):
        length = next((n for n in _LENGTHS if n >= lengths[order[0]] and n < limit), limit)
        rows = max(4, 1 << (TOGETHER // length).bit_length() - 1)
        found.append((order[:rows], rows, length))
        order = order[rows:]
    return found


def run_in_shapes(
    tokens: Tensor,
    lengths: Tensor,
    limit: int,
    padding: int,
    run: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> Tensor:
    """Run texts in buckets of few shapes, copied to the device together.

    Args:
        tokens: int64 [B, L] on the CPU.
        lengths: integers [B] on the CPU, one at least.
        limit: the most tokens of a text.
        padding: the token to pad with.
        run: given tokens [b, l] and their lengths [b], returns results [b, ...].
        device: of what `run` is given, and of the results.

    Returns:
        results [B, ...], in the order of `tokens`.
    """
    shapes, where, start = in_shapes(lengths, limit), torch.empty_like(lengths), 0
    parts = list[Tensor]()
    for chosen, rows, length in shapes:
        ids = torch.full((rows, length), padding)
        ids[: len(chosen), : tokens.shape[1]] = tokens[chosen, :length]
        long = torch.ones(rows, dtype=torch.int64)
        long[: len(chosen)] = lengths[chosen]
        parts += [ids.flatten(), long]
        where[chosen] = torch.arange(start, start + len(chosen))
        start += rows
    sent = torch.split(to_device(torch.cat([*parts, where]), device), [*map(len, [*parts, where])])
    results = [
        run(ids.view(rows, length), long)
        for ids, long, (_, rows, length) in zip(sent[::2], sent[1::2], shapes, strict=False)
    ]
    return torch.cat(results)[sent[-1]]


def run_tokens(
    tokens: Sequence[Sequence[int]],
    padding: int,
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
    device: torch.device,
    most: float = MOST_COMPUTED,
) -> Tensor:
    """Run texts, each bucket padded to its longest, and put the results back in order.

    Args:
        tokens: of each text one at least.
        padding: the token to pad with.
        run: given tokens [b, L], their lengths [b] and row indices [b], returns results [b, ...].
        device: of what `run` is given, and of the results.
        most: as `by_length` takes it.
    """
    lengths = torch.tensor([len(ids) for ids in tokens])
    padded = padded_to_longest(tokens, lengths, padding)

    def bucket(rows: Tensor, length: int) -> Tensor:
        given = (padded[rows, :length], lengths[rows], rows)
        return run(*(to_device(tensor, device) for tensor in given))

    return run_by_length(lengths, bucket, device, most)


def padded_to_longest(tokens: Sequence[Sequence[int]], lengths: Tensor, padding: int) -> Tensor:
    """int64 [B, L]: the tokens of each text, and the padding behind them."""
    padded = torch.full((len(tokens), int(lengths.max())), padding)
    padded[torch.arange(padded.shape[1]) < lengths[:, None]] = torch.tensor([*chain(*tokens)])
    return padded
