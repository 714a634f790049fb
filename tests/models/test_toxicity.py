from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detoxify import Detoxify as Reference
from detoxify.detoxify import get_model_and_tokenizer
from kit import captions
from transformers.utils import logging

from d2m_hpc.errors import WeightsError
from d2m_hpc.models import toxicity
from d2m_hpc.models.checkpoint import Weights

CPU = torch.device("cpu")
TEXTS = [*captions()[:24], "", " ", "🤖 emoji", "very long " * 900, "ein kurzer Satz", "x"]


@pytest.fixture(scope="module")
def model(checkpoints: Path) -> toxicity.Detoxify:
    return toxicity.Detoxify(CPU, Weights(checkpoints))


class _Refused(AssertionError):
    """Somebody asked the network."""


def test_it_loads_without_the_network(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise _Refused(arguments)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    with torch.inference_mode():
        scores = toxicity.Detoxify(CPU, Weights(checkpoints))(["a", "b c"])
    assert scores.shape == (2,)


def test_it_says_nothing_while_it_loads_and_runs(checkpoints: Path) -> None:
    """A process of its own, as a task is: nothing there has silenced the libraries before."""
    code = (
        "import sys, torch; from pathlib import Path;"
        "from d2m_hpc.models import checkpoint, toxicity;"
        "weights = checkpoint.Weights(Path(sys.argv[1]));"
        "model = toxicity.Detoxify(torch.device('cpu'), weights);"
        "model.eval()(['a', 'long ' * 2000])"
    )
    command = [sys.executable, "-c", code, str(checkpoints)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS"))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_bars_and_verbosity_are_afterwards_as_they_were(checkpoints: Path) -> None:
    level = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        for bar in (True, False):
            (logging.enable_progress_bar if bar else logging.disable_progress_bar)()
            toxicity.load(Weights(checkpoints))
            assert logging.is_progress_bar_enabled() is bar
            assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def reference(checkpoints: Path) -> Reference:
    """detoxify's own object; its loading asks the hub, so only that is left out."""
    content = Weights(checkpoints).load(toxicity.CHECKPOINT)
    local = {"model_type": str(checkpoints / toxicity.HUB_FILES)}
    arguments = {**content["config"]["arch"]["args"], **local}
    found = Reference.__new__(Reference)
    found.model, found.tokenizer = get_model_and_tokenizer(
        **arguments, state_dict=content["state_dict"]
    )
    found.class_names = content["config"]["dataset"]["args"]["classes"]
    return found


def test_scores_are_the_largest_of_detoxifys_for_one_text_at_a_time(
    model: toxicity.Detoxify, reference: Reference
) -> None:
    with torch.inference_mode():
        ours = model(TEXTS)
    theirs = [max(reference.predict(text).values()) for text in TEXTS]
    assert len(reference.class_names) == 16
    assert np.std(theirs) > 1e-3
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)


@torch.inference_mode()
def test_texts_in_the_shapes_that_a_gpu_is_given_have_the_same_scores(
    model: toxicity.Detoxify,
) -> None:
    encoded = model.tokenizer(TEXTS, truncation=True, max_length=512)["input_ids"]
    np.testing.assert_allclose(model._in_shapes(encoded).numpy(), model(TEXTS).numpy(), atol=1e-5)


@torch.inference_mode()
def test_a_text_beyond_512_tokens_is_cut_there(model: toxicity.Detoxify) -> None:
    long = "word " * 600
    assert len(model.tokenizer(long)["input_ids"]) > toxicity.MAX_TOKENS
    assert torch.equal(model([long]), model([long + "and more"]))
    assert not torch.equal(model(["word " * 20]), model(["word " * 20 + "and more"]))


def test_a_checkpoint_of_another_kind_is_named(checkpoints: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / toxicity.CHECKPOINT)
    with pytest.raises(WeightsError, match=r"multilingual_debiased-0b549669\.ckpt.*config"):
        toxicity.load(Weights(tmp_path))


def test_a_net_that_lacks_a_tensor_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    """transformers draws what is missing at random and says so in a log that we silence."""
    content = Weights(checkpoints).load(toxicity.CHECKPOINT)
    del content["state_dict"]["classifier.out_proj.weight"]
    torch.save(content, tmp_path / toxicity.CHECKPOINT)
    (tmp_path / toxicity.HUB_FILES).symlink_to(checkpoints / toxicity.HUB_FILES)
    with pytest.raises(WeightsError, match=r"ckpt(.|\n)*classifier\.out_proj\.weight"):
        toxicity.load(Weights(tmp_path))


def test_a_missing_tokenizer_is_named(checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / toxicity.HUB_FILES
    folder.mkdir()
    (tmp_path / toxicity.CHECKPOINT).symlink_to(checkpoints / toxicity.CHECKPOINT)
    config = json.loads((checkpoints / toxicity.HUB_FILES / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"xlm-roberta-base"):
        toxicity.load(Weights(tmp_path))
