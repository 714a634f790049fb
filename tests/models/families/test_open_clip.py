from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from bench import run
from kit import captions, photographs
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig

from d2m_hpc.errors import ConfigError, WeightsError
from d2m_hpc.models.families import open_clip as family
from d2m_hpc.models.families.open_clip import OpenClip
from d2m_hpc.models.family import Use
from d2m_hpc.models.inputs import ImageInput
from d2m_hpc.models.published import Checkpoint
from d2m_hpc.models.registry import builtin

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
CLIP: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP: dict[str, Any] = {
    "embed_dim": 40,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": "linear",
    },
    "text_cfg": {
        **TEXT,
        "context_length": 16,
        "vocab_size": 64,
        "hf_tokenizer_name": "timm/some-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    },
}
SIGLIP_IMAGES = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def _tokenizer(folder: Path) -> None:
    """A small tokenizer of words, with end and padding tokens as SigLIP's."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    words |= {
        word: i + 3
        for i, word in enumerate(["a", "of", "the", "in", "photo", "cat", "dog", "on", "with"])
    }
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def export(
    folder: Path, config: dict[str, Any], images: dict[str, Any] | None = None, seed: int = 0
) -> Path:
    """A small random model in the layout in which open_clip exports one."""
    folder.mkdir(parents=True)
    document = {"model_cfg": config, "preprocess_cfg": images or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    torch.manual_seed(seed)
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    given = {k: v for k, v in config.items() if k != "custom_text"}
    net = kind(**given)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    torch.save(net.state_dict(), folder / "open_clip_pytorch_model.bin")
    if config["text_cfg"].get("hf_tokenizer_name"):
        _tokenizer(folder)
    return folder


def features(folder: Path, count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Of the first golden samples, as open_clip's README computes them."""
    texts = captions()[:count]
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    with torch.no_grad():
        pixels = torch.stack([preprocess(picture) for picture in photographs(count)])
        image = model.encode_image(pixels)
        text = model.encode_text(open_clip.get_tokenizer(name)(texts))
        image /= image.norm(dim=-1, keepdim=True)
        text /= text.norm(dim=-1, keepdim=True)
    return image.numpy(), text.numpy()


def _config(name: str, entry: dict[str, Any], *outputs: str) -> dict[str, Any]:
    full = [f"{name}-{output}" for output in outputs]
    return {
        "models": [{name: {"kind": "open_clip", **entry}}],
        "postprocess_columns": [n for n in full if n.endswith("-score")],
        "postprocess_features": [n for n in full if not n.endswith("-score")],
    }


RESIZING: list[dict[str, Any]] = [
    {},
    {"interpolation": "bilinear"},
    {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0, 0, 0], "std": [1, 1, 1]},
    {"resize_mode": "longest", "fill_color": 30},
    {"resize_mode": "longest", "interpolation": "bilinear"},
]


@pytest.mark.parametrize("images", RESIZING)
def test_features_and_score_are_open_clips(images: dict[str, Any], tmp_path: Path) -> None:
    folder, texts = export(tmp_path / "net", CLIP, images), captions()[:8]
    ours = run(
        _config("own", {"model": str(folder)}, "score", "image", "text"), photographs(8), texts
    )
    image, text = features(folder)
    assert image.std(axis=0).max() > 1e-2
    np.testing.assert_allclose(ours.features["own-image"], image, atol=1e-5)
    np.testing.assert_allclose(ours.features["own-text"], text, atol=1e-5)
    np.testing.assert_allclose(ours.columns["own-score"], (image * text).sum(axis=1), atol=1e-5)


