from __future__ import annotations

import inspect
from graphlib import CycleError
from importlib import import_module
from pathlib import Path

import pytest

from d2m_hpc.models import declared, postprocessors, registry, weights
from d2m_hpc.models.registry import (
    COLUMNS,
    DATACOMP_KEYS,
    FEATURES,
    MODELS,
    ModelSpec,
    Registry,
    in_order,
)

CUSTOM = """
from functools import partial
from dataset2metadata.postprocessors import identity
raise SystemExit("a login node must not run this")

class Caption:
    name = 'caption'
    raw_inputs = ['image', 'text']
    preprocessors = ['small', 'identity']
    dependencies = ['oai-clip-vit-b32']
    to_device = False
    made = len('not a literal')

def small(x):
    return x

preprocessor_lookup = {'small': small}
model_lookup = {'caption': Caption}
postprocess_parquet_lookup = {'caption-text': partial(identity, model='caption', to_cpu=False)}
postprocess_feature_lookup = {'caption-feature': lambda cache: cache['caption']}
"""


def _read(tmp_path: Path, text: str) -> Registry:
    path = tmp_path / "custom.py"
    path.write_text(text)
    return declared.names(path)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_names_a_class_known_preprocessors_and_known_checkpoints(name: str) -> None:
    spec = MODELS[name]
    module, target = spec.target.split(":")
    model = getattr(import_module(f"d2m_hpc.models.{module}"), target)
    assert list(inspect.signature(model).parameters) == ["device", "weights"]
    assert spec.name == name
    assert {preprocessor for _, preprocessor in spec.inputs} <= registry.PREPROCESSORS
    assert set(spec.raw_inputs) <= set(registry.RAW_INPUTS)
    assert set(spec.checkpoints) <= weights.CHECKPOINTS.keys()
    assert set(spec.dependencies) <= MODELS.keys()
    parameters = inspect.signature(model.forward).parameters
    assert len(parameters) - 1 == len(spec.inputs) + len(spec.dependencies)


def test_every_checkpoint_is_some_models() -> None:
    used = {name for spec in MODELS.values() for name in spec.checkpoints}
    assert used == weights.CHECKPOINTS.keys()


@pytest.mark.parametrize("name", [*COLUMNS, *FEATURES])
def test_a_column_or_feature_is_made_of_a_known_model(name: str) -> None:
    post = {**COLUMNS, **FEATURES}[name]
    assert post.model in MODELS
    made = postprocessors.build(post)
    inspect.signature(made).bind({})


def test_datacomps_keys_rename_known_columns_and_features() -> None:
    assert DATACOMP_KEYS.keys() <= COLUMNS.keys() | FEATURES.keys()
    assert len(set(DATACOMP_KEYS.values())) == len(DATACOMP_KEYS)


def test_a_custom_file_is_read_and_not_run(tmp_path: Path) -> None:
    found = _read(tmp_path, CUSTOM)
    assert found.complete
    assert found.models["caption"] == ModelSpec(
        "caption",
        raw_inputs=("image", "text"),
        preprocessors=("small", "identity"),
        dependencies=("oai-clip-vit-b32",),
        to_device=False,
    )
    assert found.columns["caption-text"].model == "caption"
    assert found.features["caption-feature"].model == "caption"
    assert "small" in found.preprocessors


@pytest.mark.parametrize(
    ("expression", "model"),
    [
        ('lambda cache: cache["own"]', "own"),
        ('lambda c: (c["own"][0] * c["own"][1]).sum(1)', "own"),
        ('lambda c: c["own"] * c["other"]', ""),
        ("lambda c: helper(c)", ""),
        ('lambda c: helper(c) + c["own"]', ""),
        ('lambda c: c.get("own")', ""),
        ("lambda c: c[NAME]", ""),
        ('lambda c, d=1: c["own"]', ""),
        ("helper", ""),
        ('partial(helper, model="own")', "own"),
    ],
)
def test_a_postprocessors_model_is_read_where_it_can_read_no_other(
    expression: str, model: str, tmp_path: Path
) -> None:
    found = _read(tmp_path, f"postprocess_parquet_lookup = {{'made': {expression}}}")
    assert found.columns["made"].model == model
    assert (found.own, Registry().own) == ({"made"}, set())


