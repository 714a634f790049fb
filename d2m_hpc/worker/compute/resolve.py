"""Find the specs and functions that a config names, also in its custom file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from d2m_hpc.config import Config
from d2m_hpc.config.mistakes import registry_mistakes
from d2m_hpc.errors import ConfigError
from d2m_hpc.models import custom, postprocessors
from d2m_hpc.models.code import Sources
from d2m_hpc.models.family import ModelSpec, Post
from d2m_hpc.models.inputs import NAMED, Form, Input, as_prepared
from d2m_hpc.models.preprocessors import PREPROCESSORS, Preprocessor, of_form
from d2m_hpc.models.preprocessors import custom as as_preprocessor
from d2m_hpc.models.registry import LOOKUPS, Registry

Postprocessor = Callable[[Mapping[str, Any]], Any]

_OURS = {form: name for name, form in NAMED.items()}


@dataclass(frozen=True)
class Toolbox:
    """The specs and functions that a config names, those of its custom file included.

    Attributes:
        base: the built-in names, and those of the custom file.
        tables: the custom file's lookups.
        registry: `base`, and the models of the config.
        reads: the outputs that models read of others, by their full names.
    """

    base: Registry
    tables: custom.Tables
    registry: Registry
    specs: dict[str, ModelSpec]
    preprocessors: dict[Form, Preprocessor]
    columns: dict[str, Postprocessor]
    features: dict[str, Postprocessor]
    reads: dict[str, Postprocessor]
    types: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, config: Config, sources: Sources | None = None) -> Toolbox:
        """Find them; raise `ConfigError` where the custom file fails or lacks a name.

        Args:
            sources: of the custom file, as the submission keeps them; None to read it anew.
        """
        file = config.custom_file
        module = custom.load(file, sources) if file else None
        tables = custom.lookups(module) if module else {name: {} for name in LOOKUPS}
        known = custom.registry(tables, custom.output_types(module) if module else {})
        if mistakes := registry_mistakes(config, known):
            raise ConfigError(str(file or "models"), mistakes)
        return cls._of(config, known, tables)

    @classmethod
    def _of(cls, config: Config, base: Registry, tables: custom.Tables) -> Toolbox:
        known, _ = config.registry(base)
        _, made, columns, features = (tables[name] for name in LOOKUPS)
        specs = {name: _by_value(known.models[name], made) for name in config.model_names}
        forms = {form for spec in specs.values() for form in spec.preprocessors}
        asked = {name: known.columns[name] for name in config.postprocess_columns}
        vectors = {name: known.features[name] for name in config.postprocess_features}
        read = {name for spec in specs.values() for name in spec.reads}
        return cls(
            base,
            tables,
            known,
            specs,
            preprocessors={form: _preprocessor(form, made) for form in forms},
            columns={n: _post(columns.get(n), _there(p, specs)) for n, p in asked.items()},
            features={n: _post(features.get(n), _there(p, specs)) for n, p in vectors.items()},
            reads={
                n: _read(features.get(n) or columns.get(n), _there(known.post(n), specs))
                for n in read
            },
            types={name: post.type for name, post in asked.items() if post.type},
            shapes={name: post.shape for name, post in vectors.items() if post.shape},
        )

    def only(self, config: Config) -> Toolbox:
        """The same, less all that a smaller config does not name."""
        return self._of(config, self.base, self.tables)

    @property
    def classes(self) -> dict[str, Any]:
        """The custom file's models."""
        return self.tables["model_lookup"]

    @property
    def has_own_posts(self) -> bool:
        """Whether a column or feature is made by the custom file, which may read any output."""
        _, _, columns, features = (self.tables[name].keys() for name in LOOKUPS)
        asked = self.columns.keys() | self.features.keys() | self.reads.keys()
        return bool((columns | features) & asked)

    @property
    def inputs(self) -> dict[Input, Preprocessor]:
        """Each distinct input of all models, as it is prepared."""
        wanted = dict.fromkeys(i for spec in self.specs.values() for i in spec.inputs)
        return {as_prepared(i): self.preprocessors[i[1]] for i in wanted}


def _by_value(spec: ModelSpec, made: Mapping[str, Any]) -> ModelSpec:
    """With what the names of our own preprocessors mean, unless a custom file has made its own."""
    ours: Mapping[Form, Form] = {name: form for name, form in NAMED.items() if name not in made}
    forms = (ours.get(form, form) for form in spec.preprocessors)
    return replace(spec, preprocessors=tuple(forms))


def _preprocessor(form: Form, made: Mapping[str, Any]) -> Preprocessor:
    if form in made:
        return as_preprocessor(made[form])  # type: ignore[index]
    return PREPROCESSORS[_OURS[form]] if form in _OURS else of_form(form)


def _there(post: Post, specs: Mapping[str, ModelSpec]) -> Post:
    """Read what is the same for all texts, such as an image's feature, from the first text's."""
    texts = specs[post.model].texts if post.model in specs else (post.text,)
    return post if post.text in texts else replace(post, text=texts[0])


def _post(own: Postprocessor | None, post: Post) -> Postprocessor:
    return own or postprocessors.build(post)


def _read(own: Postprocessor | None, post: Post) -> Postprocessor:
    """Of an output that stays on its device."""
    return own or postprocessors.build(replace(post, options={**post.options, "to_cpu": False}))
