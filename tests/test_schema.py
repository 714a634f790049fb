"""The config's JSON schema, and the page that is made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from kit import STATS, d2m
from pages import ROOT

from d2m_hpc.config import Config, Slurm
from d2m_hpc.config.reference import json_schema
from d2m_hpc.described import described

GOOD = {**STATS, "input_tars": ["a.tar"], "output_metadata_dir": "out"}


def errors(values: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(json_schema()).iter_errors(values)]


def test_the_command_prints_a_valid_schema() -> None:
    printed = d2m("schema")
    assert printed.returncode == 0, printed.stderr
    schema = json.loads(printed.stdout)
    Draft202012Validator.check_schema(schema)
    assert schema == json_schema()


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "configs").rglob("*.yml")), *sorted((ROOT / "tests" / "seed").glob("*.yml"))],
    ids=lambda path: path.name,
)
def test_configs_that_we_ship_fit(path: Path) -> None:
    assert errors(yaml.safe_load(path.read_text(encoding="utf-8"))) == []


LOADED = (
    "input_tars: one.tar",
    "postprocess_features:",
    "amp: off",
    "device: cuda:1",
    "models: [of-a-custom-file]",
    "slurm: {time: 30, setup: , extra: {exclusive: true}}",
    "custom_pypath: null",
)


@pytest.mark.parametrize("text", LOADED)
def test_what_loads_fits(text: str) -> None:
    values = {**GOOD, **yaml.safe_load(text)}
    Config.model_validate(values)
    assert errors(values) == []


REFUSED = (
    "batchsize: 5",
    "batch_size: 0",
    "amp: on",
    "resize: slow",
    "input_tars: []",
    "max_rejected_fraction: 1.5",
    "slurm: {partion: gpu}",
)


@pytest.mark.parametrize("text", REFUSED)
def test_what_does_not_load_does_not_fit(text: str) -> None:
    values = {**GOOD, **yaml.safe_load(text)}
    with pytest.raises(ValueError, match="validation error"):
        Config.model_validate(values)
    assert len(errors(values)) == 1


def test_editors_are_offered_the_models_names() -> None:
    [known, anything, family] = json_schema()["properties"]["models"]["items"]["anyOf"]
    assert "image-stats" in known["enum"]
    assert anything == {"type": "string"}
    assert "open_clip" in str(family)


@pytest.mark.parametrize("section", [Config, Slurm])
def test_every_key_is_described(section: type[Config | Slurm]) -> None:
    texts = described(section)
    assert [name for name in section.model_fields if not texts.get(name)] == []


def test_the_page_is_in_step(tmp_path: Path) -> None:
    """`python scripts/make_docs.py` writes it anew."""
    made = tmp_path / "config.md"
    subprocess.run([sys.executable, str(ROOT / "scripts" / "make_docs.py"), str(made)], check=True)
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == made.read_text("utf-8")
