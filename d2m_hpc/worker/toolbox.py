"""The specs and functions that a config names, its custom file included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.models import custom, postprocessors
from d2m_hpc.models.preprocessors import PREPROCESSORS, Preprocessor
from d2m_hpc.models.preprocessors import custom as as_preprocessor
from d2m_hpc.models.registry import COLUMNS, FEATURES, LOOKUPS, MODELS, ModelSpec
from d2m_hpc.worker.batch import Input

Post = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Toolbox:
    """The specs and functions that a config names, those of its custom file included."""

    specs: dict[str, ModelSpec]
    classes: dict[str, Any]
    preprocessors: dict[str, Preprocessor]
    columns: dict[str, Post]
    features: dict[str, Post]

    @classmethod
    def of(cls, config: Config) -> Toolbox:
        """
        Raises:
            ConfigError: the custom file cannot be imported, or lacks what the config names.
        """
        file = config.custom_file
        tables = custom.lookups(custom.load(file)) if file else {key: {} for key in LOOKUPS}
        classes = tables["model_lookup"]
        own = {name: custom.spec_of(name, model) for name, model in classes.items()}
        made = {k: as_preprocessor(v) for k, v in tables["preprocessor_lookup"].items()}
        columns = tables["postprocess_parquet_lookup"]
        features = tables["postprocess_feature_lookup"]
        specs = _pick({**MODELS, **own}, config.models, "models")
        if mistakes := [m for spec in specs.values() for m in _mistakes(spec, specs)]:
            raise ConfigError("models", mistakes)
        return cls(
            specs=specs,
            classes=classes,
            preprocessors={**PREPROCESSORS, **made},
            columns=_posts({**COLUMNS, **columns}, config.postprocess_columns),
            features=_posts({**FEATURES, **features}, config.postprocess_features),
        )

    @property
    def inputs(self) -> dict[Input, Preprocessor]:
        """Each distinct (raw input, preprocessor) of all models."""
        wanted = dict.fromkeys(i for spec in self.specs.values() for i in spec.inputs)
        names = [name for _, name in wanted]
        found = _pick(self.preprocessors, names, "preprocessor_lookup")
        return {i: found[i[1]] for i in wanted}


def _pick(table: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    missing = [n for n in names if n not in table]
    if missing:
        valid = ", ".join(sorted(table))
        raise ConfigError(where, [f"unknown name {n!r}; valid: {valid}" for n in missing])
    return {n: table[n] for n in names}


def _mistakes(spec: ModelSpec, specs: Mapping[str, ModelSpec]) -> Iterator[str]:
    """What the config's check cannot see of a class whose fields are not literals."""
    raw, made = len(spec.raw_inputs), len(spec.preprocessors)
    if raw != made:
        yield f"{spec.name!r} has {raw} raw_inputs and {made} preprocessors; valid is one for each"
    for needed in spec.dependencies:
        if needed not in specs:
            yield f"{spec.name!r} needs the output of {needed!r}, which is not listed; add it"


def _posts(table: Mapping[str, Any], names: Sequence[str]) -> dict[str, Post]:
    picked = _pick(table, names, "postprocessors")
    return {k: v if callable(v) else postprocessors.build(v) for k, v in picked.items()}
