"""Extensions: whether finished outputs can take a config's added columns, and what these need.

The earlier config is known by its fingerprint, as `Config.fingerprint` makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from d2m_hpc.config.schema import Config
from d2m_hpc.config.texts import DEFAULT, by_name
from d2m_hpc.models.entries import Listed, name_of, parameters_of
from d2m_hpc.models.family import ModelSpec
from d2m_hpc.models.registry import Registry, builtin
from d2m_hpc.models.types import misfit, split
from d2m_hpc.run.manifest import gist
from d2m_hpc.storage.texts import BRIEF, safe
from d2m_hpc.storage.urls import masked_all

LISTS = ("models", "postprocess_columns", "postprocess_features", "additional_fields")
"""The keys of a fingerprint whose lists may grow."""
DERIVE = "derive"
"""The key with what decides the derived columns, by the names of their entries."""
OWN, CODE, TEXTS = "custom_names", ("custom_file", "custom_modules"), "text_from"

Fingerprint = Mapping[str, Any]


def with_own_names(fingerprint: Fingerprint, registry: Registry) -> dict[str, Any]:
    """Add the names that the custom file defines to a fingerprint.

    The file's hash shows that the file has changed, but not which names have. Earlier versions
    wrote None if they did not know the names.
    """
    return {**fingerprint, OWN: sorted(registry.own)}


def obstacles(old: Fingerprint, new: Fingerprint) -> list[str]:
    """List the reasons why outputs of one config cannot be extended to another config's.

    Args:
        old, new: the two fingerprints, each by `with_own_names`.
    """
    free = {*LISTS, "checkpoints", *CODE, OWN, TEXTS, DERIVE}
    renamed = _renamed(old["models"], new["models"])
    return [
        *renamed.values(),
        *(
            f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"
            for key in sorted((old.keys() | new.keys()) - free)
            if old.get(key) != new.get(key)
        ),
        *(
            f"{key}: {name!r} is no longer listed"
            for key in LISTS
            for name in _names(key, old[key])
            if name not in _names(key, new[key])
            and not any(name == m or name.startswith(f"{m}-") for m in renamed)
        ),
        *_other_texts(old.get(TEXTS), new.get(TEXTS)),
        *_other_parameters(old["models"], new["models"]),
        *_other_checkpoints(old["checkpoints"], new["checkpoints"]),
        *_other_code(old, new),
    ]


def _renamed(old: Sequence[Listed], new: Sequence[Listed]) -> dict[str, str]:
    """What is wrong with models that are listed by another name now, by the earlier name."""
    was, now = ({name_of(e): parameters_of(e) for e in entries} for entries in (old, new))
    return {
        name: f"models: {name!r} is named {other!r} now, and counts as another model; name it "
        f"{name!r} in all lists, as its finished outputs are"
        for name, given in was.items()
        for other in now
        if given and name not in now and other not in was and now[other] == given
    }


def _other_texts(old: Any, new: Any) -> Iterator[str]:
    """List the texts that the old outputs may have, and that are elsewhere now."""
    was, now = by_name(old), by_name(new)
    if was.get(DEFAULT) != now.get(DEFAULT):
        yield f"{TEXTS}: was {was.get(DEFAULT)!r}, is {now.get(DEFAULT)!r}"
    for name in was.keys() & now.keys() - {DEFAULT}:
        if was[name] != now[name]:
            yield f"{TEXTS}: {name!r} was {was[name]!r}, is {now[name]!r}"


def _names(key: str, entries: Iterable[Any]) -> list[str]:
    """The entries of a list; fields without types, as a field of another type is read again, and
    models without parameters."""
    named = {"additional_fields": lambda entry: split(entry)[0], "models": name_of}
    return [named.get(key, str)(entry) for entry in entries]


def _other_parameters(old: Iterable[Listed], new: Iterable[Listed]) -> Iterator[str]:
    """List the parameters of models that have changed, without secrets."""
    given = {name_of(entry): parameters_of(entry) for entry in new}
    for entry in old:
        was, now = parameters_of(entry), given.get(name := name_of(entry), {})
        for key in sorted(was.keys() | now.keys()) if name in given else ():
            if was.get(key) != now.get(key):
                shown = (_shown(key, values) for values in (was, now))
                yield "models: {!r}: {} was {}, is {}".format(name, key, *shown)


def _shown(key: str, values: Mapping[str, Any]) -> str:
    return safe(repr(masked_all({key: values[key]})[key]), BRIEF) if key in values else "not given"


def _other_checkpoints(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    # A checkpoint that the new config does not need is of a model reported as no longer listed.
    return [
        f"checkpoints: the sha256 of {name} was {sha256}, is {new[name]}"
        for name, sha256 in old.items()
        if new.get(name, sha256) != sha256
    ]


def _other_code(old: Fingerprint, new: Fingerprint) -> list[str]:
    """List the names in the old outputs whose custom code has changed."""
    modules = [dict(f.get("custom_modules", {}), custom_file=f["custom_file"]) for f in (old, new)]
    was, now = modules
    changed = sorted(m for m in was.keys() | now.keys() if was.get(m) != now.get(m))
    if not changed:
        return []
    change = ", ".join(f"{m}: the sha256 was {was.get(m)}, is {now.get(m)}" for m in changed)
    if old.get(OWN) is None or new[OWN] is None:
        return [f"{change}; it is not known which finished outputs come from it"]
    own = {*old[OWN], *new[OWN]}
    theirs = [name for name in _used(old) if name in own]
    return [f"{change}; {', '.join(theirs)} of the finished outputs come from it"] if theirs else []


def _used(fingerprint: Fingerprint) -> list[str]:
    """The names of all code that decides the outputs of a fingerprint."""
    models = [name_of(entry) for entry in fingerprint["models"]]
    specs = builtin().specs(models).values()
    made = (name for spec in specs for name in spec.preprocessors if isinstance(name, str))
    posts = (*fingerprint["postprocess_columns"], *fingerprint["postprocess_features"])
    return list(dict.fromkeys((*models, *made, *posts)))


def lacked(derived: Mapping[str, str], old: Fingerprint) -> list[str]:
    """The entries of `derive` whose columns old outputs lack, or have by other values.

    Args:
        derived: a hash of what decides each entry's columns, by name.
    """
    known = old.get(DERIVE, {})
    return [name for name, digest in derived.items() if known.get(name) != digest]


def refits(reasons: Iterable[str], config: Config) -> bool:
    """Whether rejected samples may be rows now, as the config declares the type of their field.

    A finished pair has no values of rejected samples, so it cannot be extended by their rows.
    """
    retyped = {gist(misfit(name)) for name in config.field_types}
    return not retyped.isdisjoint(map(gist, reasons))


def only_new(config: Config, old: Fingerprint, registry: Registry) -> Config:
    """Make the config that computes only the columns and features that old outputs lack.

    Its models are the new ones, those that a new column or feature is made of, and all models that
    these depend on: the old outputs lack their values, or have rounded ones.

    Args:
        registry: the names in the config.
    """
    new: dict[str, Any] = {
        key: [name for name in getattr(config, key) if name not in old[key]] for key in LISTS
    }
    known = _names("models", old["models"])  # the same, though a path may be another
    added = [name for name in config.model_names if name not in known]
    needed = _closure({*added, *_sources(config, new, registry)}, registry.models)
    new["models"] = [entry for entry in config.models if name_of(entry) in needed]
    # The old outputs have DataComp's own fields already; new fields get DataComp's names, too.
    new["use_datacomp_keys"] = config.use_datacomp_keys and bool(new["additional_fields"])
    return config.model_copy(update=new)


def _sources(config: Config, new: Mapping[str, list[str]], registry: Registry) -> Iterable[str]:
    """The models that columns and features are made of; all models if one does not name its own."""
    names = (*new["postprocess_columns"], *new["postprocess_features"])
    posts = [registry.post(name) for name in names]
    return [p.model for p in posts] if all(p.model for p in posts) else config.model_names


def _closure(names: Iterable[str], specs: Mapping[str, ModelSpec]) -> set[str]:
    """Models and all models that they depend on."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found and name in specs:
            found.add(name)
            waiting += specs[name].dependencies
    return found
