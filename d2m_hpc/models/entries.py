"""An item of a config's `models`: a plain name, or a name with its family and parameters."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from d2m_hpc.described import described
from d2m_hpc.models import families
from d2m_hpc.models.family import PACKAGE, Family, ParameterError, at_hand
from d2m_hpc.storage.texts import BRIEF, nearest, safe

GROUP = "d2m_hpc.models"
"""Entry points of families in other packages: a kind, and the family's class."""
Listed = str | Mapping[str, Any]
TOLD = "\0"
"""The kind in the place of an item's parameters in which a mistake is told already."""


def name_of(entry: Listed) -> str:
    """The model's name.

    Example:
        >>> name_of({"siglip": {"kind": "open_clip", "model": "ViT-B-16-SigLIP"}})
        'siglip'
    """
    return entry if isinstance(entry, str) else next(iter(entry), "")


def parameters_of(entry: Listed) -> Mapping[str, Any]:
    """The kind and the parameters; nothing of a plain name."""
    return {} if isinstance(entry, str) else next(iter(entry.values()))


def one_line(entry: Listed) -> str:
    """The item as people read it.

    Example:
        >>> one_line({"writing": {"kind": "text-boxes", "limit_side_len": 320}})
        'writing (kind: text-boxes, limit_side_len: 320)'
    """
    if isinstance(entry, str):
        return entry
    given = ", ".join(f"{key}: {value}" for key, value in parameters_of(entry).items())
    return f"{name_of(entry)} ({given})"


@cache
def known_families() -> dict[str, type[Family]]:
    """Our own families by kind."""
    modules = (m.name for m in pkgutil.iter_modules(families.__path__, f"{families.__name__}."))
    found = (value for module in modules for value in vars(import_module(module)).values())
    return {value.kind: value for value in found if _is_family(value)}


def _is_family(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Family) and "kind" in vars(value)


@cache
def plugged_in(kind: str) -> type[Family] | None:
    """The family of another package, by its entry point.

    Raises:
        ParameterError: its package has it, but it cannot be imported.
    """
    for point in entry_points(group=GROUP, name=kind):
        try:
            found = point.load()
        except (Exception, SystemExit) as error:
            what = f"{point.value} of the package {_package(point)} cannot be imported: {error!r}"
            raise ParameterError("kind", what) from error
        if not _is_family(found):
            what = f"{point.value} of the package {_package(point)} is no class of a Family"
            raise ParameterError("kind", what)
        if found.build is Family.build and not found.built_by:
            what = f"{point.value} of the package {_package(point)} has no `build`"
            raise ParameterError("kind", f"{what}, which makes the model, and no `built_by`")
        return found  # type: ignore[no-any-return]
    return None


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "?"


def kinds() -> list[str]:
    """The kinds of all families, those of other packages too."""
    return sorted({*known_families(), *entry_points(group=GROUP).names})


def packages(entries: Iterable[Listed]) -> list[str]:
    """The packages, with versions, whose families a config's models are."""
    asked = {str(parameters_of(e).get("kind")) for e in entries if not isinstance(e, str)}
    foreign = asked - known_families().keys()
    return sorted(_package(p) for kind in foreign for p in entry_points(group=GROUP, name=kind))


@cache
def presets() -> dict[str, Family]:
    """The models that a config may list by a plain name."""
    kinds = known_families().values()
    return {name: kind(**given) for kind in kinds for name, given in kind.presets.items()}


