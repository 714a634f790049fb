"""Notice the checkpoints that custom models open by themselves while they are built.

No submit has a hash of these. The first task of a run notes the files that Python opens, and other
tasks compare theirs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.code import INSTALLED
from d2m_hpc.models.weights import Kept
from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage import first_write

SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("bin", "ckpt", "engine", "gguf", "h5", "joblib", "msgpack", "npy", "npz", "onnx", "pb"),
        *("pickle", "pkl", "pt", "pth", "safetensors", "tar", "tflite"),
    )
)
"""Suffixes of checkpoints; other opened files may change at any time."""

_noted: set[str] | None = None
_is_listening = False


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _noted is None or event != "open" or arguments[1] not in ("r", "rb"):
        return
    if isinstance(arguments[0], str | bytes):
        _noted.add(os.path.abspath(os.fsdecode(arguments[0])))


@contextmanager
def noted(listen: bool) -> Iterator[set[str]]:
    """Collect the paths of checkpoints that Python opens in the block; libraries in C open unseen.

    Args:
        listen: there is a custom file; else no path is collected.
    """
    global _noted, _is_listening
    if not listen:
        yield set()
        return
    if not _is_listening:
        sys.addaudithook(_listen)  # for ever: Python cannot remove a hook
        _is_listening = True
    found: set[str] = set()
    opened: set[str] = set()
    _noted = opened
    try:
        yield found
    finally:
        _noted = None
        found |= {p for p in opened if _is_checkpoint(Path(p))}


def _is_checkpoint(path: Path) -> bool:
    return path.suffix in SUFFIXES and not INSTALLED & {*path.parts} and path.is_file()


def require_same(run: RunDir, version: str, paths: set[str]) -> None:
    """Compare checkpoints with those that the run's first task opened.

    Args:
        version: of the custom code that opens them.

    Raises:
        WeightsError: a checkpoint has changed.
    """
    others = []
    for path in sorted(paths):
        place = run.agreed(f"checkpoint of {version}", path)
        known = first_write.read(place, _kept)
        known = known or first_write.agree(place, asdict(Kept.of(Path(path))), _kept)
        assert known is not None
        others.append(known.other())
    if others := [why for why in others if why]:
        advice = (
            "shards of this run were made with the one before; restore it, or declare it in the "
            "custom class (`checkpoints = [...]`) and submit again"
        )
        told = ["a custom model opens other checkpoints than before:", *others, advice]
        raise WeightsError("\n  ".join(told))


def _kept(found: Any) -> Kept:
    return Kept(**found)
