from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import SHARDS, photographs, write_config

from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError
from d2m_hpc.models import custom, declared, postprocessors
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options, Picture
from d2m_hpc.models.registry import MODELS
from d2m_hpc.state.manifest import Shard
from d2m_hpc.worker.batch import collate
from d2m_hpc.worker.graph import Graph
from d2m_hpc.worker.loader import Loader, Work
from d2m_hpc.worker.prepare import Recipe
from d2m_hpc.worker.toolbox import Toolbox

BLIP2 = Path(__file__).with_name("custom_blip2.py")
CPU = torch.device("cpu")


def _config(tmp_path: Path, **values: Any) -> configs.Config:
    common = {
        "input_tars": str(SHARDS / "00000.tar"),
        "output_metadata_dir": str(tmp_path / "out"),
        "device": "cpu",
        "nworkers": 2,
    }
    return configs.load(write_config(tmp_path / "config.yml", {**common, **values}))


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "custom.py"
    path.write_text(text)
    return path


def test_the_seeds_custom_file_runs_unchanged(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(
        tmp_path,
        models=["oai-clip-vit-b32", "blip2"],
        postprocess_columns=["oai-clip-vit-b32-score", "blip2-cap"],
        postprocess_features=["oai-clip-vit-b32-image"],
        additional_fields=["uid", "caption"],
        custom_pypath=str(BLIP2),
        weights_dir=str(checkpoints),
        batch_size=16,
    )
    toolbox = Toolbox.of(config)
    graph = Graph(config, toolbox, CPU)
    shard = Shard("00000", str(SHARDS / "00000.tar"), (SHARDS / "00000.tar").stat().st_size)
    recipe = Recipe.of(config, toolbox.inputs)
    keys: list[str] = []
    captions: list[str] = []
    with Loader([Work(shard)], recipe, tmp_path) as loader:
        for work in loader:
            for batch in work:
                outputs = graph(batch)
                keys += outputs.keys
                captions += outputs.columns["blip2-cap"]
                assert len(outputs.columns["oai-clip-vit-b32-score"]) == len(outputs.keys)
                assert outputs.features["oai-clip-vit-b32-image"].shape[0] == len(outputs.keys)
            assert work.rejections == []
    assert len(keys) == len(set(keys)) == len(captions) == 35
    model = toolbox.classes["blip2"]("cpu")
    pixels = [
        toolbox.preprocessors["blip2-aug"].prepare(Picture(p), Options()) for p in photographs()
    ]
    with torch.inference_mode():
        assert captions == model(torch.stack(pixels))
    assert all(isinstance(caption, str) and caption for caption in captions)
    assert "instantiated blip2 on cpu" in capsys.readouterr().out


def test_the_static_reading_of_a_custom_file_agrees_with_what_it_makes() -> None:
    read = declared.names(BLIP2)
    made = custom.lookups(custom.load(BLIP2))
    assert read.complete
    assert read.models["blip2"] == custom.spec_of("blip2", made["model_lookup"]["blip2"])
    assert read.models.keys() - MODELS.keys() == made["model_lookup"].keys()
    assert made["preprocessor_lookup"].keys() <= read.preprocessors
    assert read.columns["blip2-cap"].model == "blip2"


def test_the_seeds_postprocessors_are_ours() -> None:
    custom.install_seed_names()
    from dataset2metadata.postprocessors import (  # type: ignore[import-not-found]
        batched_dot_product,
        identity,
        select,
        transpose_list,
    )

    assert identity is postprocessors.identity
    assert batched_dot_product is postprocessors.batched_dot_product
    assert select is postprocessors.select
    assert transpose_list is postprocessors.transpose_list


@pytest.mark.parametrize(
    ("seed", "ours"),
    [("oai_clip_image", "clip-aug"), ("dedup", "dedup-aug")],
)
def test_the_seeds_image_preprocessors_give_one_samples_floats(seed: str, ours: str) -> None:
    custom.install_seed_names()
    function = getattr(sys.modules["dataset2metadata.preprocessors"], seed)
    image = photographs(1)[0]
    made = PREPROCESSORS[ours]
    expected = made.finish(made.prepare(Picture(image), Options(exact=True))[None])[0]
    assert torch.equal(function(image), expected)


def test_the_seeds_faces_preprocessor_gives_one_samples_pair() -> None:
    """Without a batch's axis, so that a batch of them is what `faces-aug` makes."""
    custom.install_seed_names()
    function = sys.modules["dataset2metadata.preprocessors"].faces_scrfd
    images = photographs(2)
    made = PREPROCESSORS["faces-aug"]
    prepared = [made.prepare(Picture(image), Options(exact=True)) for image in images]
    pixels, paddings = made.finish(collate(prepared))
    ours, told = collate([function(image) for image in images])
    assert torch.equal(ours, pixels)
    assert torch.equal(told, paddings)


def test_the_seeds_text_preprocessors() -> None:
    custom.install_seed_names()
    module = sys.modules["dataset2metadata.preprocessors"]
    tokens = module.oai_clip_text("a cat")
    assert tokens.shape == (77,)
    assert tokens[:4].tolist() == [49406, 320, 2368, 49407]
    assert module.identity("a cat") == "a cat"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
    ],
)
def test_a_custom_file_that_fails_on_import_is_the_configs_mistake(
    text: str, reason: str, tmp_path: Path
) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(
        ConfigError, match=f"custom_pypath: importing it failed: {reason}"
    ) as caught:
        custom.load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_named_as_python_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "custom.txt"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"must end in \.py"):
        custom.load(path)


def test_tables_that_are_left_out_are_empty(tmp_path: Path) -> None:
    module = custom.load(_write(tmp_path, "model_lookup = {'a': int}"))
    assert custom.lookups(module) == {
        "model_lookup": {"a": int},
        "preprocessor_lookup": {},
        "postprocess_parquet_lookup": {},
        "postprocess_feature_lookup": {},
    }


def test_the_static_fields_have_the_seeds_defaults() -> None:
    class Bare:
        pass

    spec = custom.spec_of("bare", Bare)
    assert (spec.inputs, spec.dependencies, spec.to_device, spec.target) == ((), (), True, "")


def test_a_custom_class_can_be_pickled_by_its_module(tmp_path: Path) -> None:
    """As libraries do that start processes, and as `inspect` needs."""
    module = custom.load(_write(tmp_path, "class A:\n    pass\n"))
    assert sys.modules[module.A.__module__] is module
