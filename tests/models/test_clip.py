from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from kit import captions, photographs
from torch import Tensor, nn

from d2m_hpc.errors import WeightsError
from d2m_hpc.models import clip
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.headers import is_torchscript
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options, Picture
from d2m_hpc.models.tokens import clip_tokens

CPU = torch.device("cpu")
NAME = clip.ClipB32.checkpoint


@pytest.fixture(scope="module")
def model(checkpoints: Path) -> clip.ClipB32:
    return clip.ClipB32(CPU, Weights(checkpoints))


def _tokens(texts: list[str]) -> Tensor:
    return torch.from_numpy(np.stack([clip_tokens(text) for text in texts]))


def _images(rows: int) -> Tensor:
    made = PREPROCESSORS["clip-aug"]
    pictures = [made.prepare(Picture(p), Options()) for p in photographs(rows)]
    finished: Tensor = made.finish(torch.from_numpy(np.stack(pictures)))
    return finished


@torch.inference_mode()
@pytest.mark.parametrize("kind", [clip.ClipB32, clip.ClipL14])
def test_features_are_those_of_open_clips_full_towers(
    kind: type[clip.OpenAIClip], checkpoints: Path
) -> None:
    model = kind(CPU, Weights(checkpoints))
    tokens = _tokens(captions())
    image, text = model(_images(3), tokens)
    expected = model.clip.encode_text(tokens, normalize=True)
    assert len({int(end) for end in tokens.argmax(dim=1)}) > 10
    np.testing.assert_allclose(text.numpy(), expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(
        image.numpy(), model.clip.encode_image(_images(3), normalize=True).numpy(), atol=1e-6
    )
    for features in (image, text):
        np.testing.assert_allclose(features.norm(dim=1).numpy(), 1, atol=1e-6)


@torch.inference_mode()
def test_texts_in_the_shapes_that_a_gpu_is_given_have_the_same_features(
    model: clip.ClipB32,
) -> None:
    tokens = _tokens(captions())
    made = model._encode_in_shapes(model.clip, tokens, tokens.argmax(dim=1))
    np.testing.assert_allclose(made.numpy(), model.clip.encode_text(tokens).numpy(), atol=1e-4)


@torch.inference_mode()
def test_a_caption_with_an_end_token_inside_is_pooled_at_the_first(model: clip.ClipB32) -> None:
    """As CLIP's argmax over the ids does: what follows it has no part in the feature."""
    inside, plain = _tokens(["a cat<|endoftext|> and a dog", "a cat"])
    assert not torch.equal(inside, plain)
    _, text = model(_images(2), torch.stack([inside, plain]))
    np.testing.assert_allclose(text[0].numpy(), text[1].numpy(), atol=1e-6)


@torch.inference_mode()
def test_features_are_float32_of_length_one_under_autocast(model: clip.ClipB32) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for features in model(_images(2), _tokens(["a cat", "a dog " * 30])):
            assert features.dtype == torch.float32
            np.testing.assert_allclose(features.norm(dim=1).numpy(), 1, atol=1e-6)


class _Archive(nn.Module):
    """What OpenAI's archives are to a reader: buffers under the state dict's dotted names."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _torchscript(state: dict[str, Tensor], path: Path) -> None:
    root = _Archive()
    for name, value in state.items():
        *parents, leaf = name.split(".")
        module: nn.Module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, _Archive())
            module = module.get_submodule(parent)
        module.register_buffer(leaf, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the format, which is published for good
        torch.jit.save(torch.jit.trace(root, torch.zeros(1), check_trace=False), str(path))


def test_a_torchscript_archive_and_a_plain_state_dict_give_the_same_net(
    checkpoints: Path, tmp_path: Path
) -> None:
    state = Weights(checkpoints).load(NAME)
    assert {"input_resolution", "context_length", "vocab_size"} <= set(state)
    _torchscript(state, tmp_path / NAME)
    assert is_torchscript(tmp_path / NAME)
    assert not is_torchscript(checkpoints / NAME)
    archived = clip.load(Weights(tmp_path), NAME).state_dict()
    plain = clip.load(Weights(checkpoints), NAME).state_dict()
    assert archived.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(archived[name], value), name


@pytest.mark.filterwarnings("ignore:.torch.jit.load:FutureWarning")  # open_clip tries it first
@torch.inference_mode()
def test_the_net_is_that_of_open_clips_own_loader(checkpoints: Path, model: clip.ClipB32) -> None:
    theirs = open_clip.load_openai_model(str(checkpoints / NAME), precision="fp32", device="cpu")
    images = _images(2)
    expected = theirs.eval().encode_image(images, normalize=True)
    ours, _ = model(images, _tokens(["", ""]))
    np.testing.assert_allclose(ours.numpy(), expected.numpy(), atol=1e-6)


def _broken_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", b"nothing")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"a": torch.zeros(1)}, path),
        lambda path: torch.save([torch.zeros(1)], path),
        lambda path: torch.save({"state_dict": {}, "epoch": 3}, path),
        lambda path: path.write_bytes(b"<html>404</html>"),
        _broken_archive,
    ],
    ids=["another net", "a list", "a training checkpoint", "a web page", "a broken archive"],
)
def test_a_file_that_is_something_else_is_named(tmp_path: Path, write: object) -> None:
    assert callable(write)
    write(tmp_path / NAME)
    with pytest.raises(WeightsError, match=r"ViT-B-32\.pt"):
        clip.load(Weights(tmp_path), NAME)


@torch.inference_mode()
def test_a_training_checkpoint_is_taken_for_the_net_in_it(
    model: clip.ClipB32, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As open_clip's trainer saves them, several GPUs and all."""
    state = {f"module.{name}": tensor for name, tensor in model.clip.state_dict().items()}
    torch.save({"epoch": 7, "name": "run", "state_dict": state, "optimizer": {}}, tmp_path / NAME)
    trained, tokens = clip.ClipB32(CPU, Weights(tmp_path)), _tokens(captions()[:3])
    assert "ViT-B-32.pt is a training checkpoint" in caplog.text
    assert "QuickGELU" in caplog.text
    for ours, expected in zip(trained(_images(3), tokens), model(_images(3), tokens), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_a_checkpoint_without_a_net_is_named(tmp_path: Path) -> None:
    torch.save({"epoch": 7, "optimizer": {}}, tmp_path / NAME)
    with pytest.raises(WeightsError, match=r"ViT-B-32\.pt .*no state dict, but epoch"):
        clip.ClipB32(CPU, Weights(tmp_path))
