from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import run
from kit import captions, photographs
from tiny_nets import bert, blip, image_processor
from transformers import AutoTokenizer, BertModel, BlipForImageTextRetrieval

from d2m_hpc.models.families.image_text_matching import ImageTextMatching
from d2m_hpc.models.family import ParameterError, Use


def test_scores_are_those_of_blips_matching_head(tmp_path: Path) -> None:
    folder, texts = blip(tmp_path, BlipForImageTextRetrieval), sorted(captions(), key=len)[::6]
    pictures = photographs(len(texts))
    keys: dict[str, Any] = {
        "models": [{"itm": {"kind": "image-text-matching", "checkpoint": str(folder)}}],
        "postprocess_columns": ["itm-score"],
    }
    found = run(keys, pictures, texts).columns["itm-score"]
    images = image_processor(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = BlipForImageTextRetrieval.from_pretrained(folder)
    expected = []
    for picture, text in zip(pictures, texts, strict=True):
        given = tokenizer(text, truncation=True, return_tensors="pt")
        with torch.no_grad():
            scores = net(**given, **images(picture, return_tensors="pt")).itm_score
        expected.append(scores.softmax(dim=1)[0, 1].item())
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_another_net_is_told(tmp_path: Path) -> None:
    folder = bert(tmp_path, BertModel)
    with pytest.raises(ParameterError, match=r"is of a BertModel; valid is a net .* 'BlipForIm"):
        ImageTextMatching(checkpoint=str(folder)).outputs(Use("itm", tmp_path, frozenset()))
