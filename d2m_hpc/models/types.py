"""Types of columns by name: `int64`, `list<list<float32>>`, `map<string>`.

Models declare theirs in these words, a config those of its fields; a run folder keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping

FIELD_TYPES = ("bool", "int64", "uint64", "float64", "string", "json")
"""What a config may declare a field as, or as a `list<...>` or `map<...>` of."""
COLUMN_TYPES = (
    *("bool", "string", "float32"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
"""What a custom file may declare a column as, or as a `list<...>` of."""
DEEPEST = 4
"""Lists and maps within each other; parquet's readers know no more than a few levels."""

_FIELDS: Mapping[str, str] = {
    # img2dataset
    "string": "url caption key status error_message exif md5 sha256 sha512 "
    # DataComp, LAION
    "uid text LANGUAGE NSFW "
    # COYO
    "image_phash",
    "int64": "width height original_width original_height "
    "id text_length word_count num_tokens_bert num_tokens_gpt num_faces",
    "float64": "clip_b32_similarity_score clip_l14_similarity_score similarity punsafe pwatermark "
    "aesthetic AESTHETIC_SCORE clip_similarity_vitb32 clip_similarity_vitl14 "
    "nsfw_score_opennsfw2 nsfw_score_gantman watermark_score aesthetic_score_laion_v2",
    "list<list<float64>>": "face_bboxes",
}
KNOWN: Mapping[str, str] = {name: kind for kind, names in _FIELDS.items() for name in names.split()}
"""Fields of well-known data sets. A run whose values are of another type agrees on that one."""


def parts(kind: str) -> tuple[str, str]:
    """`list<int64>` to `list` and `int64`; a plain type has no second part."""
    for outer in ("list", "map"):
        if kind.startswith(f"{outer}<") and kind.endswith(">"):
            return outer, kind[len(outer) + 1 : -1].strip()
    return kind, ""


def is_field_type(kind: str, depth: int = 0) -> bool:
    outer, inner = parts(kind)
    if not inner:
        return outer in FIELD_TYPES
    return depth < DEEPEST and is_field_type(inner, depth + 1)


def is_column_type(kind: str, depth: int = 0) -> bool:
    outer, inner = parts(kind)
    if not inner:
        return outer in COLUMN_TYPES
    return outer == "list" and depth < DEEPEST and is_column_type(inner, depth + 1)


def split(entry: str) -> tuple[str, str]:
    """An entry of `additional_fields` to the field's name and its declared type, if it has one.

    `score: float64` is a field `score`; `dc:title`, without a space, is a name.
    """
    name, colon, kind = entry.rpartition(": ")
    return (name.strip(), kind.strip()) if colon else (entry, "")


def misfit(name: str) -> str:
    """What the reason of every rejection starts with that a field's type is the cause of."""
    return f"field {name!r} does not fit its type"


def leaf(kind: str) -> str:
    """What lists and maps are of in the end."""
    outer, inner = parts(kind)
    return leaf(inner) if inner else outer
