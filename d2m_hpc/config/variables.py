"""`$NAME` and `~` in the paths of a config, replaced by the command that reads the config.

A task may run in another environment, or without a home folder, so the submit decides.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from typing import Any

from d2m_hpc.config.places import Mistake
from d2m_hpc.config.schema import INPUTS, Config
from d2m_hpc.config.texts import with_paths
from d2m_hpc.models.entries import TOLD, Listed, name_of, with_places
from d2m_hpc.storage.urls import is_local, is_pipe, scheme

PATHS = ("output_metadata_dir", "custom_pypath", "run_dir", "weights_dir", "captions")
_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)\}|([A-Za-z_]\w*))", re.ASCII)


def with_variables(config: Config) -> tuple[Config, list[Mistake]]:
    """Expand the paths of a config; those that cannot be expanded are left out, as mistakes."""
    mistakes: list[Mistake] = []

    def of(key: str, text: str, item: str | None = None) -> str | None:
        try:
            return expanded(text) if item is None else as_pattern(text)
        except ValueError as error:
            mistakes.append(Mistake((key,), f"found {text!r}; {error}", item))
            return None  # nothing may read or write the path that is meant

    given = ((key, getattr(config, key)) for key in PATHS)
    update: dict[str, Any] = {key: of(key, text) for key, text in given if text}
    update["output_metadata_dir"] = update.get("output_metadata_dir") or ""
    for key in INPUTS:
        if (texts := getattr(config, key)) is not None:
            update[key] = [t for text in texts if (t := of(key, text, text))]
    update["text_from"] = with_paths(config.text_from, lambda path: of("text_from", path) or path)
    update["models"] = [_of_model(i, entry, mistakes) for i, entry in enumerate(config.models)]
    update["derive"] = {
        name: entry.with_paths(lambda path, name=name: of(f"derive.{name}", path) or path)  # type: ignore[misc]
        for name, entry in config.derive.items()
    }
    return config.model_copy(update=update), mistakes


def _of_model(i: int, entry: Listed, mistakes: list[Mistake]) -> Listed:
    """Expand the paths among a model's parameters; mistakes are noted, and take their place."""
    if "$" not in str(entry):
        return entry  # without a look at its family
    known = len(mistakes)

    def of(parameter: str, text: str) -> str:
        try:
            return expanded(text)
        except ValueError as error:
            loc = ("models", i, name_of(entry), parameter)
            mistakes.append(Mistake(loc, f"found {text!r}; {error}"))
            return text

    made = with_places(entry, of)
    return made if len(mistakes) == known else {name_of(entry): {"kind": TOLD}}


def as_pattern(text: str) -> str:
    """Expand the variables of a pattern; characters of existing files and folders are no globs.

    The value of a variable, like the home folder's name, may hold `[`, `?` and `*`.
    """
    made = expanded(text)
    if made == text or is_pipe(text) or not is_local(made) or os.path.lexists(made):
        return made
    return expanded(text, lambda value: glob.escape(value) if os.path.lexists(value) else value)


def expanded(text: str, taken: Callable[[str], str] = str) -> str:
    """Expand the variables of a path, pattern or URL; the name of an existing file stays as it is.

    A command (`pipe:`) is left to its shell, the query of a web address to its server. `$$` stands
    for one `$`.

    Args:
        taken: turns the value of a variable, or of `~`, into the text to insert.

    Raises:
        ValueError: a variable is not set, or the home folder of `~` is not known.
    """
    if is_pipe(text) or (is_local(text) and os.path.lexists(text)):
        return text
    head, query = text, ""
    if scheme(text) in ("http", "https"):
        head, mark, rest = text.partition("?")
        query = mark + rest
    unset = dict.fromkeys(
        n for m in _VARIABLE.finditer(head) if (n := m[2] or m[3]) and n not in os.environ
    )
    if unset:
        names = ", ".join(f"${name}" for name in unset)
        raise ValueError(f"{names} is not set; export it, or write `$$` for a `$` in a name")
    head = _VARIABLE.sub(lambda m: "$" if m[1] else taken(os.environ[m[2] or m[3]]), head)
    if not (made := _home(head, taken) + query).strip():
        raise ValueError("with its variables it is empty")
    if any("\ud800" <= c <= "\udfff" for c in made):
        raise ValueError("with its variables it is not UTF-8")
    return made


def _home(text: str, taken: Callable[[str], str]) -> str:
    if not text.startswith("~") or not is_local(text):
        return text
    name, slash, rest = text.partition("/")
    if (home := os.path.expanduser(name)) == name and not os.path.lexists(name):
        raise ValueError("the home folder is not known; set HOME, or give the whole path")
    return taken(home) + slash + rest
