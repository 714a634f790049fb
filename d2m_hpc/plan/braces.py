"""Braces in patterns, counted before they are expanded.

The grammar is that of the library `braceexpand`, without backslashes: `{a,b}`, `{00..99}`,
`{0..9..3}`, `{a..e}`, nested; braces that do not match stand for themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import braceexpand

from d2m_hpc.errors import D2MError

MOST = 10_000_000
"""The most names in a plan; a million names are a large plan."""
MOST_TEXT = 2_000_000_000
"""The most characters of all names of a pattern."""
DEEPEST = 40
_NUMBERS = re.compile(r"^(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?$", re.ASCII)
_LETTERS = re.compile(r"^([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?$", re.ASCII)


def expand(pattern: str) -> Iterator[str]:
    try:
        yield from braceexpand.braceexpand(pattern, escape=False)
    except ValueError:
        yield pattern


def require_few(pattern: str, most: int) -> int:
    """Count the names that a pattern's braces stand for.

    Raises:
        D2MError: there are more than `most` names, or the braces are nested too deep.
    """
    try:
        count = _pattern(pattern, 0)
    except ValueError:
        return 1
    if count <= min(most, MOST_TEXT // max(1, len(pattern))):
        return count
    advice = "; patterns joined by `::` are entries of a list" if "::" in pattern else ""
    shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
    number = f"{count:,}" if count < 10**15 else f"more than {10**15:,}"
    raise D2MError(
        f"the braces of {shown!r} stand for {number} names; valid are {most:,} at most{advice}"
    )


def _pattern(text: str, depth: int) -> int:
    """Count the names of a pattern.

    Raises:
        ValueError: the braces do not match.
        D2MError: the braces are nested too deep.
    """
    if depth > DEEPEST:
        raise D2MError(f"a pattern's braces are nested more than {DEEPEST} deep")
    counts, level, start = [1], 0, 0
    for at, character in enumerate(text):
        if character == "{":
            level += 1
            start = at + 1 if level == 1 else start
        elif character == "}":
            level -= 1
            if level == 0:
                counts.append(_expression(text[start:at], depth + 1))
            start = start if level else at + 1
    if level:
        raise ValueError("braces do not match")
    return _bounded(counts)


def _bounded(counts: list[int]) -> int:
    """Multiply counts, up to a bound: the product of thousands of factors takes long."""
    product = 1
    for count in counts:
        product *= count
        if not product or product > 10**30:
            break
    return product


def _expression(text: str, depth: int) -> int:
    """Count the names of the text between two braces."""
    if match := _NUMBERS.match(text):
        first, last, step = (int(group or 1) for group in match.groups())
    elif match := _LETTERS.match(text):
        first, last = (braceexpand.alphabet.index(group) for group in match.groups()[:2])
        step = int(match[3] or 1)
    else:
        return sum(_pattern(part, depth) for part in _parts(text))
    return abs(last - first) // (step or 1) + 1


def _parts(text: str) -> list[str]:
    """The entries of a list; a text without a comma is its only entry."""
    parts, level, start = [], 0, 0
    for at, character in enumerate(text):
        level += (character == "{") - (character == "}")
        if character == "," and level == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]] if parts and level == 0 else [text]
