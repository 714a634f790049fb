"""Where a mistake is: the keys that lead to it, and the line of the file."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from d2m_hpc.storage.urls import masked

Loc = tuple[str | int, ...]
"""The keys, and the positions in lists, that lead to a value."""
WIDEST = 100
"""Characters of a line that are shown."""
_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""What ends a line in YAML 1.1."""


class Mistake(str):
    """What is wrong with a key, as text; `item` is which value of the key's list, if it is one."""

    loc: Loc
    item: object

    def __new__(cls, loc: Loc, what: str, item: object = None) -> Mistake:
        made = super().__new__(cls, f"{dotted(loc)}: {what}" if loc else what)
        made.loc, made.item = loc, item
        return made


def dotted(loc: Loc) -> str:
    return ".".join(map(str, loc))


class Place(NamedTuple):
    """Part of a line of a file, both counted from 0."""

    line: int
    start: int
    end: int

    @classmethod
    def of(cls, node: Any, key: Any = None) -> Place:
        """Of a YAML node, from its key on where that is given; only what is in the first line."""
        start, end = (key or node).start_mark, node.end_mark
        if key and node.start_mark.line != start.line:
            end = key.end_mark
        same = end.line == start.line
        return cls(start.line, start.column, end.column if same else start.column + 1)


class Lines:
    """The lines of a file.

    Args:
        name: the file's; empty for a text that is in none.
    """

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._lines = _BREAK.split(text)

    @staticmethod
    def number(text: str) -> int:
        """Of the line, counted from 0, in which a text ends."""
        return len(_BREAK.findall(text))

    def frame(self, place: Place) -> str:
        """As compilers show it: file and line, the line, and a mark below the part."""
        if not self._name or place.line >= len(self._lines):
            return ""
        whole, column = self._lines[place.line], place.start + 1
        if (text := masked(whole)) != whole:  # the part is where what stands before it ends
            start = min(len(masked(whole[: place.start])), len(text) - 1)
            place = Place(place.line, start, max(start + 1, len(text) - len(whole) + place.end))
        cut = max(0, place.start - WIDEST // 2)
        shown = "".join(c if c.isprintable() else " " for c in text[cut : cut + WIDEST])
        end = max(place.start + 1, min(place.end, cut + len(shown)))
        number, marks = str(place.line + 1), "^" * (end - place.start)
        return (
            f"  --> {self._name}:{number}:{column}\n"
            f"  {number} | {shown}\n"
            f"  {' ' * len(number)} | {' ' * (place.start - cut)}{marks}"
        )
