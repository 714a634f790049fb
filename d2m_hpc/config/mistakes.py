"""What is wrong with a config that types cannot tell."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from graphlib import CycleError

from d2m_hpc.config.schema import Config
from d2m_hpc.models import declared
from d2m_hpc.models.registry import RAW_INPUTS, ModelSpec, Post, Registry, in_order


def one_line(error: object) -> str:
    return " ".join(str(error).split())


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean ...?` and all valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} valid: {', '.join(names)}"


def semantic_mistakes(config: Config) -> list[str]:
    """What types cannot tell; works on a config of which parts are missing."""
    try:
        registry = declared.names(config.custom_file)
    except OSError as error:
        reason = error.strerror or error
        path = config.custom_file and config.custom_file.absolute()
        return [
            f"custom_pypath: found {config.custom_pypath!r}: {reason}: {path}; valid is a readable "
            "Python file, by its path from the folder in which the command is called",
            *_device_mistakes(config),
        ]
    except (SyntaxError, ValueError) as error:
        return [
            f"custom_pypath: {one_line(error)}; valid is a Python file",
            *_device_mistakes(config),
        ]
    return [
        *_device_mistakes(config),
        *registry_mistakes(config, registry),
        *_name_mistakes(config),
    ]


def registry_mistakes(config: Config, registry: Registry) -> list[str]:
    """Models, columns and features that a registry does not have or cannot connect."""
    return [
        *_model_mistakes(config, registry),
        *_post_mistakes(config, "postprocess_columns", registry.columns, registry),
        *_post_mistakes(config, "postprocess_features", registry.features, registry),
    ]


def _device_mistakes(config: Config) -> list[str]:
    device = str(config.device)
    if device == "cpu" or device.removeprefix("cuda:").isdigit():
        return []
    return [f"device: found {config.device!r}; valid: a CUDA index such as 0, cuda:0, or cpu"]


def _model_mistakes(config: Config, registry: Registry) -> list[str]:
    mistakes = _duplicates("models", config.models)
    for name in config.models:
        if name not in registry.models:
            if registry.complete:
                mistakes.append(f"models: unknown model {name!r}{nearest(name, registry.models)}")
            continue
        spec = registry.models[name]
        mistakes += [
            f"models: {name!r} needs the output of {needed!r}, which is not listed; add it"
            for needed in spec.dependencies
            if needed not in config.models
        ]
        mistakes += _input_mistakes(spec, registry)
    listed = {n: registry.models[n] for n in config.models if n in registry.models}
    try:
        in_order(listed)
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        mistakes.append(f"models: found a circle of dependencies, {circle}; valid is none")
    return mistakes


def _input_mistakes(spec: ModelSpec, registry: Registry) -> list[str]:
    if len(spec.raw_inputs) != len(spec.preprocessors):
        return [
            f"models: {spec.name!r} has {len(spec.raw_inputs)} raw_inputs and "
            f"{len(spec.preprocessors)} preprocessors; valid is one preprocessor for each raw input"
        ]
    unknown = [
        f"models: {spec.name!r} asks for the unknown raw input {name!r}{nearest(name, RAW_INPUTS)}"
        for name in spec.raw_inputs
        if name not in RAW_INPUTS
    ]
    if not registry.complete:
        return unknown
    return unknown + [
        f"models: {spec.name!r} asks for the unknown preprocessor {name!r}"
        f"{nearest(name, registry.preprocessors)}"
        for name in spec.preprocessors
        if name not in registry.preprocessors
    ]


def _post_mistakes(
    config: Config, key: str, known: Mapping[str, Post], registry: Registry
) -> list[str]:
    names: list[str] = getattr(config, key) or []
    mistakes = _duplicates(key, names)
    for name in names:
        if name not in known:
            if registry.complete:
                mistakes.append(f"{key}: unknown name {name!r}{_other_list(key, name, registry)}")
        elif known[name].model and known[name].model not in config.models:
            mistakes.append(
                f"{key}: {name!r} is made of {known[name].model!r}, which is not in models; "
                f"add it there or drop {name!r}"
            )
    return mistakes


def _other_list(key: str, name: str, registry: Registry) -> str:
    if key == "postprocess_columns" and name in registry.features:
        return "; it is a feature: list it under postprocess_features"
    if key == "postprocess_features" and name in registry.columns:
        return "; it is a column: list it under postprocess_columns"
    valid = registry.columns if key == "postprocess_columns" else registry.features
    return nearest(name, valid)


def _duplicates(key: str, names: list[str]) -> list[str]:
    twice = sorted({n for n in names if names.count(n) > 1})
    return [f"{key}: found {n!r} more than once; valid is once" for n in twice]


def _name_mistakes(config: Config) -> list[str]:
    """Two columns of one name would make a parquet that nobody can read."""
    names = ["key", *map(config.renamed, config.postprocess_columns), *config.carried]
    twice = {n for n in names if names.count(n) > 1} - {
        n for n in config.postprocess_columns if config.postprocess_columns.count(n) > 1
    }
    return [
        f"additional_fields: found {n!r}, another column's name; valid is a name of its own"
        for n in sorted(twice)
    ]
