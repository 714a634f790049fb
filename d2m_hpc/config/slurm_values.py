"""Checks of values for Slurm, which would take some wrong values for others."""

from __future__ import annotations

import math
import re

WALLTIME = re.compile(
    r"\d+(:\d+){0,2}"  # minutes, minutes:seconds, hours:minutes:seconds
    r"|\d+-\d+(:\d+){0,2}"  # days-hours, days-hours:minutes, days-hours:minutes:seconds
    r"|unlimited|infinite",
    re.IGNORECASE | re.ASCII,
)
FORMS = "4:00:00, 1-12 (days and hours), 1-12:30:00, or a number of minutes"
_UNITS = re.compile(r"(\d+) ?(s|m|min|h|hours?|d|days?)", re.IGNORECASE | re.ASCII)
_OPTION = re.compile("[a-z][a-z0-9-]*")
_CONTROL = re.compile("[\0-\x1f\x7f]")


def no_switch(value: object) -> object:
    """Refuse `true` and `false` with a ValueError: Python takes them for numbers."""
    if isinstance(value, bool):
        raise ValueError("valid is a value, not `true` or `false`")
    return value


def one_line(text: str) -> str:
    """Refuse line ends and other control characters with a ValueError."""
    if _CONTROL.search(text):
        raise ValueError("valid is one line without control characters")
    return text


def walltime(value: object) -> object:
    """Refuse a time of a form unknown to sbatch with a ValueError; `010` stays ten minutes."""
    if value is None or (isinstance(value, str) and WALLTIME.fullmatch(value)):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"valid is {FORMS}{_meant(value)}")


def minutes(value: str | int | None) -> float:
    """The minutes of a valid walltime; infinite for none, 0 and `unlimited`.

    Example:
        >>> minutes("1-12"), minutes("4:00:00"), minutes("30:30"), minutes(90)
        (2160.0, 240.0, 30.5, 90.0)
    """
    days, dash, rest = str(value or "unlimited").rpartition("-")
    if not rest[0].isdigit():
        return math.inf
    numbers = [*map(int, rest.split(":"))]
    if dash:  # hours:minutes:seconds
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) == 1:
        numbers = [0, *numbers, 0]
    hours, least, seconds = [0] * (3 - len(numbers)) + numbers
    found = int(days or 0) * 1440 + hours * 60 + least + seconds / 60
    return found or math.inf


def _meant(value: object) -> str:
    """The form that a number with a unit was probably meant as."""
    match = _UNITS.fullmatch(value) if isinstance(value, str) and len(value) < 20 else None
    if not match:
        return ""
    number, unit = match.groups()
    form = {"s": f"0:{number}", "m": number, "h": f"{number}:00:00", "d": f"{number}-0"}
    return f"; did you mean {form[unit[0].lower()]!r}?"


def options(value: object) -> object:
    """Refuse names that are no long options and values that are not plain with a ValueError."""
    if value is None:
        return {}
    for name, given in value.items() if isinstance(value, dict) else ():
        if not isinstance(name, str) or not _OPTION.fullmatch(name):
            raise ValueError(f"{name!r} is no long option without its dashes, such as `exclusive`")
        if not isinstance(given, str | int | float | None):
            raise ValueError(f"the value of {name!r} is a {type(given).__name__}; valid is a text")
        if isinstance(given, str):
            one_line(given)
        if name == "time":
            walltime(given)
        if name in ("clusters", "cluster"):
            raise ValueError(
                f"{name!r} holds for sbatch alone, and the tasks would not be found again; valid "
                "is `export SLURM_CLUSTERS=NAME`, which all commands of Slurm's follow"
            )
    return value
