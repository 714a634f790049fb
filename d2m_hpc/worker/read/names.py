"""The names of the members that are a sample's image, text and JSON. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from d2m_hpc.config import Config
from d2m_hpc.models.inputs import PICTURES

Members = Mapping[str, tuple[str, ...]]
"""The names of members by kind; the first one that a sample has is used."""
EXTENSIONS: Members = {"image": PICTURES, "text": ("txt",), "json": ("json",)}


def members_of(config: Config) -> Members:
    """The members that a config takes images, texts and JSON from."""
    asked = {"image": tuple(config.image_key), "text": tuple(config.text_key)}
    return {**EXTENSIONS, **{kind: names for kind, names in asked.items() if names}}
