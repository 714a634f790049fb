"""The specs and functions that a config names, its custom file included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from d2m_hpc.config import Config
from d2m_hpc.config.mistakes import registry_mistakes
from d2m_hpc.errors import ConfigError
from d2m_hpc.models import custom, postprocessors, registry
from d2m_hpc.models.code import Sources
from d2m_hpc.models.preprocessors import PREPROCESSORS, Preprocessor
from d2m_hpc.models.preprocessors import custom as as_preprocessor
from d2m_hpc.models.registry import COLUMNS, FEATURES, LOOKUPS, ModelSpec, Registry
from d2m_hpc.worker.batch import Input

Postprocessor = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Toolbox:
    """The specs and functions that a config names, those of its custom file included."""

    registry: Registry
    specs: dict[str, ModelSpec]
    classes: dict[str, Any]
    preprocessors: dict[str, Preprocessor]
    columns: dict[str, Postprocessor]
    features: dict[str, Postprocessor]
    types: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, sources: Sources | None = None) -> Toolbox:
        """
        Args:
            sources: of the custom file, as the submission has them; without, it is read anew.

        Raises:
            ConfigError: the custom file cannot be imported, or lacks what the config names.
        """
        file = config.custom_file
        module = custom.load(file, sources) if file else None
        tables = custom.lookups(module) if module else {name: {} for name in LOOKUPS}
        known = custom.registry(tables, custom.output_types(module) if module else {})
        if mistakes := registry_mistakes(config, known):
            raise ConfigError(str(file or "models"), mistakes)
        models, made, columns, features = (tables[name] for name in LOOKUPS)
        return cls(
            registry=known,
            specs={name: known.models[name] for name in config.models},
            classes=models,
            preprocessors={**PREPROCESSORS, **{k: as_preprocessor(v) for k, v in made.items()}},
            columns=_posts(config.postprocess_columns, columns, COLUMNS),
            features=_posts(config.postprocess_features, features, FEATURES),
            types={
                name: kind
                for name in config.postprocess_columns
                if (kind := known.columns[name].type)
            },
            shapes={
                name: shape
                for name in config.postprocess_features
                if (shape := known.features[name].shape)
            },
        )

    def only(self, config: Config) -> Toolbox:
        """The same, less all that a smaller config does not name."""
        return replace(
            self,
            specs={name: self.specs[name] for name in config.models},
            columns={name: self.columns[name] for name in config.postprocess_columns},
            features={name: self.features[name] for name in config.postprocess_features},
        )

    @property
    def inputs(self) -> dict[Input, Preprocessor]:
        """Each distinct (raw input, preprocessor) of all models."""
        wanted = dict.fromkeys(i for spec in self.specs.values() for i in spec.inputs)
        return {i: self.preprocessors[i[1]] for i in wanted}


def _posts(
    names: Sequence[str], own: Mapping[str, Postprocessor], built_in: Mapping[str, registry.Post]
) -> dict[str, Postprocessor]:
    return {n: own[n] if n in own else postprocessors.build(built_in[n]) for n in names}