def family_of(entry: Mapping[str, Any]) -> Family:
    """The family that an item names, with its parameters.

    Raises:
        ParameterError: the kind or a parameter is none, or a parameter has a wrong value.
    """
    given = next(iter(entry.values()), None)
    if len(entry) != 1 or not isinstance(given, Mapping):
        what = f"found {_shown(entry)}; valid is one name, with a mapping that has its `kind`"
        raise ParameterError("", what)
    parameters = dict(given)
    kind = str(parameters.pop("kind", ""))
    if kind == TOLD:
        raise ParameterError()
    if not kind:
        raise ParameterError("", f"found no `kind`; valid: {', '.join(kinds())}")
    family = known_families().get(kind) or plugged_in(kind)
    if family is None:
        what = f"unknown kind {_shown(kind)}{nearest(kind, kinds())}"
        if kind in presets():
            what = f"{kind!r} is the plain name of a model; list that alone, `- {kind}`"
        raise ParameterError("kind", what)
    try:
        return family(**parameters)
    except ValidationError as error:
        told: dict[Any, Any] = {}
        for one in error.errors(include_url=False, include_context=False):
            field = family.model_fields.get(str((one["loc"] or ("",))[0]))
            is_choice = field and get_origin(field.annotation) in (Union, UnionType)
            # Each choice of a parameter that takes values of several kinds says what it wants.
            place = one["loc"][:1] if is_choice else (*one["loc"], one["msg"])
            if place not in told or told[place]["type"].endswith("_type"):
                told[place] = one
        found = (_mistake(family, parameters, e) for e in told.values())
        raise ParameterError(*dict.fromkeys(found)) from None


def with_paths(entry: Listed, change: Callable[[Path], str]) -> Listed:
    """The item with those parameters changed that are paths at hand.

    Example:
        >>> given = {"own": {"kind": "open_clip", "model": "ViT-B-32", "pretrained": "/w/net.pt"}}
        >>> with_paths(given, lambda path: path.name)["own"]["pretrained"]
        'net.pt'
    """
    return with_places(entry, lambda _, given: change(path) if (path := at_hand(given)) else given)


def with_places(entry: Listed, change: Callable[[str, str], str]) -> Listed:
    """The item with those parameters changed that may be paths.

    An item that names no family is as it was: `family_of` says what is wrong with it.

    Args:
        change: given a parameter and its value, returns the new value.
    """
    if isinstance(entry, str):
        return entry
    name, given = next(iter(entry.items()), ("", None))
    if len(entry) != 1 or not isinstance(given, Mapping):
        return entry
    kind = str(given.get("kind"))
    try:
        family = known_families().get(kind) or plugged_in(kind) or Family
    except ParameterError:
        return entry
    texts = [p for p in family.paths if isinstance(given.get(p), str)]
    return {name: {**given, **{p: change(p, given[p]) for p in texts}}}


def _mistake(family: type[Family], parameters: Mapping[str, Any], error: Any) -> tuple[str, str]:
    """A parameter, and what is wrong with it."""
    parameter = str(error["loc"][0]) if error["loc"] else ""
    if parameter not in family.model_fields:
        return parameter, f"unknown parameter{nearest(parameter, family.model_fields)}"
    meant = meanings(family).get(parameter, "")
    if parameter not in parameters:
        return "", f"found no `{parameter}`, which is required: {meant}"
    what = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        what = "a value is missing"
    elif error["type"] == "string_type" and isinstance(error["input"], int | float):
        what = "valid is a text; write it in quotes"
    return parameter, f"found {_shown(parameters[parameter])}; {what[0].lower()}{what[1:]}"


def meanings(family: type[Family]) -> dict[str, str]:
    """What a family's parameters are, with their valid values where these are few.

    Example:
        >>> meanings(known_families()["oai-clip"])
        {'net': 'the architecture; valid: ViT-B-32, ViT-L-14'}
    """
    told = described(family)
    for name, field in family.model_fields.items():
        if few := _choices(field.annotation):
            told[name] = f"{told.get(name, '')}; valid: {', '.join(few)}"
    return told


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [*map(str, get_args(kind))]
    return [choice for part in get_args(kind) for choice in _choices(part)]


def _shown(value: Any) -> str:
    return safe(repr(value), BRIEF)


def require_packages(family: Family) -> None:
    """
    Raises:
        ParameterError: a package that the family needs is not installed.
    """
    for module, wheel in family.packages.items():
        if find_spec(module) is None:
            what = f"needs {module}, which is not installed; `pip install '{wheel}'`"
            raise ParameterError("kind", what)
    given = {parameter: str(getattr(family, parameter)) for parameter in family.paths}
    for parameter, value in given.items():
        if value.startswith(PACKAGE) and at_hand(value) is None:
            what = f"{value}: no package {value[len(PACKAGE) :].split('/')[0]!r} is installed"
            if ".." in value.split("/")[1:]:
                what = f"{value}: valid is a path within the package, without `..`"
            raise ParameterError(parameter, what)