def test_siglip_and_a_clip_of_another_size_run_together(tmp_path: Path) -> None:
    siglip = export(tmp_path / "siglip", SIGLIP, SIGLIP_IMAGES, seed=1)
    clip, texts = export(tmp_path / "clip", CLIP), captions()[:8]
    keys = {
        "models": [
            {"big": {"kind": "open_clip", "model": str(siglip)}},
            {"small": {"kind": "open_clip", "model": str(clip)}},
        ],
        "postprocess_features": ["big-image", "big-text", "small-image", "small-text"],
    }
    ours = run(keys, photographs(8), texts)
    for name, folder in (("big", siglip), ("small", clip)):
        image, text = features(folder)
        np.testing.assert_allclose(ours.features[f"{name}-image"], image, atol=1e-5)
        np.testing.assert_allclose(ours.features[f"{name}-text"], text, atol=1e-5)


def test_presets_are_pairs_that_open_clip_lists() -> None:
    presets = {(p["model"], p["pretrained"]) for p in OpenClip.presets.values()}
    assert presets <= {*open_clip.list_pretrained()}
    assert OpenClip.presets.keys() <= builtin().models.keys()


PAIRS = open_clip.list_pretrained()


def test_every_published_model_is_known_as_open_clip_knows_it() -> None:
    """What the login node reads from open_clip's files is what open_clip itself says."""
    named: dict[str, str] = {}
    for model, tag in PAIRS:
        made = OpenClip(model=model, pretrained=tag)
        use = Use("net", Path("weights"), frozenset({"image", "text", "score"}))
        told, config = open_clip.get_pretrained_cfg(model, tag), open_clip.get_model_config(model)
        image, text = made.inputs(use)
        assert image == ImageInput(
            config["vision_cfg"]["image_size"],
            told["resize_mode"],
            told["interpolation"],
            mean=told["mean"],
            std=told["std"],
        )
        assert dict(text.options)["context"] == config["text_cfg"].get("context_length", 77)
        assert {o.name: o.shape for o in made.outputs(use)}["image"] == (config["embed_dim"],)
        first = made.checkpoints(use)[0]
        assert not isinstance(first, Path)
        assert named.setdefault(first.name, first.url) == first.url
        if isinstance(first, Checkpoint):
            assert first.url == told["url"]
            assert len(first.sha256) in (0, 8, 64)
        else:
            assert first.repo_id == told["hf_hub"].rpartition("/")[0]
    assert len(named) > 100


def test_the_tables_are_read_without_torch_and_else_by_open_clip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = [name for name in open_clip.list_models() if not name.startswith("d2m-")]
    assert family.architectures() == sorted(known)
    own = family._table(family._library() / "pretrained.py")
    assert own == open_clip.pretrained._PRETRAINED
    assert own is not open_clip.pretrained._PRETRAINED
    monkeypatch.setattr(family, "_table", lambda path: {}["moved"])
    assert family.pretrained.__wrapped__() is open_clip.pretrained._PRETRAINED


def _variants(folder: Path) -> dict[str, Any]:
    """The same weights as people keep them."""
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    parallel = {f"module.{name}": value for name, value in state.items()}
    return {
        "plain.pt": state,
        "training.pt": {"epoch": 3, "name": "run", "state_dict": parallel, "optimizer": {}},
        "net.safetensors": state,
    }


@pytest.mark.parametrize("kept", ["plain.pt", "training.pt", "net.safetensors"])
def test_a_checkpoint_at_hand_is_used_however_it_was_kept(kept: str, tmp_path: Path) -> None:
    folder = export(tmp_path / "net", CLIP)
    content = _variants(folder)[kept]
    path = folder / kept
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    expected, _ = features(folder, 2)
    (folder / "open_clip_pytorch_model.bin").unlink()
    keys = _config("own", {"model": str(folder), "pretrained": str(path)}, "image")
    ours = run(keys, photographs(2)).features["own-image"]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_openais_tag_has_the_activation_that_it_was_trained_with(checkpoints: Path) -> None:
    """Also under the name without `-quickgelu`, for which open_clip only warns."""
    keys = _config("own", {"model": "ViT-B-32", "pretrained": "openai"}, "image", "text", "score")
    keys["models"].append("oai-clip-vit-b32")
    keys["postprocess_features"] += ["oai-clip-vit-b32-image", "oai-clip-vit-b32-text"]
    keys["weights_dir"] = str(checkpoints)
    ours = run(keys, photographs(2), ["a cat", "the dog of a cat"]).features
    for kind in ("image", "text"):
        np.testing.assert_allclose(ours[f"own-{kind}"], ours[f"oai-clip-vit-b32-{kind}"], atol=1e-6)


