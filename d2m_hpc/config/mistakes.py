"""Mistakes in a config that types cannot find."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from graphlib import CycleError
from pathlib import Path
from typing import TYPE_CHECKING

from d2m_hpc.config.derive import Clusters, Duplicates
from d2m_hpc.config.places import Mistake
from d2m_hpc.config.schema import INPUTS, Config, Slurm
from d2m_hpc.config.texts import DEFAULT, by_name
from d2m_hpc.models import types
from d2m_hpc.models.family import ModelSpec, Post
from d2m_hpc.models.inputs import RAW_INPUTS, ImageInput
from d2m_hpc.storage.texts import BRIEF, nearest, safe

if TYPE_CHECKING:  # its import declares all families, which `--help` does not need
    from d2m_hpc.models.registry import Registry

SET_BY_US = ("array", "chdir", "job-name", "output")
"""Options of sbatch that are set for each job, so that a user's would be ignored."""
UNNAMED = ("quiet", "test-only")
"""Options with which sbatch's answer names no job."""
MANY = 20
"""The most wrong names of a list that are reported one by one."""


def quoted(name: str) -> str:
    return repr(safe(name, BRIEF))


def semantic_mistakes(config: Config) -> list[Mistake]:
    """Find all mistakes that types cannot find; parts of the config may be missing.

    The names of a custom file are known once it has run: `registry_mistakes` checks them then.
    """
    from d2m_hpc.models.registry import Registry

    names = registry_mistakes(config, Registry()) if config.custom_file is None else []
    return [
        *_file_mistakes(config.custom_file),
        *_device_mistakes(config),
        *_input_mistakes(config),
        *_text_mistakes(config),
        *_size_mistakes(config),
        *slurm_mistakes(config.slurm),
        *names,
        *_name_mistakes(config),
        *_derive_mistakes(config),
    ]


def _file_mistakes(file: Path | None) -> list[Mistake]:
    """Find out why a custom file cannot run, without running it."""
    if file is None:
        return []
    try:
        ast.parse(file.read_bytes(), filename=str(file))
    except OSError as error:
        what = (
            f"found {str(file)!r}: {error.strerror or error}: {file.absolute()}; valid is a "
            "readable Python file, by its path from the folder in which the command is called"
        )
    except (RecursionError, MemoryError):
        what = f"{file} is nested too deeply; valid is a Python file"
    except (SyntaxError, ValueError) as error:
        what = f"{' '.join(str(error).split())}; valid is a Python file"
    else:
        return []
    return [Mistake(("custom_pypath",), what)]


def registry_mistakes(config: Config, registry: Registry) -> list[Mistake]:
    """Find models, columns and features that a registry lacks or cannot connect.

    Args:
        registry: the built-in names, and those of a custom file.
    """
    registry, problems = config.registry(registry)
    wrong = [problem.model for problem in problems]
    return [
        *(Mistake(("models", *p.loc), p.what) for p in problems if p.what),
        *_model_mistakes(config, registry, wrong),
        *_post_mistakes(config, "postprocess_columns", registry.columns, registry, wrong),
        *_post_mistakes(config, "postprocess_features", registry.features, registry, wrong),
    ]


def checkpoint_mistakes(config: Config, registry: Registry) -> list[Mistake]:
    """Find models whose checkpoints do not fit what the config says of them.

    Args:
        registry: with the config's own models.
    """
    return [Mistake(("models", *p.loc), p.what) for p in registry.unfit(config.models)]


def _device_mistakes(config: Config) -> list[Mistake]:
    device = str(config.device)
    number = device.removeprefix("cuda:")
    if device == "cpu" or (number.isascii() and number.isdecimal() and len(number) < 5):
        return []
    what = f"found {config.device!r}; valid: a CUDA index such as 0, cuda:0, or cpu"
    return [Mistake(("device",), what)]


def _input_mistakes(config: Config) -> list[Mistake]:
    given = [key for key in INPUTS if getattr(config, key) is not None]
    if len(given) > 1:
        return [Mistake(("inputs",), "found input_tars, too; valid is one of both")]
    what = "found nothing; the key is required, or `inputs` in its place"
    return [] if given else [Mistake(("input_tars",), what)]


