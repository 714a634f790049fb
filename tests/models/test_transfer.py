"""What can be told of copies without a GPU; the rest is in tests/gpu."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import captions

from d2m_hpc.models import clip, dedup, faces, nsfw, stats, toxicity
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options
from d2m_hpc.models.transfer import CudaCopies, each

CPU, META = torch.device("cpu"), torch.device("meta")


def test_each_tensor_is_changed_and_all_else_stays() -> None:
    one, two = torch.tensor([1]), torch.tensor([2])
    value = {"a": (one, ["x", two]), "b": [[1.0], None], "c": "y"}
    changed = each(value, lambda tensor: tensor + 1)
    assert changed == {"a": (one + 1, ["x", two + 1]), "b": [[1.0], None], "c": "y"}
    assert value["a"][0] is one


def test_on_the_cpu_nothing_is_copied() -> None:
    copies, value = CudaCopies(CPU), torch.rand(3)
    assert copies.send({"x": (value,)})["x"][0] is value
    assert copies.fetch([value])[0] is value
    copies.mark()()


def _pixels(name: str, side: int) -> Any:
    pixels = torch.zeros(5, side, side, 3, dtype=torch.uint8, device=META)
    paddings = torch.zeros(5, 4, device=META)
    return PREPROCESSORS[name].finish((pixels, paddings) if name == "faces-aug" else pixels)


def _tokens() -> torch.Tensor:
    prepared = [PREPROCESSORS["clip-tokens"].prepare(t, Options()) for t in captions()[:5]]
    return torch.from_numpy(np.stack(prepared))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (clip.ClipL14, lambda: [_pixels("clip-aug", 224), _tokens()]),
        (toxicity.Detoxify, lambda: [captions()[:5]]),
        (nsfw.NsfwImage, lambda: [torch.zeros(5, 768, device=META)]),
        (faces.Scrfd10G, lambda: [_pixels("faces-aug", 224)]),
        (dedup.IscFtV107, lambda: [_pixels("dedup-aug", 128)]),
        (stats.ImageStats, lambda: [_pixels("stats-aug", 256)]),
    ],
)
@torch.no_grad()
def test_no_model_looks_at_a_value_on_the_device(
    model: Any, inputs: Any, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look is to wait for all that was launched before; `meta` has no values to look at."""
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: nullcontext()
    )  # which `meta` does not have either
    made = model(META, Weights(checkpoints))(*inputs())
    first = made
    while isinstance(first, tuple):
        first = first[0]
    assert first.device == META
    assert len(first) == 5


def test_the_meta_device_would_tell() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.nonzero(torch.zeros(3, device=META)).tolist()
