"""Rows of the text towers: tokens that are computed for each real one, counted in the nets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import baseline
from benchmarks.captions import captions
from benchmarks.harness import Row, Setting, Sides
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.clip import ClipB32, ClipL14, OpenAIClip
from d2m_hpc.models.toxicity import MAX_TOKENS, Detoxify

MAKE_CHECKPOINTS = Path(__file__).parents[2] / "tests" / "golden" / "make_checkpoints.py"
SIZES = (64, 64, 64, 256, 256, 256)
"""Of the batches."""


def checkpoints(folder: Path) -> Weights:
    """Small nets in the published formats; they are made at the first call and kept."""
    weights = folder / "checkpoints"
    if not (weights / "xlm-roberta-base").exists():
        subprocess.run([sys.executable, str(MAKE_CHECKPOINTS), str(weights)], check=True)
    return Weights(weights)


def counted(layer: nn.Module, run: Callable[[], object]) -> int:
    """The tokens of all [B, L, D] that go into a layer while something runs."""
    seen: list[int] = []

    def see(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0].shape[0] * arguments[0].shape[1])

    handle = layer.register_forward_pre_hook(see)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return sum(seen)


class Clip:
    """A text tower of ours, and the same one given whole contexts of 77 tokens."""

    def __init__(self, kind: type[OpenAIClip], weights: Weights) -> None:
        self._model = kind(torch.device("cpu"), weights)
        self._first = self._model.clip.transformer.resblocks[0]

    def ours(self, texts: list[str]) -> int:
        tokens = self._tokens(texts)
        images = torch.zeros(len(texts), 3, 224, 224)
        return counted(self._first, lambda: self._model(images, tokens))

    def conventional(self, texts: list[str]) -> int:
        return counted(self._first, lambda: self._model.clip.encode_text(self._tokens(texts)))

    def real(self, texts: list[str]) -> int:
        """Up to the end token."""
        return int((self._tokens(texts).argmax(dim=1) + 1).sum())

    def _tokens(self, texts: list[str]) -> Tensor:
        return torch.stack([baseline.tokens(text) for text in texts])


class XlmRoberta:
    """Detoxify of ours, and the same net given a batch padded to its longest text."""

    def __init__(self, weights: Weights) -> None:
        self._model = Detoxify(torch.device("cpu"), weights)
        self._first = self._model.net.roberta.encoder.layer[0]

    def ours(self, texts: list[str]) -> int:
        return counted(self._first, lambda: self._model(texts))

    def conventional(self, texts: list[str]) -> int:
        encoded = self._encoded(texts, padding=True, return_tensors="pt")
        return counted(self._first, lambda: self._model.net(**encoded))

    def real(self, texts: list[str]) -> int:
        return sum(map(len, self._encoded(texts)["input_ids"]))

    def _encoded(self, texts: list[str], **options: Any) -> Any:
        return self._model.tokenizer(texts, truncation=True, max_length=MAX_TOKENS, **options)


@contextmanager
def tokens(setting: Setting, build: Callable[[Weights], Clip | XlmRoberta]) -> Iterator[Sides]:
    """Of batches in turn; beside them how many the conventional way computes for a real one."""
    tower = build(checkpoints(setting.folder))
    batches = [captions(setting.size(size, 16), seed) for seed, size in enumerate(SIZES)]
    ours, real = cycle(batches), cycle(batches)
    conventional: list[float] = []

    def counted_real() -> float:
        texts = next(real)
        found = tower.real(texts)
        conventional.append(tower.conventional(texts) / found)
        return float(found)

    yield Sides(
        ours=lambda: float(tower.ours(next(ours))),
        baseline=counted_real,
        warm_up=lambda: None,
        more={"conventional": conventional},
    )


def _row(name: str, title: str, build: Callable[[Weights], Clip | XlmRoberta]) -> Row:
    title = f"{title}: tokens computed for each real one"
    return Row(name, title, 1.3, partial(tokens, build=build), "at most", "tokens")


ROWS = (
    _row("text-clip-b32", "text of CLIP B/32", partial(Clip, ClipB32)),
    _row("text-clip-l14", "text of CLIP L/14", partial(Clip, ClipL14)),
    _row("text-xlm-roberta", "text of XLM-R", XlmRoberta),
)
