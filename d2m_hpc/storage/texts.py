"""Bound, escape and mask texts from files, for records, terminals and pages."""

from __future__ import annotations

import difflib
import json
import re
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from d2m_hpc.storage.urls import masked

MANY = 40
"""Names that a message about an unknown one lists."""
LIMIT = 1000
"""Characters of a key or a reason on record."""
BRIEF = 80
"""Characters of a name within a message."""
ERROR = 3000
TRACEBACK = 20_000
GAP = " ... "
_ODD = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls (C0, DEL, C1), line and paragraph separators, changes of direction, surrogates."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def safe(text: str, limit: int = LIMIT, lines: bool = False) -> str:
    r"""Mask secrets, escape control characters, and bound the length; twice is the same as once.

    `safe("caf\udce9\x1b[2J")` is `caf\xe9\x1b[2J`, with backslashes: a byte that is not UTF-8 is
    shown as that byte.

    Args:
        limit: characters that are left; a longer text loses its middle.
        lines: keep line ends and tabs, as a traceback needs.
    """
    return fit(masked(text), limit, lines)  # masked first, as a cut secret is not found


def fit(text: str, limit: int = LIMIT, lines: bool = False) -> str:
    """Like `safe` without masking, for names that are data."""
    text = _cut(text, limit)  # before escaping to save time, and after it, as escapes are longer
    if not _ODD.search(text):
        return text
    return _cut(_ODD.sub(_kept if lines else _escaped, text), limit)


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names of many, and how many more there are.

    Example:
        >>> few(["a", "b", "c", "d"])
        'a, b, c and 1 more'
    """
    told = ", ".join(names[:most])
    return told + (f" and {len(names) - most:,} more" if len(names) > most else "")


def counted(number: int, one: str, many: str = "") -> str:
    """A text such as `1 task` or `1,200 tasks`.

    Args:
        many: of other numbers than 1; empty for `one` with an s.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def nearest(name: str, valid: Iterable[str], others: Iterable[str] = ()) -> str:
    """The end of a message about an unknown name: `; did you mean ...?` and the valid names.

    Of more than `MANY` names it has those that are like the unknown one.

    Args:
        others: names that may be meant, too.
    """
    names = sorted(valid)
    plain = {n.lower(): n for n in (*others, *names)}
    given = name[:BRIEF].lower()
    close = [plain[n] for n in difflib.get_close_matches(given, plain, n=5, cutoff=0.5)]
    is_near = difflib.get_close_matches(given, [n.lower() for n in close])
    hint = f"; did you mean {close[0]!r}?" if is_near else ";"
    if len(names) <= MANY:
        return f"{hint} valid: {', '.join(names) or 'none'}"
    return f"{hint} valid are {len(names)} names, such as {', '.join(close or names[:5])}"


def valid(text: str) -> str:
    """Escape only what is not UTF-8, for names that are data."""
    return _SURROGATE.sub(_escaped, text)


def escaped(record: dict[str, Any]) -> dict[str, Any]:
    """Make a record's texts safe; the stem, which names files, stays as it is."""
    bounds = {"error": ERROR, "traceback": TRACEBACK}
    values = dict(record)
    for name, value in record.items():
        if isinstance(value, str) and name != "shard":
            values[name] = safe(value, bounds.get(name, LIMIT), lines=name == "traceback")
    for name in {"rejections", "notices"} & record.keys():
        values[name] = [_each(item) for item in record[name]]
    return values


def _each(item: str | list[str] | tuple[str, ...]) -> str | list[str]:
    """A safe notice, or a rejection's safe key and reason."""
    return safe(item) if isinstance(item, str) else [fit(item[0]), *map(safe, item[1:])]


def traceback_of(error: BaseException) -> str:
    """A traceback as Python prints it, without secrets."""
    return masked("".join(traceback.format_exception(error)))


def json_escaped(line: str) -> str:
    """Escape control characters inside JSON strings, so that parsing gives them back.

    Args:
        line: JSON without line ends between its values.
    """
    return _ODD.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def as_json(values: Any) -> str:
    """Indented ASCII JSON without secrets and without lone surrogates, which some parsers
    refuse."""
    text = json.dumps(_paired(values), indent=1, default=str)
    return text.replace("\x7f", "\\u007f")


def _paired(values: Any) -> Any:
    if isinstance(values, str):
        return _SURROGATE.sub(_escaped, masked(values))
    if isinstance(values, dict):
        return {_paired(key): _paired(value) for key, value in values.items()}
    return [_paired(v) for v in values] if isinstance(values, list | tuple) else values


def _cut(text: str, limit: int) -> str:
    """Keep two thirds of the bound from the start and the rest from the end."""
    if len(text) <= limit:
        return text
    room = max(0, limit - len(GAP))
    end = room // 3
    return (text[: room - end] + GAP + text[len(text) - end :])[:limit]


def _kept(found: re.Match[str]) -> str:
    return found[0] if found[0] in "\n\t" else _escaped(found)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # `surrogateescape`: a byte that is no UTF-8
        code -= 0xDC00
    short = _SHORT.get(found[0])
    return short or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
