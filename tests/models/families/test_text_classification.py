from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import run
from kit import captions
from tiny_nets import bert
from transformers import AutoTokenizer, BertForSequenceClassification, pipeline

NAMES = {0: "spam", 1: "fine", 2: "ad"}


@pytest.mark.parametrize(
    "config",
    [{"id2label": NAMES}, {"id2label": NAMES, "problem_type": "multi_label_classification"}],
)
def test_scores_are_a_pipelines(config: dict[str, Any], tmp_path: Path) -> None:
    folder, texts = bert(tmp_path, BertForSequenceClassification, **config), captions()
    keys: dict[str, Any] = {
        "models": [{"own": {"kind": "text-classification", "checkpoint": str(folder)}}],
        "postprocess_columns": [*(f"own-{name}" for name in NAMES.values()), "own-label"],
    }
    found = run(keys, (), texts).columns
    made = pipeline(
        "text-classification",
        model=BertForSequenceClassification.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        top_k=None,
    )
    expected = [{s["label"]: s["score"] for s in row} for row in made(texts, truncation=True)]
    for name in NAMES.values():
        scores = np.array([row[name] for row in expected])
        assert scores.std() > 1e-3
        np.testing.assert_allclose(found[f"own-{name}"], scores, atol=1e-5)
    assert found["own-label"] == [max(row, key=row.__getitem__) for row in expected]
