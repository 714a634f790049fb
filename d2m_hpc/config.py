"""The YAML file, typed. Every mistake in it is reported at once, with its key.

The keys of the seed program (dataset2metadata) keep their names and meanings.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from d2m_hpc.errors import ConfigError
from d2m_hpc.mistakes import nearest, one_line, semantic_mistakes
from d2m_hpc.models import declared
from d2m_hpc.models.registry import DATACOMP_KEYS, ModelSpec


def _as_list(value: object) -> object:
    """YAML's `key:` without a value means an empty list."""
    return [] if value is None else value


def _tars_as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _off_as_text(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


Names = Annotated[list[str], BeforeValidator(_as_list)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A mapping in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Slurm(Section):
    """How array tasks are submitted; each key is also an option of `d2m-submit`."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | int | None = None
    cpus_per_task: Count | None = None
    mem: str | int | None = None
    gres: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    max_parallel: Count | None = None
    tasks_per_node: Count = 1
    requeue: bool = True
    setup: Names = []
    extra: dict[str, Any] = {}


class Config(Section):
    """One workload: which models, over which tars, to which folder."""

    models: Annotated[list[str], Field(min_length=1)]
    postprocess_columns: Names = []
    postprocess_features: Names = []
    additional_fields: Names = []
    nworkers: Count = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)), description="decode threads"
    )
    batch_size: Count = 512
    device: int | str = 0
    input_tars: Annotated[list[str], BeforeValidator(_tars_as_list), Field(min_length=1)]
    output_metadata_dir: Annotated[str, Field(min_length=1)]
    custom_pypath: str | None = None
    reprocess: bool = False
    use_datacomp_keys: bool = False
    tars_per_wds: Count | None = None
    logging: bool = False
    warn_and_continue: bool = True

    run_dir: str | None = None
    amp: Annotated[Literal["auto", "float16", "bfloat16", "off"], BeforeValidator(_off_as_text)] = (
        "auto"
    )
    resize: Literal["fast", "exact"] = "fast"
    feature_dtype: Literal["float16", "float32"] = "float16"
    shards_per_task: Count | None = None
    max_rejected_fraction: float = Field(0.1, ge=0, le=1)
    allow_truncated_shards: bool = False
    max_image_pixels: Count = 178_956_970
    max_attempts: Count = 3
    max_node_failures: Annotated[int, Field(ge=0)] = 3
    lease_seconds: Annotated[float, Field(gt=0)] = 120.0
    stall_seconds: Annotated[float, Field(gt=0)] = 1800.0
    steal: bool = True
    weights_dir: str | None = None
    allow_unpublished_weights: bool = False
    slurm: Slurm = Slurm()

    @property
    def custom_file(self) -> Path | None:
        return Path(self.custom_pypath).expanduser() if self.custom_pypath else None

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """The models asked for, by name."""
        known = declared.names(self.custom_file).models
        return {name: known[name] for name in self.models if name in known}

    def renamed(self, name: str) -> str:
        """A column's or feature's name in the output files."""
        return DATACOMP_KEYS.get(name, name) if self.use_datacomp_keys else name

    def fingerprint(self, hashes: Mapping[str, str]) -> dict[str, Any]:
        """The parts that decide what the output is.

        Args:
            hashes: sha256 of each checkpoint, by its published name.
        """
        keys = (
            "models postprocess_columns postprocess_features additional_fields use_datacomp_keys "
            "amp resize feature_dtype max_image_pixels"
        )
        custom = self.custom_file
        return {
            **{key: getattr(self, key) for key in keys.split()},
            "checkpoints": dict(sorted(hashes.items())),
            "custom_file": hashlib.sha256(custom.read_bytes()).hexdigest() if custom else None,
        }


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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
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
        values[key] = yaml.safe_load(value)
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