def slurm_mistakes(slurm: Slurm) -> list[Mistake]:
    """Find numbers of kinds of nodes that differ, and options that would be ignored."""
    gres, constraint = len(slurm.gres), len(slurm.constraint)
    found = []
    if not (min(gres, constraint) < 2 or gres == constraint):
        what = f"found {constraint} entries, and slurm.gres has {gres}"
        found.append(Mistake(("slurm", "constraint"), f"{what}; valid is one for each of them"))
    kinds = ["gres"] * (gres > 1) + ["constraint"] * (constraint > 1)
    set_of = {"extra": (*SET_BY_US, *kinds), "rounds": (*SET_BY_US, "begin", "dependency")}
    for key, names in set_of.items():
        for option in getattr(slurm, key):
            if any(name.startswith(option) for name in names):  # sbatch takes abbreviations
                what = f"found {option!r}, which is set for each job; leave it out"
                found.append(Mistake(("slurm", key), what))
            elif any(name.startswith(option) for name in UNNAMED):
                what = f"found {option!r}, with which sbatch names no job; leave it out"
                found.append(Mistake(("slurm", key), what))
    return found


def _size_mistakes(config: Config) -> list[Mistake]:
    if not (config.task_minutes and (config.shards_per_task or config.tars_per_wds)):
        return []
    return [Mistake(("task_minutes",), "found a number of shards, too; valid is one of both")]


def _text_mistakes(config: Config) -> list[Mistake]:
    if config.text_key and DEFAULT in by_name(config.text_from):
        return [Mistake(("text_from",), "found text_key, too; valid is one of both")]
    if config.use_datacomp_keys and config.texts["text"].table:
        what = "found a parquet, of which use_datacomp_keys can make no column `text`; valid is "
        return [Mistake(("text_from",), f"{what}json:FIELD, or a name for this text")]
    return []


def _model_mistakes(config: Config, registry: Registry, wrong: Collection[str]) -> list[Mistake]:
    """
    Args:
        wrong: models of which more than this is wrong.
    """
    from d2m_hpc.models.registry import in_order

    listed = config.model_names
    mistakes = _duplicates("models", [name for name in listed if name not in wrong])
    known = registry.specs(n for n in listed if n not in wrong)
    unknown = [name for name in listed if name not in known and name not in wrong]
    mistakes += [
        _listed(f"unknown model {quoted(n)}{_if_kind(n)}{nearest(n, registry.models)}", n)
        for n in unknown[:MANY]
    ]
    mistakes += _more("models", unknown)
    raws = list(dict.fromkeys((*RAW_INPUTS, *config.texts)))
    for name, spec in known.items():
        mistakes += [
            _listed(f"{name!r} needs the output of {d!r}, which is not listed; add it", name)
            for d in spec.dependencies
            if d not in listed
        ]
        mistakes += (_listed(what, name) for what in _raw_mistakes(spec, registry, raws))
    try:
        in_order(known)
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        what = f"found a circle of dependencies, {circle}; valid is none"
        mistakes.append(_listed(what, error.args[1][0]))
    return mistakes


def _if_kind(name: str) -> str:
    """What to say of a kind in the place of a model."""
    from d2m_hpc.models.entries import kinds

    return f", which is a kind: `NAME: {{kind: {name}, ...}}` is one" if name in kinds() else ""


def _listed(what: str, name: str) -> Mistake:
    return Mistake(("models",), what, name)


def _more(key: str, wrong: Sequence[str]) -> list[Mistake]:
    """One mistake for the wrong names of a list beyond the first `MANY`."""
    left = len(wrong) - MANY
    return [Mistake((key,), f"found {left:,} more unknown names")] if left > 0 else []


def _raw_mistakes(
    spec: ModelSpec, registry: Registry, raws: Collection[str] = RAW_INPUTS
) -> list[str]:
    if len(spec.raw_inputs) != len(spec.preprocessors):
        return [
            f"{spec.name!r} has {len(spec.raw_inputs)} raw_inputs and "
            f"{len(spec.preprocessors)} preprocessors; valid is one preprocessor for each raw input"
        ]
    unknown = [
        f"{spec.name!r} asks for the unknown raw input {name!r}{nearest(name, raws)}"
        for name in spec.raw_inputs
        if name not in raws
    ]
    unknown += [
        f"{spec.name!r} wants the raw input {raw!r} prepared as an {form}; valid is 'image' for it"
        for raw, form in spec.inputs
        if isinstance(form, ImageInput) and raw != "image"
    ]
    return unknown + [
        f"{spec.name!r} asks for the unknown preprocessor {name!r}"
        f"{nearest(name, registry.preprocessors)}"
        for name in spec.preprocessors
        if isinstance(name, str) and name not in registry.preprocessors
    ]


