"""Run a user's custom file, written for this program or for dataset2metadata."""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image
from torch import Tensor

from d2m_hpc.errors import ConfigError
from d2m_hpc.models import postprocessors
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options, Picture, Preprocessor
from d2m_hpc.models.registry import LOOKUPS, ModelSpec

SEED = "dataset2metadata"


def install_seed_names() -> None:
    """Let imports from dataset2metadata find ours, unless that package is installed."""
    if SEED in sys.modules or importlib.util.find_spec(SEED) is not None:
        return
    package = types.ModuleType(SEED)
    package.__path__ = []
    sys.modules[SEED] = package
    for name, module in (("postprocessors", postprocessors), ("preprocessors", _preprocessors())):
        setattr(package, name, module)
        sys.modules[f"{SEED}.{name}"] = module


def _preprocessors() -> ModuleType:
    """The seed's preprocessors by their names there: a PIL image or a text to a float tensor."""
    module = types.ModuleType(f"{SEED}.preprocessors")
    names = {
        "oai_clip_image": "clip-aug",
        "oai_clip_text": "clip-tokens",
        "faces_scrfd": "faces-aug",
        "dedup": "dedup-aug",
        "identity": "identity",
    }
    for name, ours in names.items():
        setattr(module, name, partial(_apply, PREPROCESSORS[ours]))
    return module


def _apply(preprocessor: Preprocessor, value: Any) -> Any:
    raw = Picture(value) if isinstance(value, Image.Image) else value
    prepared = preprocessor.prepare(raw, Options(exact=True))
    if isinstance(prepared, tuple):
        batch = preprocessor.finish(tuple(part[None] for part in prepared))
        return tuple(part[0] for part in batch)
    return preprocessor.finish(prepared[None])[0] if isinstance(prepared, Tensor) else prepared


def load(path: Path) -> ModuleType:
    """Import a custom file.

    Raises:
        ConfigError: it is not there or fails while it is imported; the cause is chained.
    """
    install_seed_names()
    spec = importlib.util.spec_from_file_location(f"d2m_custom_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(str(path), ["custom_pypath: not a Python file; its name must end in .py"])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            str(path), [f"custom_pypath: importing it failed: {type(error).__name__}: {error}"]
        ) from error
    return module


def lookups(module: ModuleType) -> dict[str, dict[str, Any]]:
    """The four tables of a custom file; one that is missing is empty."""
    return {name: dict(getattr(module, name, {})) for name in LOOKUPS}


def spec_of(name: str, model: Any) -> ModelSpec:
    """The static fields of a custom model class."""
    return ModelSpec(
        name,
        raw_inputs=tuple(getattr(model, "raw_inputs", ())),
        preprocessors=tuple(getattr(model, "preprocessors", ())),
        dependencies=tuple(getattr(model, "dependencies", ())),
        to_device=bool(getattr(model, "to_device", True)),
    )
