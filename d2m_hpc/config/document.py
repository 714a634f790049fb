"""A YAML file as plain values, with the place of each value, and every mistake in its syntax.

Plain values are texts, whole and finite numbers, `true` and `false`, null, lists and mappings.
Words that YAML 1.1 would convert stay texts: dates, `4:00:00` (a number of base 60), `010` (eight),
`yes` and `off`. The types of the keys decide what these mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from d2m_hpc.config.places import WIDEST, Lines, Loc, Mistake, Place

DEEPEST = 50
DEEP = f"found values nested more than {DEEPEST} deep"
ALIASED = 100_000
"""The most values that aliases (`*name`) may repeat in one file."""
LARGEST = 2**63 - 1
_UNHELD = re.compile("[\0\ud800-\udfff]")
"""Characters that no path, name or file can hold."""
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_TAG = "tag:yaml.org,2002:"
_WRONG = object()


def joined(text: str) -> str:
    """Replace each pair of surrogates, as JSON escapes an emoji, by one character."""
    return _PAIR.sub(lambda m: m[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)


class _Loader(yaml.SafeLoader):
    """A loader that composes nodes; `Document` makes the values of them."""

    composed = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.composed += 1
        self.depth += 1
        if self.depth > DEEPEST:
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=DEEP, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_WORDS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?([0-9]+\.[0-9]*([eE][-+][0-9]+)?|\.[0-9]+([eE][-+][0-9]+)?|\.(inf|Inf|INF))"
        r"|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": ("<<", "<"),
}
_Loader.yaml_implicit_resolvers = {}  # without those of YAML 1.1
for _name, (_words, _first) in _WORDS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_words})$"), list(_first))


class Document:
    """A YAML text.

    Attributes:
        value: the value of the whole text, without the entries of mappings that hold a mistake.
        left_out: the places of the entries left out.
        mistakes: mistakes in the syntax.

    Args:
        name: the file's name, for messages; empty for a text without a file.
    """

    def __init__(self, text: str, name: str = "") -> None:
        self.mistakes: list[Mistake] = []
        self.left_out: set[Loc] = set()
        self._lines = Lines(name, text)
        self._root: yaml.Node | None = None
        self._left = self._depth = 0
        self._told: set[int] = set()
        self.value = self._parse(text)

    def _parse(self, text: str) -> Any:
        try:
            loader = _Loader(text)
            self._root = loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            what = " ".join(filter(None, [error.context, error.problem]))
            if "found character '\\t'" in what:
                what = "found a tab where a line begins or a value; valid are spaces"
            self._not_yaml(what, error)
            return None
        except yaml.reader.ReaderError as error:
            line = self._lines.number(text[: error.position])
            what = f"found the character #x{error.character:04x}, which YAML does not allow"
            self._add((), f"is not valid YAML: {what}", Place(line, 0, 0))
            return None
        self._left = loader.composed + ALIASED
        if self._root is None:
            return None
        value = self._value(self._root, ())
        return {} if value is _WRONG else value

    def _not_yaml(self, what: str, error: yaml.MarkedYAMLError) -> None:
        mark = error.problem_mark or error.context_mark
        place = Place(mark.line, mark.column, mark.column + 1) if mark else None
        self._add((), f"is not valid YAML: {what}", place)

    def _add(self, loc: Loc, what: str, *places: Place | None) -> object:
        """Note a mistake; return the mark that stands for its value."""
        frames = (self._lines.frame(place) for place in places if place)
        self.mistakes.append(Mistake(loc, "\n".join([what, *frames])))
        return _WRONG

    def _value(self, node: yaml.Node, loc: Loc) -> Any:
        """Make a node's value, within bounds: an alias may lie within the node that it repeats."""
        self._left -= 1
        if self._depth > DEEPEST:
            return self._add(loc[:1], DEEP, Place.of(node))
        if self._left == 0:
            what = f"found aliases that repeat more than {ALIASED:,} values"
            return self._add(loc[:1], what, Place.of(node))
        if self._left < 0:
            return _WRONG
        self._depth += 1
        made = self._made(node, loc)
        self._depth -= 1
        return made

    def _made(self, node: yaml.Node, loc: Loc) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            values = [self._value(item, (*loc, i)) for i, item in enumerate(node.value)]
            return _WRONG if any(value is _WRONG for value in values) else values
        return self._scalar(node, kind, loc)

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> Any:
        """Make a mapping; the mapping's own keys win over those from `<<`.

        A key that is given twice is a mistake that shows both places.
        """
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                merged = {**self._merged(value, loc), **merged}
                continue
            name = self._key(key, loc)
            if name is None:
                continue
            if name in lines:
                self._twice((*loc, name), lines[name], key)
                continue
            lines[name] = key
            made = self._value(value, (*loc, name))
            if made is _WRONG:
                self.left_out.add((*loc, name))
            else:
                found[name] = made
        return {**{k: v for k, v in merged.items() if k not in lines}, **found}

    def _key(self, node: yaml.Node, loc: Loc) -> str | None:
        if isinstance(node, yaml.ScalarNode) and not _UNHELD.search(name := joined(node.value)):
            return name
        what = "found a key that is no text; valid keys are names such as `batch_size`"
        self._add(loc, what, Place.of(node))
        return None

    def _twice(self, loc: Loc, first: yaml.Node, second: yaml.Node) -> None:
        """Note a key that is given twice, once for all aliases of its mapping."""
        if id(second) not in self._told:
            self._told.add(id(second))
            lines = f"lines {first.start_mark.line + 1} and {second.start_mark.line + 1}"
            what = f"found the key twice, in {lines}; valid is once"
            self._add(loc, what, Place.of(first), Place.of(second))

    def _merged(self, node: yaml.Node, loc: Loc) -> dict[str, Any]:
        """Make the entries of `<<: *name` or `<<: [*first, *second]`; the first mapping wins."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        found: dict[str, Any] = {}
        for each in reversed(nodes):
            made = self._value(each, loc)
            if isinstance(made, dict):
                found |= made
            elif made is not _WRONG:
                self._add((*loc, "<<"), "found no mapping; valid is `<<: *name`", Place.of(each))
        return found

    def _scalar(self, node: yaml.Node, kind: str, loc: Loc) -> Any:
        try:
            return _plain(node, kind)
        except ValueError as error:
            return self._add(loc, str(error), Place.of(node))

    def place(self, loc: Loc, item: object = None, read: Callable[[str], str] = str) -> str:
        """The line of a mistake, with its number; empty if the text has no such place.

        Args:
            item: the wrong value in the list at `loc`; None if the whole of `loc` is wrong.
            read: turns a text of the file into the value that it means.
        """
        node, found = self._root, None
        for part in loc:
            found, node = _child(node, part)
            if node is None:
                return ""
        if item is not None and node is not None:
            items = node.value if isinstance(node, yaml.SequenceNode) else [node]
            named = [_name_of(n) for n in items]
            same = (n for n in named if isinstance(n.value, str) and read(n.value) == str(item))
            found = Place.of(node) if (node := next(same, None)) else None
        return self._lines.frame(found) if found else ""


def _name_of(item: yaml.Node) -> yaml.Node:
    """The name of a list's entry: of a mapping of one key, such as a model, that key."""
    one = isinstance(item, yaml.MappingNode) and len(item.value) == 1
    return item.value[0][0] if one else item


