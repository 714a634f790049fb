"""Group messages that differ only in names and figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from d2m_hpc.run.manifest import Outcome
from d2m_hpc.storage.texts import safe

NOTICES = 20
"""Kinds of notices that are shown; each tar may have another."""
_WORD = re.compile(r"'[^']*'|[^\s']+")


def alike(error: str) -> str:
    """A message without its paths, names and figures, which differ from shard to shard.

    Word by word: one pattern for the whole text takes time quadratic in a word's length.
    """
    return _WORD.sub(lambda word: "#" if re.search(r"['/\d]", word[0]) else word[0], error)


def noticed(done: Iterable[Outcome]) -> dict[str, int]:
    """Count shards by their notices, grouped by `alike`, the most frequent of `NOTICES` kinds
    first.

    Each group is shown by one of its notices.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    texts = Counter(text for outcome in done for text in outcome.notices)
    for notice, count in texts.items():
        text = safe(notice)
        counts[examples.setdefault(alike(text), text)] += count
    return dict(counts.most_common(NOTICES))
