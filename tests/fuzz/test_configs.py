"""A few hundred mutated configs; `python tests/fuzz/configs.py SEED COUNT` reads more."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.parametrize("seed", [1, 2])
def test_every_config_is_planned_or_refused(seed: int) -> None:
    spec = importlib.util.spec_from_file_location("configs", Path(__file__).with_name("configs.py"))
    assert spec
    assert spec.loader
    configs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(configs)
    found = configs.main(seed, 200)
    assert found["planned"] + found["refused"] == 200, found
    assert found["planned"] > 40
    assert found["hung"] == 0
