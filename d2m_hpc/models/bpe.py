"""Byte-pair encoding with the tokens of openai/CLIP, in n log n steps for a word of n letters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from heapq import heappop, heappush

END = "</w>"
"""Ends a word's last symbol."""
WHOLE = 1 << 14
"""Symbols of a word that is encoded whole; of longer ones, what the tokens that are kept need."""
BEGINNING = 512
"""Symbols of a longer word that are looked at first."""


class Bpe:
    """Merges of pairs of symbols, the lowest rank first.

    Args:
        ranks: of the pairs that may be merged.
        vocabulary: all tokens that merging can end in.
    """

    def __init__(self, ranks: Mapping[tuple[str, str], int], vocabulary: Iterable[str]) -> None:
        self._ranks = ranks
        self._longest = max(len(token.removesuffix(END)) for token in vocabulary)

    def first(self, word: str, most: int) -> list[str]:
        """The first `most` tokens of a word, which is not empty."""
        size = BEGINNING
        while size < len(word) > WHOLE:
            if settled := self._settled(word[:size], most):
                return settled
            size *= 4
        return merged([*word[:-1], word[-1] + END], self._ranks)[:most]

    def _settled(self, beginning: str, most: int) -> list[str]:
        """The first tokens of all words that begin so and go on; empty where that is not known.

        Nothing is merged across the end of a token, so what stands before that end has the same
        tokens alone. No token is longer than `_longest`: of as many places in a row one ends
        a token. Where all of them give the same first tokens, those are the word's.
        """
        tokens = merged([*beginning], self._ranks)[:most]
        if len(tokens) < most:
            return []
        for end in range(len(beginning) - self._longest + 1, len(beginning)):
            if merged([*beginning[:end]], self._ranks)[:most] != tokens:
                return []
        return tokens


def merged(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merge, for the lowest rank that occurs, all pairs of it from left to right; and so on.

    A list links the symbols that are left, and places are kept by rank: n log n steps, where
    looking through all symbols for each rank takes n squared.

    Args:
        symbols: changed on the way.
    """
    count = len(symbols)
    after, before = [*range(1, count + 1)], [*range(-1, count - 1)]
    places: dict[int, list[int]] = {}
    waiting: list[int] = []

    def note(i: int) -> None:
        """Where the pair that begins at `i` may be merged, keep its place."""
        rank = ranks.get((symbols[i], symbols[after[i]])) if after[i] < count else None
        if rank is None:
            return
        if rank not in places:
            places[rank] = []
            heappush(waiting, rank)
        places[rank].append(i)

    for i in range(count):
        note(i)
    while waiting:
        rank = heappop(waiting)
        for i in sorted(places.pop(rank)):
            j = after[i]
            # One of the two may have been merged with another symbol since.
            if j >= count or ranks.get((symbols[i], symbols[j])) != rank:
                continue
            symbols[i], symbols[j] = symbols[i] + symbols[j], ""
            after[i] = after[j]
            if after[i] < count:
                before[after[i]] = i
            if before[i] >= 0:
                note(before[i])
            note(i)
    return [symbol for symbol in symbols if symbol]
