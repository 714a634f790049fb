"""Messages that differ only in names and figures are told once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from d2m_hpc.run.manifest import Outcome
from d2m_hpc.storage.texts import safe

NOTICES = 20
"""Kinds of notices that are told; each tar may have another."""
_WORD = re.compile(r"'[^']*'|[^\s']+")


def alike(error: str) -> str:
    """A message without what tells one shard's from another's: paths, names and figures.

    By words: one pattern for all of it takes a time that grows with a word's length squared.
    """
    return _WORD.sub(lambda word: "#" if re.search(r"['/\d]", word[0]) else word[0], error)


def noticed(done: Iterable[Outcome]) -> dict[str, int]:
    """Shards by what was noted of them, alike but for names and figures; the most frequent first.

    Of those that are alike one is told, and no more than `NOTICES` kinds.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    texts = Counter(text for outcome in done for text in outcome.notices)
    for notice, count in texts.items():
        text = safe(notice)
        counts[examples.setdefault(alike(text), text)] += count
    return dict(counts.most_common(NOTICES))
