"""HTML by construction: what is not `Markup` is escaped when it is put in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from d2m_hpc.storage.urls import masked

_VOID = {"br", "img", "meta"}
_UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters and lone surrogates: no HTML can hold them."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Anything as HTML, without secrets; what is Markup stays as it is."""
    if isinstance(value, Markup):
        return value
    return _escaped(masked(str(value)))


def _escaped(value: str) -> Markup:
    return Markup(escape(_UNREADABLE.sub("\ufffd", value)))


def join(parts: Iterable[object]) -> Markup:
    return Markup("".join(map(text, parts)))


def element(tag: str, /, *children: object, **attributes: object) -> Markup:
    """An HTML or SVG element.

    Args:
        children: None is left out.
        attributes: `class_` is `class`, `stroke_width` is `stroke-width`; None and False are left
            out, True is an attribute without a value.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items())
    opened = f"<{tag}{given}>"
    if tag in _VOID:
        return Markup(opened)
    return Markup(f"{opened}{join(c for c in children if c is not None)}</{tag}>")


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if isinstance(value, str) and value.startswith("data:"):  # a picture: long, and no words
        return f' {name}="{_escaped(value)}"'
    return f" {name}" if value is True else f' {name}="{text(value)}"'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    figures: int = 0,
    class_: str | None = None,
) -> Markup:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        figures: how many of the last columns are figures.
    """
    first = len(head) - figures

    def line(tag: str, cells: Sequence[object]) -> Markup:
        made = (
            element(tag, c, class_="figure" if i >= first else None) for i, c in enumerate(cells)
        )
        return element("tr", *made)

    body = element("tbody", *(line("td", row) for row in rows))
    whole = element("table", element("thead", line("th", head)), body, class_=class_)
    return scrolling(whole, ", ".join(filter(None, head)))


def scrolling(content: Markup, label: str) -> Markup:
    """May be wider than the page, and is reached by the keyboard."""
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)


def described(pairs: Iterable[tuple[object, object]], class_: str) -> Markup:
    """Names and values."""
    rows = (element("div", element("dt", n), element("dd", v)) for n, v in pairs)
    return element("dl", *rows, class_=class_)
