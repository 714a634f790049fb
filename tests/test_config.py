"""Wrong configs: every mistake named at once, with its key, what was found, and what is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kit import STATS, d2m, write_config, write_shards

from d2m_hpc.config import load
from d2m_hpc.errors import ConfigError


@pytest.fixture
def good(tmp_path: Path) -> dict[str, Any]:
    write_shards(tmp_path / "tars", 1, samples=1)
    return {
        **STATS,
        "input_tars": str(tmp_path / "tars" / "*.tar"),
        "output_metadata_dir": str(tmp_path / "out"),
    }


CUSTOM = """
import torch

class Circle(torch.nn.Module):
    raw_inputs = ["image"]
    preprocessors = ["no-such-aug"]
    dependencies = ["triangle"]

class Triangle(torch.nn.Module):
    raw_inputs = []
    preprocessors = []
    dependencies = ["circle"]

class Square(torch.nn.Module):
    raw_inputs = ["images"]
    preprocessors = ["identity"]

class Lopsided(torch.nn.Module):
    raw_inputs = ["image", "text"]
    preprocessors = ["identity"]
    dependencies = []

model_lookup = {"circle": Circle, "triangle": Triangle, "lopsided": Lopsided, "square": Square}
preprocessor_lookup = {}
postprocess_parquet_lookup = {}
postprocess_feature_lookup = {}
"""

# what is changed, the key that is named, what was found, what is valid
WRONG: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "unknown key": ({"batchsize": 5}, "batchsize", "unknown key", "did you mean 'batch_size'"),
    "unknown slurm key": ({"slurm": {"partion": "gpu"}}, "slurm.partion", "unknown", "partition"),
    "no models": ({"models": []}, "models", "[]", "at least 1"),
    "models missing": ({"models": ...}, "models", "found nothing", "required"),
    "tars missing": ({"input_tars": ...}, "input_tars", "found nothing", "required"),
    "output missing": ({"output_metadata_dir": ...}, "output_metadata_dir", "nothing", "required"),
    "not a number": ({"batch_size": "many"}, "batch_size", "'many'", "valid integer"),
    "zero": ({"nworkers": 0}, "nworkers", "0", "greater than or equal to 1"),
    "a list for a number": ({"batch_size": [1]}, "batch_size", "[1]", "valid integer"),
    "not a boolean": ({"reprocess": "perhaps"}, "reprocess", "'perhaps'", "valid boolean"),
    "not a choice": ({"resize": "quick"}, "resize", "'quick'", "'fast' or 'exact'"),
    "not an amp": ({"amp": "fp16"}, "amp", "'fp16'", "'bfloat16'"),
    "over a range": ({"max_rejected_fraction": 2}, "max_rejected_fraction", "2", "less than or"),
    "a kind for a model": (
        {"models": ["timm"]},
        "models",
        "'timm', which is a kind",
        "`NAME: {kind: timm, ...}`",
    ),
    "unknown model": ({"models": ["image-stat"]}, "models", "'image-stat'", "'image-stats'"),
    "model twice": ({"models": ["text-stats", "text-stats"]}, "models", "'text-stats'", "once"),
    "dependency not listed": (
        {"models": ["image-stats", "text-stats", "nsfw-image-oai-clip-vit-l-14"]},
        "models",
        "'nsfw-image-oai-clip-vit-l-14'",
        "'oai-clip-vit-l14'",
    ),
    "unknown column": (
        {"postprocess_columns": ["text-word"]},
        "postprocess_columns",
        "'text-word'",
        "did you mean 'text-words'",
    ),
    "column of a model that is not listed": (
        {"models": ["image-stats"]},
        "postprocess_columns",
        "'text-words'",
        "'text-stats', which is not in models",
    ),
    "feature among the columns": (
        {"postprocess_columns": ["image-histogram"]},
        "postprocess_columns",
        "'image-histogram'",
        "postprocess_features",
    ),
    "column among the features": (
        {"postprocess_features": ["text-words"]},
        "postprocess_features",
        "'text-words'",
        "postprocess_columns",
    ),
    "column twice": (
        {"postprocess_columns": ["text-words", "text-words"]},
        "postprocess_columns",
        "'text-words'",
        "valid is once",
    ),
    "field named as a column": (
        {"additional_fields": ["text-words"]},
        "additional_fields",
        "'text-words'",
        "a name of its own",
    ),
    "device": ({"device": "gpu"}, "device", "'gpu'", "cuda:0"),
    "tars that are not there": (
        {"input_tars": ["/nowhere/{00..09}.tar", "/nowhere/*.tar"]},
        "input_tars",
        "'/nowhere/*.tar'",
        "check the path",
    ),
    "custom file missing": ({"custom_pypath": "/nowhere.py"}, "custom_pypath", "No such", "valid"),
    "custom file broken": (
        {"custom_pypath": "CUSTOM(def broken(:)"},
        "custom_pypath",
        "invalid syntax",
        "valid is a Python file",
    ),
    "custom preprocessor unknown": (
        {"custom_pypath": f"CUSTOM{CUSTOM}", "models": ["circle", "triangle"]},
        "models",
        "'no-such-aug'",
        "clip-aug",
    ),
    "raw input unknown": (
        {"custom_pypath": f"CUSTOM{CUSTOM}", "models": ["square"]},
        "models",
        "'images'",
        "did you mean 'image'",
    ),
    "circle of dependencies": (
        {"custom_pypath": f"CUSTOM{CUSTOM}", "models": ["circle", "triangle"]},
        "models",
        "circle -> triangle -> circle",
        "valid is none",
    ),
    "inputs without preprocessors": (
        {"custom_pypath": f"CUSTOM{CUSTOM}", "models": ["lopsided"]},
        "models",
        "2 raw_inputs and 1 preprocessors",
        "one preprocessor for each",
    ),
}


def _changed(good: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    values = {k: v for k, v in {**good, **changes}.items() if v is not ...}
    custom = values.get("custom_pypath", "")
    if custom.startswith("CUSTOM"):
        file = tmp_path / "custom.py"
        file.write_text(custom.removeprefix("CUSTOM"))
        values["custom_pypath"] = str(file)
    return values


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_config_exits_2_with_key_found_and_valid(
    kind: str, good: dict[str, Any], tmp_path: Path
) -> None:
    changes, key, found, valid = WRONG[kind]
    config = write_config(tmp_path / "c.yml", _changed(good, changes, tmp_path))
    ended = d2m("submit", config, "--local", "--dry-run")
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    line = next(x for x in ended.stderr.splitlines() if x.strip().startswith(key) and found in x)
    assert valid in line
    assert not (tmp_path / "out").exists()


FALSE = {
    "no list": "image-stats",
    "none": [],
    "no item": ["image-stats", 7],
    "misspelt": ["image-stat"],
    "of no kind": [{"image": {"kind": "image-stat"}}],
    "read by another": [
        {"image": {"kind": "sscd", "checkpoint": "x"}},
        {"text": {"kind": "head", "on": "image-image", "checkpoint": "/x.pth"}},
    ],
}


@pytest.mark.parametrize("kind", FALSE)
def test_a_mistake_in_a_model_is_followed_by_none_about_its_outputs(
    kind: str, good: dict[str, Any], tmp_path: Path
) -> None:
    own = {"models": FALSE[kind], "postprocess_features": []}
    own["postprocess_columns"] = ["image-brightness", f"image-{'stat-' * (kind == 'misspelt')}x"]
    with pytest.raises(ConfigError) as caught:
        load(write_config(tmp_path / "c.yml", {**good, **own}))
    [mistake] = caught.value.mistakes
    assert mistake.startswith("models")


def test_names_of_a_model_whose_outputs_are_known_are_checked_though_it_is_wrong(
    good: dict[str, Any], tmp_path: Path
) -> None:
    own = {"models": FALSE["read by another"], "postprocess_features": []}
    own["postprocess_columns"] = ["text-scores", "image-x"]
    with pytest.raises(ConfigError) as caught:
        load(write_config(tmp_path / "c.yml", {**good, **own}))
    _, name = caught.value.mistakes
    assert "unknown name 'text-scores'; did you mean 'text-score'" in name


def test_where_no_name_is_valid_that_is_said(good: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yml", {**good, "postprocess_features": ["text-vector"]})
    with pytest.raises(ConfigError, match=r"unknown name 'text-vector';.* valid: none"):
        load(path, ["models=[text-stats]", "postprocess_columns=[text-words]"])


FILES = {
    "not YAML": ("models: [a\nb: }", "is not valid YAML"),
    "not a mapping": ("- models", "found a list at the top"),
    "empty": ("", "found nothing at the top"),
    "of comments": ("# models:\n", "found nothing at the top"),
    "a number": ("1.5", "found a number at the top"),
    "a text": ("models", "found a text at the top"),
    "not text": (b"\xff\xfe\x00", "cannot be read"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_config_exits_2(kind: str, tmp_path: Path) -> None:
    content, message = FILES[kind]
    path = tmp_path / "c.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ended = d2m("submit", path, "--local")
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    assert message in ended.stderr


def test_a_config_that_is_not_there_exits_2(tmp_path: Path) -> None:
    ended = d2m("submit", tmp_path / "none.yml", "--local")
    assert ended.returncode == 2
    assert "no such file" in ended.stderr


def test_all_mistakes_are_reported_at_once(good: dict[str, Any], tmp_path: Path) -> None:
    wrong = {
        **good,
        "batchsize": 1,
        "resize": "quick",
        "device": "gpu",
        "models": ["image-stats", "unheard-of"],
        "slurm": {"partion": "x", "max_parallel": 0},
    }
    with pytest.raises(ConfigError) as caught:
        load(write_config(tmp_path / "c.yml", wrong), ["postprocess_features=[nothing]", "oops"])
    found = {m.split(":")[0] for m in caught.value.mistakes}
    assert found == {
        "--set oops",
        "batchsize",
        "resize",
        "device",
        "models",
        "slurm.partion",
        "slurm.max_parallel",
        "postprocess_features",
        "postprocess_columns",
    }


def test_overrides_and_options_reach_their_keys(good: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yml", good, slurm={"partition": "a", "mem": "4G"})
    config = load(
        path,
        [
            "batch_size=7",
            "models=[text-stats]",
            "postprocess_columns=[text-words]",
            "postprocess_features=",
            "slurm.qos=q",
        ],
        {"partition": "b", "account": None},
    )
    assert (config.batch_size, config.models, config.postprocess_features) == (
        7,
        ["text-stats"],
        [],
    )
    assert (config.slurm.partition, config.slurm.qos, config.slurm.mem) == ("b", "q", "4G")


def test_amp_off_needs_no_quotes(good: dict[str, Any], tmp_path: Path) -> None:
    assert load(write_config(tmp_path / "c.yml", good), ["amp=off"]).amp == "off"


@pytest.mark.parametrize("time", ["4:00:00", "1:30", "30", "2-12:00:00"])
def test_a_walltime_needs_no_quotes(good: dict[str, Any], tmp_path: Path, time: str) -> None:
    """YAML 1.1 reads 4:00:00 as a number of base 60, which sbatch would take for ten days."""
    path = write_config(tmp_path / "c.yml", good)
    path.write_text(path.read_text() + f"slurm:\n  time: {time}\n")
    assert str(load(path).slurm.time) == time
    assert str(load(path, [f"slurm.time={time}"]).slurm.time) == time


def test_a_dumped_config_loads_as_the_same(good: dict[str, Any], tmp_path: Path) -> None:
    config = load(write_config(tmp_path / "c.yml", good))
    path = tmp_path / "again.yml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load(path) == config


def test_the_fingerprint_follows_what_changes_the_output(
    good: dict[str, Any], tmp_path: Path
) -> None:
    path = write_config(tmp_path / "c.yml", good)
    base = load(path).fingerprint({})
    for change in ("batch_size=3", "nworkers=1", "max_attempts=9", "compile=true"):
        assert load(path, [change]).fingerprint({}) == base
    assert "decode" not in base  # as runs of versions without this key have it
    assert load(path, ["decode=scaled"]).fingerprint({}) == {**base, "decode": "scaled"}
    for change in ("resize=exact", "amp=bfloat16", "feature_dtype=float32", "additional_fields="):
        assert load(path, [change]).fingerprint({}) != base
    assert load(path).fingerprint({"a.pt": "00"}) != base