def test_another_nets_weights_are_told(tmp_path: Path) -> None:
    folder = export(tmp_path / "net", CLIP)
    other = export(tmp_path / "other", {**CLIP, "embed_dim": 8})
    weights = str(other / "open_clip_pytorch_model.bin")
    keys = _config("own", {"model": str(folder), "pretrained": weights}, "image")
    with pytest.raises(WeightsError, match=r"pytorch_model.bin cannot be used: .*size mismatch"):
        run(keys, photographs(1))


def test_an_unknown_key_of_a_config_is_told(tmp_path: Path) -> None:
    folder = export(tmp_path / "net", CLIP)
    path = folder / "open_clip_config.json"
    told = json.loads(path.read_bytes())
    told["model_cfg"]["nope"] = 1
    path.write_text(json.dumps(told))
    with pytest.raises(WeightsError, match=r"not take the config of the net of .*argument 'nope'"):
        run(_config("own", {"model": str(folder)}, "image"), photographs(1))


def test_a_tag_of_a_model_that_has_none_is_told(tmp_path: Path) -> None:
    folder = export(tmp_path / "net", CLIP)
    with pytest.raises(ConfigError, match="found 'webli', which names no file, and the model is n"):
        run(_config("own", {"model": str(folder), "pretrained": "webli"}, "image"), [])


def test_a_text_tower_of_transformers_is_read_from_a_folder(tmp_path: Path) -> None:
    """As of the multilingual models."""
    tower = XLMRobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    tower.save_pretrained(tmp_path / "tower")
    text = {
        "hf_model_name": str(tmp_path / "tower"),
        "hf_model_pretrained": False,
        "hf_tokenizer_name": str(tmp_path / "net"),
        "hf_pooler_type": "mean_pooler",
        "context_length": 12,
    }
    folder = export(tmp_path / "net", {**CLIP, "text_cfg": text, "custom_text": True})
    ours = run(_config("own", {"model": str(folder)}, "text"), [], captions()[:8])
    np.testing.assert_allclose(ours.features["own-text"], features(folder)[1], atol=1e-5)


@pytest.mark.parametrize("images", RESIZING)
def test_fast_resizing_is_near(images: dict[str, Any], tmp_path: Path) -> None:
    folder = export(tmp_path / "net", CLIP, images)
    keys = _config("own", {"model": str(folder)}, "image")
    exact = run(keys, photographs(8)).features["own-image"]
    fast = run({**keys, "resize": "fast"}, photographs(8)).features["own-image"]
    assert 0 < np.abs(exact - fast).max() < 5e-3


@pytest.mark.parametrize("net", [CLIP, SIGLIP])
def test_a_tower_that_is_not_asked_for_takes_no_memory(net: dict[str, Any], tmp_path: Path) -> None:
    model = OpenClip(model=str(export(tmp_path / "net", net)))
    whole, image, text = (
        model.build(Use("net", tmp_path, frozenset(wanted)), torch.device("cpu"))
        for wanted in (["score"], ["image"], ["text"])
    )
    sizes = [sum(p.numel() for p in made.parameters()) for made in (whole, image, text)]
    assert max(sizes[1:]) < sizes[0] <= sum(sizes[1:])
    assert [hasattr(made, "image_net") for made in (whole, image, text)] == [True, True, False]


def test_a_tokenizer_that_cannot_be_read_ends_a_task_before_any_sample(tmp_path: Path) -> None:
    folder = export(tmp_path / "net", SIGLIP, SIGLIP_IMAGES)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"text by .+of_transformers cannot be made ready: \w+"):
        run(_config("own", {"model": str(folder)}, "text"), [], ["a cat"])
