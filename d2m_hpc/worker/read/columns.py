"""Choose the columns of a parquet that hold keys, images and texts. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import pyarrow as pa

from d2m_hpc.config import Config
from d2m_hpc.models.inputs import PICTURES, RAW_INPUTS
from d2m_hpc.storage.texts import BRIEF, few, safe

IMAGES = ("image", *PICTURES)
TEXTS = ("txt", "text", "caption")
KEYS = ("key", "__key__")
SHOWN = 12
"""Columns that are named of a parquet that lacks one."""


class Columns(NamedTuple):
    """The names of columns; empty where there is none, or none is needed.

    Attributes:
        status: img2dataset's, which tells the rows of failed downloads.
        others: the columns of further texts, by raw input.
    """

    key: str = ""
    image: str = ""
    text: str = ""
    status: str = ""
    others: Mapping[str, str] = MappingProxyType({})


def choose(schema: pa.Schema, config: Config, needed: Collection[str]) -> Columns:
    """Choose columns by the config's keys, or by names and types.

    Args:
        needed: the kinds of members that samples must have.

    Raises:
        ValueError: a needed column is missing, is of another type, or may be any of several.
    """
    if len({*schema.names}) < len(schema.names):
        raise ValueError("two of its columns have one name")
    texts = [name for name in schema.names if is_text(schema.field(name).type)]
    is_img2dataset = {"key", "url", "status", "error_message"} <= {*texts}
    return Columns(
        key=next((name for name in KEYS if name in schema.names), ""),
        image=_image(schema, config) if "image" in needed else "",
        text=_text(schema, config, texts) if "text" in needed else "",
        status="status" if is_img2dataset else "",
        others={
            raw: _column_of_texts(schema, config.texts[raw].members, "text_from", texts)
            for raw in sorted({*needed})
            if raw not in RAW_INPUTS
        },
    )


def kinds_in(schema: pa.Schema, config: Config) -> set[str]:
    """The kinds of members that a parquet has columns for."""
    types = {field.name: field.type for field in schema}
    has_image = any(is_bytes(kind) or is_wrapped(kind) for kind in types.values())
    has_text = config.text_key or any(is_text(types.get(name, pa.null())) for name in TEXTS)
    return {"json", *(("image",) if has_image else ()), *(("text",) if has_text else ())}


def is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    is_one = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return any(check(kind) for check in is_one) or types.is_binary_view(kind)


def is_wrapped(kind: pa.DataType) -> bool:
    """Whether a column holds images as `datasets` writes them: `struct<bytes, path>`."""
    inner = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    return inner >= 0 and is_bytes(kind.field(inner).type)


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _image(schema: pa.Schema, config: Config) -> str:
    found = [n for n in schema.names if is_wrapped(schema.field(n).type)]
    plain = [n for n in schema.names if is_bytes(schema.field(n).type)]
    if config.image_key:
        name = _named(schema, config.image_key, "image_key")
        if name in (*found, *plain):
            return name
        raise ValueError(f"{_typed(schema, name)} and no images (image_key)")
    if len(found) != 1:
        known = [name for name in plain if name.lower() in IMAGES]
        found = found or (known if len(known) == 1 else plain)
    if len(found) > 1:
        raise ValueError(f"several columns hold bytes ({shown(found)}); image_key says which")
    if found:
        return str(found[0])
    types = {field.name: field.type for field in schema}
    named = [n for n in types if is_text(types[n]) and ("url" in n.lower() or n.lower() in IMAGES)]
    structs = (n for n in types if pa.types.is_struct(types[n]))
    paths = [n for n in structs if types[n].get_field_index("path") >= 0]
    if urls := named + paths:
        raise ValueError(
            f"it holds URLs or paths of images (column {safe(urls[0], BRIEF)!r}) and no images; "
            "download them first, for example by img2dataset"
        )
    raise ValueError(f"no column holds images; it has {shown(schema.names)}")


def _text(schema: pa.Schema, config: Config, texts: Sequence[str]) -> str:
    given, key = config.texts["text"].members, "text_key" if config.text_key else "text_from"
    if config.text_key or (config.text_from and given != ("txt",)):
        return _column_of_texts(schema, given, key, texts)
    found = next((name for name in TEXTS if name in texts), "")
    if not found:
        named = next((name for name in TEXTS if name in schema.names), "")
        what = f"no column of texts is called {', '.join(TEXTS)}"
        what = f"{_typed(schema, named)} and no texts" if named else what
        advice = f"text_key names one, of {shown(texts)}" if texts else "no column holds texts"
        raise ValueError(f"{what}; {advice}")
    return found


def _column_of_texts(schema: pa.Schema, keys: Sequence[str], key: str, texts: Sequence[str]) -> str:
    name = _named(schema, keys, key)
    if name not in texts:
        raise ValueError(f"{_typed(schema, name)} and no texts ({key})")
    return name


def _named(schema: pa.Schema, keys: Sequence[str], key: str) -> str:
    """The first column that a config names; such names are lower-case, as members' are."""
    for wanted in keys:
        for name in schema.names:
            if name.lower() == wanted:
                return str(name)
    raise ValueError(f"no column {shown(keys)} ({key}); it has {shown(schema.names)}")


def _typed(schema: pa.Schema, name: str) -> str:
    return f"the column {safe(name, BRIEF)!r} holds {safe(str(schema.field(name).type), BRIEF)}"


def shown(names: Sequence[str]) -> str:
    return few([safe(name, 30) for name in names], SHOWN)
