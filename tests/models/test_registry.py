from __future__ import annotations

import inspect
from graphlib import CycleError
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bench import EXACT

from d2m_hpc.config import Config
from d2m_hpc.config.mistakes import registry_mistakes
from d2m_hpc.models import postprocessors, weights
from d2m_hpc.models.family import Family, ModelSpec, Output, ParameterError, Use
from d2m_hpc.models.inputs import RAW_INPUTS
from d2m_hpc.models.registry import DATACOMP_KEYS, Chosen, Registry, builtin, in_order

BUILTIN = builtin()


@pytest.mark.parametrize("name", BUILTIN.models)
def test_a_model_names_a_class_known_preprocessors_and_known_checkpoints(name: str) -> None:
    spec = BUILTIN.models[name]
    assert spec.name == name
    assert spec.family is not None
    assert {f for _, f in spec.inputs if isinstance(f, str)} <= Registry().preprocessors
    assert set(spec.raw_inputs) <= set(RAW_INPUTS)
    assert set(spec.dependencies) <= BUILTIN.models.keys()
    if spec.family.built_by:
        module, target = spec.family.built_by.split(":")
        model = getattr(import_module(module), target)
        taken = list(inspect.signature(model).parameters)
        assert taken == ["device", "weights", *type(spec.family).model_fields]
        parameters = inspect.signature(model.forward).parameters
        assert len(parameters) - 1 == len(spec.inputs) + len(spec.reads)


def test_no_two_checkpoints_have_one_name() -> None:
    needed = weights.needed(BUILTIN.models.values())
    assert len({checkpoint.name for checkpoint in needed}) == len(needed)


@pytest.mark.parametrize("name", [*BUILTIN.columns, *BUILTIN.features])
def test_a_column_or_feature_is_made_of_a_known_model(name: str) -> None:
    post = {**BUILTIN.columns, **BUILTIN.features}[name]
    assert post.model in BUILTIN.models
    made = postprocessors.build(post)
    inspect.signature(made).bind({})


def test_datacomps_keys_rename_known_columns_and_features() -> None:
    assert DATACOMP_KEYS.keys() <= BUILTIN.columns.keys() | BUILTIN.features.keys()
    assert len(set(DATACOMP_KEYS.values())) == len(DATACOMP_KEYS)


def test_without_a_custom_file_the_tables_are_the_built_in_ones() -> None:
    assert Registry().models is BUILTIN.models
    assert Registry().own == frozenset()
    assert list(Registry().specs(["text-stats", "no-such"])) == ["text-stats"]


def test_a_model_stands_after_its_dependencies() -> None:
    specs = {
        "a": ModelSpec("a", dependencies=("b", "c")),
        "b": ModelSpec("b", dependencies=("c",)),
        "c": ModelSpec("c"),
        "d": ModelSpec("d"),
    }
    order = in_order(specs)
    assert sorted(order) == ["a", "b", "c", "d"]
    assert order.index("c") < order.index("b") < order.index("a")


def test_a_dependency_that_is_not_listed_is_not_added() -> None:
    assert in_order({"a": ModelSpec("a", dependencies=("b",))}) == ["a"]


def test_a_circle_of_dependencies_is_an_error() -> None:
    specs = {"a": ModelSpec("a", dependencies=("b",)), "b": ModelSpec("b", dependencies=("a",))}
    with pytest.raises(CycleError):
        in_order(specs)


def test_labels_of_a_preset_that_is_not_fetched_are_taken_on_trust() -> None:
    """Its checkpoint, which has them, is fetched by a config that is valid."""
    keys = {"models": ["nsfw-falconsai"], "postprocess_columns": ["nsfw-falconsai-nsfw"]}
    assert registry_mistakes(Config(**EXACT, **keys), Registry()) == []


class Odd(Family):
    """A family as another package might write one."""

    kind: ClassVar = "odd"

    gives: Any

    def inputs(self, use: Use) -> Any:
        return self.gives.get("inputs")

    def outputs(self, use: Use) -> Any:
        return self.gives.get("outputs", [Output("red", "float32")])


@pytest.mark.parametrize(
    ("gives", "told"),
    [
        ({"inputs": ["image"]}, "Odd.inputs gives 'image'; valid is an ImageInput, an OwnInput"),
        ({"inputs": [("image", 3)]}, r"Odd.inputs gives \('image', 3\); valid is"),
        ({"outputs": ["red"]}, "Odd.outputs gives 'red'; valid is an Output"),
        ({"outputs": [Output("red", "float33")]}, "Odd.outputs gives 'float33'; valid is a type"),
    ],
)
def test_what_a_family_gives_of_another_kind_is_told(gives: Any, told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        Chosen.of("odd", Odd(gives=gives), Path()).spec(Path(), (), {})