def _child(node: yaml.Node | None, part: str | int) -> tuple[Place | None, yaml.Node | None]:
    """The node that a key or a position leads to, after the place to show for that node."""
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
        if part < len(node.value):
            return Place.of(node.value[part]), node.value[part]
    elif isinstance(node, yaml.MappingNode):
        for key, value in _entries(node):
            if key.value == part:
                return Place.of(value, key), value
    return None, None


def _entries(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """The entries of a mapping, then those of the mappings merged into it."""
    yield from node.value
    for key, value in node.value:
        if key.tag == f"{_TAG}merge":
            for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                yield from each.value if isinstance(each, yaml.MappingNode) else ()


def _plain(node: yaml.Node, kind: str) -> Any:
    """The plain value of a scalar node; raise ValueError if the node is none."""
    text = node.value
    if not isinstance(text, str) or kind not in ("str", "int", "float", "bool", "null", "merge"):
        tag = f"!!{kind}" if node.tag.startswith(_TAG) else node.tag[:WIDEST]
        raise ValueError(f"found the tag {tag!r}; valid are plain values, without a tag")
    if kind in ("str", "merge"):
        text = joined(text)
        if bad := _UNHELD.search(text):
            what = f"found the character U+{ord(bad[0]):04X}, which no name or path can hold"
            raise ValueError(f"{what}; remove it")
        return text
    if not re.fullmatch(_WORDS[kind][0], text):
        raise ValueError(f"found {text[:WIDEST]!r}; valid is a plain value, without a tag")
    if kind == "int":
        return _whole(text)
    if kind == "float":
        number = float(re.sub(r"\.(inf|Inf|INF|nan|NaN|NAN)$", r"\1", text))
        if not math.isfinite(number):
            raise ValueError(f"found {text[:WIDEST]}; valid is a finite number")
        return number
    return text.lower() == "true" if kind == "bool" else None


def _whole(text: str) -> int:
    number = int(text, 0) if len(text) < 40 else LARGEST + 1
    if abs(number) > LARGEST:
        raise ValueError(
            f"found {text[:40]}; valid are whole numbers up to {LARGEST:,}, "
            "and digits in quotes, where they are a text"
        )
    return number