def test_custom_names_come_on_top_of_the_built_in_ones(tmp_path: Path) -> None:
    found = _read(tmp_path, CUSTOM)
    assert MODELS.keys() < found.models.keys()
    assert COLUMNS.keys() < found.columns.keys()
    assert FEATURES.keys() < found.features.keys()
    assert found.preprocessors > registry.PREPROCESSORS


def test_without_a_custom_file_the_tables_are_the_built_in_ones() -> None:
    assert declared.names(None) == Registry()
    assert Registry().complete


@pytest.mark.parametrize(
    "text",
    [
        "model_lookup = dict(a=A)",
        "model_lookup = {name: A for name in 'ab'}",
        "model_lookup = {**other, 'a': A}",
        "NAME = 'a'\nmodel_lookup = {NAME: A}",
        "model_lookup = {}\nmodel_lookup['a'] = A",
        "model_lookup = {}\nmodel_lookup.update(a=A)",
        "if True:\n    model_lookup = {'a': A}",
        "try:\n    import x\nexcept ImportError:\n    model_lookup = {}",
        "from elsewhere import model_lookup",
        "from elsewhere import tables as model_lookup",
        "from elsewhere import *",
        "model_lookup, preprocessor_lookup = {'a': A}, {}",
        "model_lookup = {}\nmodel_lookup |= {'a': A}",
        "model_lookup: dict = make()",
    ],
)
def test_a_table_that_only_running_the_file_can_tell_is_said_to_be_incomplete(
    text: str, tmp_path: Path
) -> None:
    assert not _read(tmp_path, text).complete


@pytest.mark.parametrize(
    "text",
    ["", "x = 1", "model_lookup = {}", "model_lookup: dict[str, type] = {'a': A}\nclass A: pass"],
)
def test_a_table_that_is_written_out_or_left_out_is_complete(text: str, tmp_path: Path) -> None:
    assert _read(tmp_path, text).complete


def test_an_annotated_table_and_annotated_fields_are_read(tmp_path: Path) -> None:
    found = _read(
        tmp_path,
        "class A:\n    raw_inputs: list[str] = ['image']\n    preprocessors: tuple=('clip-aug',)\n"
        "model_lookup: dict[str, type] = {'a': A}\n",
    )
    assert found.models["a"].inputs == (("image", "clip-aug"),)


def test_fields_inherited_from_a_class_of_the_file_are_read(tmp_path: Path) -> None:
    found = _read(
        tmp_path,
        "class Base:\n    raw_inputs = ['image']\n    dependencies = ['oai-clip-vit-b32']\n"
        "class A(Base):\n    preprocessors = ['clip-aug']\n    dependencies = []\n"
        "model_lookup = {'a': A}\n",
    )
    assert found.models["a"] == ModelSpec("a", ("image",), ("clip-aug",))


@pytest.mark.parametrize(
    "fields",
    [
        "raw_inputs = [IMAGE]\n    preprocessors = ['clip-aug']",
        "raw_inputs = ['image'] * 2\n    preprocessors = ['clip-aug', 'identity']",
    ],
)
def test_fields_that_are_not_literals_make_the_file_incomplete(fields: str, tmp_path: Path) -> None:
    """And leave no half of the inputs, which a check would take for a mistake."""
    found = _read(tmp_path, f"class A:\n    {fields}\nmodel_lookup = {{'a': A}}\n")
    assert not found.complete
    assert found.models["a"].inputs == ()


def test_a_class_that_a_call_makes_leaves_the_file_complete(tmp_path: Path) -> None:
    found = _read(tmp_path, "model_lookup = {'a': partial(A, size=3), 'b': elsewhere.B}")
    assert found.complete
    assert found.models.keys() >= {"a", "b"}


def test_a_file_that_is_not_python_or_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SyntaxError):
        _read(tmp_path, "class:")
    with pytest.raises(OSError, match=r"absent\.py"):
        declared.names(tmp_path / "absent.py")


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
