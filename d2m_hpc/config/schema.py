"""The keys of a config and their types."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
    nworkers: Count | None = Field(None, description="decode threads; by default the task's cores")
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
    compile: bool = Field(
        False, description="compile the image nets for full batches; the first ones take minutes"
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

        `compile` is none, as little as the batch size or the GPU's model: it moves values by
        rounding, and a run has both, as the last batch of each shard is not compiled.

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
