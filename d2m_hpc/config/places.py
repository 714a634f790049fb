"""The place of a mistake: the keys that lead to it, and the line of the file."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from d2m_hpc.storage.urls import masked

Loc = tuple[str | int, ...]
"""The keys, and the positions in lists, that lead to a value."""
WIDEST = 100
"""The most characters of a line that are shown."""
_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""An end of a line in YAML 1.1."""


class Mistake(str):
    """A message about a key; `item` is the wrong value in the key's list, if only one is wrong."""

    loc: Loc
    item: object

    def __new__(cls, loc: Loc, what: str, item: object = None) -> Mistake:
        made = super().__new__(cls, f"{dotted(loc)}: {what}" if loc else what)
        made.loc, made.item = loc, item
        return made


def dotted(loc: Loc) -> str:
    return ".".join(map(str, loc))


class Place(NamedTuple):
    """A part of a line; lines and columns are counted from 0."""

    line: int
    start: int
    end: int

    @classmethod
    def of(cls, node: Any, key: Any = None) -> Place:
        """The first line's part of a YAML node, or of a key and its node."""
        start, end = (key or node).start_mark, node.end_mark
        if key and node.start_mark.line != start.line:
            end = key.end_mark
        same = end.line == start.line
        return cls(start.line, start.column, end.column if same else start.column + 1)


class Lines:
    """The lines of a text; `name` is its file's name, or empty for a text without a file."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._lines = _BREAK.split(text)

    @staticmethod
    def number(text: str) -> int:
        """The number of the line in which a text ends, counted from 0."""
        return len(_BREAK.findall(text))

    def frame(self, place: Place) -> str:
        """A place as compilers show it: file and number, the line, and marks below the part."""
        if not self._name or place.line >= len(self._lines):
            return ""
        whole, column = self._lines[place.line], place.start + 1
        if (text := masked(whole)) != whole:  # the part begins where the masked text before it ends
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
