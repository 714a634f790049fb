from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_blip2
import torch
from bench import run
from kit import photographs
from tiny_nets import blip, image_processor
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    BlipForConditionalGeneration,
)

from d2m_hpc.models.hub_nets import Captioner

MADE = {"blip": BlipForConditionalGeneration, "blip-2": Blip2ForConditionalGeneration}


@pytest.fixture(scope="module", params=[*MADE])
def net(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "blip":
        return request.param, blip(folder, MADE["blip"])
    return request.param, tiny_blip2.save(folder)


def theirs(net: tuple[str, Path], prompt: str | None, **options: int) -> list[str]:
    """Texts of one picture after the other, as the models' cards make them."""
    kind, folder = net
    processor, made = AutoProcessor.from_pretrained(folder), MADE[kind].from_pretrained(folder)
    processor.image_processor = image_processor(folder)
    found = []
    for picture in photographs(4):
        given = processor(images=picture, text=prompt, return_tensors="pt")
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
    side = 48 if net[0] == "blip" else tiny_blip2.SIDE
    pictures = torch.randn(3, 3, side, side)
    pictures[1, 0, 0, 0] = torch.nan
    with torch.no_grad():
        assert made(pictures)["finite"].isnan().tolist() == [False, True, False]