def _post_mistakes(
    config: Config,
    key: str,
    known: Mapping[str, Post],
    registry: Registry,
    wrong: Collection[str],
) -> list[Mistake]:
    names: list[str] = getattr(config, key) or []
    mistakes = _duplicates(key, names)
    listed = set(config.model_names)
    if not listed:
        return mistakes  # for a mistake in `models`, which is told
    told = {post.model for post in (*registry.columns.values(), *registry.features.values())}
    unknown_models = {*listed} - registry.models.keys()
    unsure = [model for model in {*wrong, *unknown_models} if model not in told]
    meant = {m for name in unsure for m in get_close_matches(name, registry.models, n=1)}
    untold = tuple(f"{model}-" if model else "" for model in unsure)
    unknown = [name for name in names if name not in known and not name.startswith(untold)]
    mistakes += [
        Mistake(
            (key,), f"unknown name {quoted(name)}{_other_list(config, key, name, registry)}", name
        )
        for name in unknown[:MANY]
    ]
    mistakes += _more(key, unknown)
    for name in dict.fromkeys(names):
        if name in known and known[name].model and known[name].model not in listed:
            if known[name].model in meant or name.startswith(untold):
                continue  # its name is misspelt there, or what it gives is not known
            what = (
                f"{name!r} is made of {known[name].model!r}, which is not in models; "
                f"add it there or drop {name!r}"
            )
            mistakes.append(Mistake((key,), what, name))
    return mistakes


def _other_list(config: Config, key: str, name: str, registry: Registry) -> str:
    """Where the name belongs, or which ones the listed models give."""
    if key == "postprocess_columns" and name in registry.features:
        return "; it is a feature: list it under postprocess_features"
    if key == "postprocess_features" and name in registry.columns:
        return "; it is a column: list it under postprocess_columns"
    known = registry.columns if key == "postprocess_columns" else registry.features
    given = {"", *config.model_names}
    return nearest(name, [n for n, post in known.items() if post.model in given], known)


def _duplicates(key: str, names: Iterable[str]) -> list[Mistake]:
    twice = sorted(_repeated(names))
    return [
        Mistake((key,), f"found {quoted(n)} more than once; valid is once", n) for n in twice[:MANY]
    ]


def _repeated(names: Iterable[str]) -> set[str]:
    return {name for name, times in Counter(names).items() if times > 1}


def _name_mistakes(config: Config) -> list[Mistake]:
    """Find repeated names of columns, which make an unreadable parquet, and unknown types."""
    twice = sorted(_repeated(config.columns) - _repeated(config.postprocess_columns))
    what = "another column's name; valid is a name of its own"
    key = "additional_fields"
    found = [Mistake((key,), f"found {quoted(n)}, {what}", n) for n in twice[:MANY]]
    split = list(dict.fromkeys(config.asked_fields))
    found += _duplicates(key, [name for name, _ in split])
    odd = [(name, kind) for name, kind in split if kind and not types.is_field_type(kind)]
    valid = f"valid: {', '.join(types.FIELD_TYPES)}, and list<...> and map<...> of these"
    return found + [
        Mistake((key,), f"{quoted(name)} has the unknown type {quoted(kind)}; {valid}", name)
        for name, kind in odd[:MANY]
    ]


def _derive_mistakes(config: Config) -> list[Mistake]:
    """Find derived columns with another column's name, or that read what the config lacks."""
    from d2m_hpc.models.registry import NAME, NAME_RULE

    # An export has columns and features in a table.
    names = {*config.columns, *map(config.renamed, config.postprocess_features)}
    clusters: dict[str, str] = {}
    found: list[Mistake] = []
    for name, entry in config.derive.items():
        loc = ("derive", name)
        if not NAME.fullmatch(name):
            found.append(Mistake(loc, f"the name {quoted(name)}: valid: {NAME_RULE}"))
        made = entry.columns(name)
        taken = [column for column in made if column in names]
        found += [Mistake(loc, f"{quoted(n)} is another column's or feature's name") for n in taken]
        names |= made.keys()
        for key, feature in entry.reads.items():
            if feature not in config.postprocess_features:
                what = f"found {quoted(feature)}, which is not listed in postprocess_features"
                near = nearest(feature, config.postprocess_features)
                found.append(Mistake((*loc, key), what + near))
        if isinstance(entry, Clusters):
            clusters[name] = entry.feature
        if isinstance(entry, Duplicates) and clusters.get(entry.within) != entry.feature:
            valid = [n for n, feature in clusters.items() if feature == entry.feature]
            what = f"found {quoted(entry.within)}; valid is an entry of kind clusters before, on "
            what += f"the same feature: {', '.join(valid) or 'there is none'}"
            found.append(Mistake((*loc, "within"), what))
    return found
