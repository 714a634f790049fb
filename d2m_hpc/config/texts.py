"""Where the texts of samples are: in members, in fields of the JSON, in parquets beside the shards.

`text` is the raw input of models that take the sample's text, and `text:NAME` that of another one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from d2m_hpc.models.inputs import named_text
from d2m_hpc.storage.texts import BRIEF, safe

DEFAULT = "default"
"""In `text_from`, the text that names of columns and features without a text's name mean."""
STEM = "{stem}"
"""What a shard's own name takes the place of."""
FAR = r"json:.+|parquet:.+\.parquet:[^:]+(?::[^:]+)?"
"""A text outside of the members."""
_FAR = "`json:FIELD` and `parquet:PATH.parquet:COLUMN`"
_PARQUET = re.compile(r"parquet:(.+\.parquet):([^:]+)(?::([^:]+))?", re.DOTALL)


class TextSource(NamedTuple):
    """Where a text is: in the first of some members, in a field, or in a column.

    Example:
        >>> source_of("parquet:again/{stem}.parquet:caption").table
        'again/{stem}.parquet'

    Attributes:
        field: of the sample's JSON.
        table: a parquet; `{stem}` in its path stands for the shard's name.
        by: the column of the parquet that tells samples: `key`, or that of a field of the JSON.
    """

    members: tuple[str, ...] = ()
    field: str = ""
    table: str = ""
    column: str = ""
    by: str = "key"


def source_of(given: str) -> TextSource:
    """What an entry of `text_from` names."""
    if given.startswith("json:"):
        return TextSource(field=given.removeprefix("json:"))
    if found := _PARQUET.fullmatch(given):
        path, column, by = found.groups()
        return TextSource(table=path, column=column, by=by or "key")
    return TextSource(members=(given.lower().removeprefix("."),))


def far_text(given: str) -> str:
    """A text of `text_from` without a name.

    Raises:
        ValueError: it is in no field and in no parquet.
    """
    if not re.fullmatch(FAR, given):
        raise ValueError(f"valid are {_FAR}, or names with such a text each")
    return given


def texts_by_name(given: dict[str, str]) -> dict[str, str]:
    """A mapping of `text_from`.

    Raises:
        ValueError: a name or a text is none.
    """
    for name, text in given.items():
        if not re.fullmatch(r"\w{1,40}", name, re.ASCII):
            raise ValueError(f"the name {safe(name, BRIEF)!r}; valid are letters, digits and `_`")
        if not re.fullmatch(rf"{FAR}|[^:/]+", text):
            what = f"{name}: {safe(text, BRIEF)!r}; valid are a member such as `alt.txt`"
            raise ValueError(f"{what}, {_FAR}")
    return given


def by_name(given: str | Mapping[str, str] | None) -> dict[str, str]:
    """The entries of `text_from`, a plain one as `default`."""
    return {DEFAULT: given} if isinstance(given, str) else dict(given or {})


def raw_input(name: str) -> str:
    """The raw input that a name in `text_from` stands for."""
    return named_text("" if name == DEFAULT else name)


def with_paths(given: Any, change: Callable[[str], str]) -> Any:
    """`text_from` with its paths changed."""
    if isinstance(given, Mapping):
        return {name: with_paths(entry, change) for name, entry in given.items()}
    found = _PARQUET.fullmatch(given or "")
    return f"parquet:{change(found[1])}{given[found.end(1) :]}" if found else given
