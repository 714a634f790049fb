from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import run
from kit import captions
from tiny_nets import SMALL, bert, lively, wordpieces
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertForSequenceClassification,
    BigBirdForSequenceClassification,
    CanineConfig,
    CanineForSequenceClassification,
    CanineTokenizer,
    ConvBertForSequenceClassification,
    FNetForSequenceClassification,
    GPT2ForSequenceClassification,
    XLMForSequenceClassification,
    XLNetForSequenceClassification,
    pipeline,
)

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.hub_nets import Classifier, net_of, tokens

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


XLM: dict[str, Any] = {"emb_dim": 32, "n_layers": 2, "n_heads": 2}
XLNET: dict[str, Any] = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
CONVBERT: dict[str, Any] = {**SMALL, "embedding_size": 32, "head_ratio": 1}
BIGBIRD: dict[str, Any] = {**SMALL, "block_size": 4, "num_random_blocks": 1}
FNET: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("kind", "config", "side"),
    [
        (XLNetForSequenceClassification, XLNET, "left"),
        (XLMForSequenceClassification, {**XLM, "summary_type": "last"}, "right"),
        (XLMForSequenceClassification, {**XLM, "summary_type": "mean"}, "right"),
        (FNetForSequenceClassification, FNET, "right"),  # has no mask
        (GPT2ForSequenceClassification, GPT2, "right"),  # adds an embedding of token types
        (GPT2ForSequenceClassification, GPT2, "left"),
        (GPT2ForSequenceClassification, {**GPT2, "pad_token_id": None, "eos_token_id": 3}, "right"),
        (ConvBertForSequenceClassification, CONVBERT, "right"),  # mixes neighbours
        (BigBirdForSequenceClassification, BIGBIRD, "right"),  # is another after a short text
    ],
)
def test_scores_are_those_of_each_text_alone_whatever_the_net_reads(
    kind: Any, config: dict[str, Any], side: str, tmp_path: Path
) -> None:
    tokenizer, texts = wordpieces(tmp_path), captions()
    tokenizer.padding_side = side
    tokenizer.save_pretrained(tmp_path)
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    texts.sort(key=lambda text: -len(tokenizer(text)["input_ids"]))
    lively(kind(kind.config_class(**{**vocabulary, **config}))).save_pretrained(tmp_path)
    entry = {"kind": "text-classification", "checkpoint": str(tmp_path)}
    keys = {"models": [{"own": entry}], "postprocess_features": ["own-scores"]}
    found = run(keys, (), texts).features["own-scores"]
    made = pipeline("text-classification", str(tmp_path), top_k=None)
    rows = [{s["label"]: s["score"] for s in row} for row in made(texts, truncation=True)]
    expected = np.array([[row["LABEL_0"], row["LABEL_1"]] for row in rows])
    assert expected.std(axis=0).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_text_shorter_than_the_steps_of_a_net_has_scores_too(tmp_path: Path) -> None:
    options = {"local_transformer_stride": 32, "num_hash_buckets": 512}
    config = CanineConfig(**SMALL, **options, max_position_embeddings=256)
    lively(CanineForSequenceClassification(config)).save_pretrained(tmp_path)
    CanineTokenizer(model_max_length=256).save_pretrained(tmp_path)
    entry = {"kind": "text-classification", "checkpoint": str(tmp_path)}
    keys = {"models": [{"own": entry}], "postprocess_features": ["own-scores"]}
    texts = ["", "a", "grass", "a photo of a cat"]
    found = run(keys, (), texts).features["own-scores"]
    made = pipeline("text-classification", str(tmp_path), top_k=None)
    rows = [{s["label"]: s["score"] for s in row} for row in made(texts[2:])]
    np.testing.assert_allclose(found[2:], [[r["LABEL_0"], r["LABEL_1"]] for r in rows], atol=1e-5)
    assert np.isfinite(found).all()


def test_texts_with_special_tokens_in_them_have_the_scores_that_they_have_alone(
    tmp_path: Path,
) -> None:
    """BART's classifiers refuse texts beside each other that have not as many ends."""
    tokenizer, ways = wordpieces(tmp_path), {"layers": 1, "attention_heads": 2, "ffn_dim": 48}
    sizes = {f"{part}_{n}": v for part in ("encoder", "decoder") for n, v in ways.items()}
    ends = {f"{n}_token_id": tokenizer.sep_token_id for n in ("eos", "decoder_start")}
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **ends}
    config = BartConfig(d_model=32, max_position_embeddings=64, **sizes, **vocabulary)
    lively(BartForSequenceClassification(config)).save_pretrained(tmp_path)
    entry = {"kind": "text-classification", "checkpoint": str(tmp_path)}
    keys = {"models": [{"own": entry}], "postprocess_features": ["own-scores"]}
    texts = ["a cat", "a dog", "a [SEP] b", "[SEP][SEP]", "a photo of grass"]
    found = run(keys, (), texts).features["own-scores"]
    made = pipeline("text-classification", str(tmp_path), top_k=None)
    rows = [{s["label"]: s["score"] for s in made([text])[0]} for text in texts]
    expected = np.array([[row[f"LABEL_{i}"] for i in range(3)] for row in rows])
    assert expected.std(axis=0).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_text_with_a_token_that_the_net_has_not_is_no_fault_of_others(tmp_path: Path) -> None:
    """Tokenizers are given tokens, and nets left as they were; CUDA aborts at such a number."""
    folder = bert(tmp_path, BertForSequenceClassification)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    prepare = tokens(str(folder))
    assert prepare("a cat")
    with pytest.raises(ValueError, match=r"'zebra' is token \d+ of the tokenizer; the net has \d+"):
        prepare("a zebra")


def test_few_tokens_are_computed_for_padding(tmp_path: Path) -> None:
    folder, seen = bert(tmp_path, BertForSequenceClassification), []
    net = Classifier(torch.device("cpu"), folder, "AutoModelForSequenceClassification", {})
    net.net.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    net([[2, 5, 3]] * 30 + [[2, *[5] * 40, 3]])
    assert sum(seen) <= 1.2 * (30 * 3 + 42)


@pytest.mark.parametrize("auto", ["AutoModelForSequenceClassification", "AutoModel"])
def test_layers_that_a_config_leaves_out_are_told(auto: str, tmp_path: Path) -> None:
    """transformers leaves their tensors out, and the shorter net has other values."""
    folder = bert(tmp_path, BertForSequenceClassification)
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(WeightsError, match=r"beyond those of its config.json: .*layer\.1\..*mend"):
        net_of(folder, auto, torch.device("cpu"), unused="pooler.")
    (folder / "config.json").write_text(json.dumps(config))
    net_of(folder, auto, torch.device("cpu"), unused="pooler.")  # without the classifier, too
