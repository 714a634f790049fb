"""The names of the members that are a sample's image, text and JSON. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from d2m_hpc.config import Config
from d2m_hpc.models.inputs import PICTURES

Members = Mapping[str, tuple[str, ...]]
"""The names of members by kind; the first one that a sample has is used."""
Split = Callable[[str], tuple[str | None, str | None]]
"""Splits a member's name into key and extension."""
EXTENSIONS: Members = {"image": PICTURES, "text": ("txt",), "json": ("json",)}
_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")


def members_of(config: Config) -> Members:
    """The members that a config takes images, texts and JSON from; further texts by raw input."""
    asked = {"image": tuple(config.image_key), "text": tuple(config.text_key)}
    asked |= {raw: source.members for raw, source in config.texts.items() if source.members}
    return {**EXTENSIONS, **{kind: names for kind, names in asked.items() if names}}


def needed(config: Config, raws: Iterable[str]) -> set[str]:
    """The kinds of members that some raw inputs are made of."""
    texts, kinds = config.texts, set[str]()
    for raw in raws:
        source = texts.get(raw)
        if source is None or source.members:
            kinds.add(raw)
        elif source.field or source.by != "key":
            kinds.add("json")
    return kinds


def split(name: str) -> tuple[str | None, str]:
    """The key and the extension of a member, by webdataset's rule: a key ends at the first dot of
    its file's name, and has its folder in front. The key is None for a name without a dot.

    Example:
        split("cats/1.seg.png") == ("cats/1", "seg.png")
    """
    # For commands that show or copy samples: webdataset's import takes torch along. Tasks, which
    # load torch in any case, ask webdataset itself (`Recipe.of`).
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2]) if match else (None, "")
