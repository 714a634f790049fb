"""Read a config file and its overrides; report every mistake at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from d2m_hpc.config.mistakes import nearest, one_line, semantic_mistakes
from d2m_hpc.config.schema import Config, Slurm
from d2m_hpc.errors import ConfigError


def load(path: Path, overrides: Iterable[str] = (), options: Mapping[str, Any] = {}) -> Config:
    """Read a config file.

    Args:
        path: the YAML file.
        overrides: `key=value`, with dots for keys of a section; the value is YAML.
        options: values of `slurm:` keys from the command line; None means not given.

    Raises:
        ConfigError: with every mistake that was found.
    """
    values = _read_yaml(path)
    mistakes = [m for text in overrides if (m := _override(values, text))]
    section = values.get("slurm")
    given = {k: v for k, v in options.items() if v is not None}
    if given and (section is None or isinstance(section, dict)):
        values["slurm"] = {**(section or {}), **given}
    config, invalid = _validate(values)
    mistakes += invalid
    mistakes += semantic_mistakes(config)
    if mistakes:
        raise ConfigError(str(path), mistakes)
    return config


class _Loader(yaml.SafeLoader):
    """Leaves `4:00:00` a text, which YAML 1.1 reads as a number of base 60."""

    def construct_count(self, node: Any) -> int | str:
        return str(node.value) if ":" in node.value else int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_count)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(str(path), ["no such file; give the path of a YAML config"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [f"is not valid YAML: {one_line(error)}"]) from None
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        found = type(values).__name__
        raise ConfigError(
            str(path), [f"found {found} at the top; valid is a mapping of keys such as `models:`"]
        )
    return values


def _override(values: dict[str, Any], text: str) -> str | None:
    """Apply one `key=value`; returns what is wrong with it."""
    dotted, equals, value = text.partition("=")
    *parents, key = dotted.strip().split(".")
    if not equals or not key:
        return f"--set {text}: found no `key=value`; valid is for example --set batch_size=64"
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            return f"--set {dotted}: `{parent}` is not a section; valid is slurm.<key>"
    try:
        values[key] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        return f"--set {dotted}: found {value!r}, which is not valid YAML: {one_line(error)}"
    return None


def _validate(values: dict[str, Any]) -> tuple[Config, list[str]]:
    """The config, or what is valid of it, and the mistakes."""
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
    wrong = {str(e["loc"][0]) for e in errors}
    rest = {k: v for k, v in values.items() if k not in wrong}
    blank: dict[str, Any] = {"models": [], "input_tars": [], "output_metadata_dir": ""}
    partial = Config.model_construct(**{**blank, **rest})
    return partial, [_describe(e) for e in errors]


def _describe(error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        section = Slurm if loc[0] == "slurm" else Config
        return f"{key}: unknown key{nearest(loc[-1], section.model_fields)}"
    if error["type"] == "missing":
        return f"{key}: found nothing; the key is required"
    valid = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: found {error['input']!r}; {valid}"
