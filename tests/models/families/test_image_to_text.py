from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_blip2
import torch
from bench import run
from kit import photographs
from tiny_nets import SMALL, blip, image_processor, lively, wordpieces
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    BlipForConditionalGeneration,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    Siglip2ImageProcessor,
)

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.families.image_to_text import ImageToText
from d2m_hpc.models.family import ParameterError, Use
from d2m_hpc.models.hub_nets import Captioner, images

MADE: dict[str, Any] = {
    "blip": BlipForConditionalGeneration,
    "blip-2": Blip2ForConditionalGeneration,
    "git": GitForCausalLM,
}


@pytest.fixture(scope="module", params=[*MADE])
def net(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "blip":
        return request.param, blip(folder, MADE["blip"])
    return request.param, git(folder) if request.param == "git" else tiny_blip2.save(folder)


def git(folder: Path) -> Path:
    """A net of GIT's, of 48 pixels."""
    tokenizer, side = wordpieces(folder), {"height": 48, "width": 48}
    vision = {**SMALL, "image_size": 48, "patch_size": 16}
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = GitConfig(**SMALL, **tokens, vision_config=vision, vocab_size=len(tokenizer))
    lively(GitForCausalLM(config)).save_pretrained(folder)
    made = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=side)
    GitProcessor(made, tokenizer).save_pretrained(folder)
    return folder


def theirs(net: tuple[str, Path], prompt: str | None, **options: int) -> list[str]:
    """Texts of one picture after the other, as the models' cards make them."""
    kind, folder = net
    processor, made = AutoProcessor.from_pretrained(folder), MADE[kind].from_pretrained(folder)
    processor.image_processor = image_processor(folder)
    found = []
    for picture in photographs(4):
        given = processor(images=picture, text=prompt, return_tensors="pt")
        if kind == "git" and prompt:  # whose card leaves out the token behind the prompt
            del given["token_type_ids"]
            given = {name: v if v.dim() > 2 else v[:, :-1] for name, v in given.items()}
        ids = made.generate(**given, **options, do_sample=False)
        found.append(processor.decode(ids[0], skip_special_tokens=True).strip())
    return found


@pytest.mark.parametrize(
    "entry",
    [{"max_new_tokens": 8}, {"max_new_tokens": 8, "num_beams": 3, "prompt": "a photo of"}],
)
def test_texts_are_those_of_the_models_card(net: tuple[str, Path], entry: dict[str, Any]) -> None:
    keys: dict[str, Any] = {
        "models": [{"own": {"kind": "image-to-text", "checkpoint": str(net[1]), **entry}}],
        "postprocess_columns": ["own-text"],
    }
    found = run(keys, photographs(4)).columns["own-text"]
    options = {name: value for name, value in entry.items() if name != "prompt"}
    assert found == theirs(net, entry.get("prompt"), **options)
    assert len({*found}) > 1


def test_rows_whose_numbers_are_none_are_told(net: tuple[str, Path]) -> None:
    made = Captioner(torch.device("cpu"), net[1], "", {"num_beams": 2, "max_new_tokens": 2})
    side = tiny_blip2.SIDE if net[0] == "blip-2" else 48
    pictures = torch.randn(3, 3, side, side)
    pictures[1, 0, 0, 0] = torch.nan
    with torch.no_grad():
        assert made(pictures)["finite"].isnan().tolist() == [False, True, False]


def test_nets_that_read_pictures_in_another_way_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava", "image_token_index": 32000}')
    use = Use("own", tmp_path, frozenset())
    with pytest.raises(
        ParameterError, match="is missing: the net reads the picture within its pro"
    ):
        ImageToText(checkpoint=str(tmp_path)).outputs(use)
    assert ImageToText(checkpoint=str(tmp_path), prompt="<image> a").outputs(use)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"its Siglip2\w+ gives pixel_attention_mask, pixel_v"):
        images(str(tmp_path))
