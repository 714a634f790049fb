"""Every CLIP-like model that open_clip knows, or that was trained with it.

open_clip is not imported here, as it imports torch: its tables are read as files.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from d2m_hpc.models.family import Family, Output, ParameterError, Use, at_hand
from d2m_hpc.models.inputs import CLIP_MEAN, CLIP_STD, ImageInput, OwnInput
from d2m_hpc.models.published import Checkpoint
from d2m_hpc.storage.texts import nearest

if TYPE_CHECKING:
    import torch

CONTEXT = 77
"""Tokens of a text where a model's own config does not say."""
DEFAULTS: Mapping[str, Any] = {
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
"""What open_clip prepares images by, where neither tag nor model says."""
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""Files in which models are exported, those that are taken first before."""
NEEDED = (".json", ".txt", ".model")
"""How the other files of an exported model end: its config and its tokenizer."""
_SHA256 = re.compile("[0-9a-f]{64}|[0-9a-f]{8}")
Triple = tuple[float, float, float]


@cache
def _library() -> Path:
    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ParameterError("kind", "needs open_clip_torch, which is not installed")
    return Path(spec.submodule_search_locations[0])


def architectures() -> list[str]:
    """The names of all models."""
    return sorted(path.stem for path in (_library() / "model_configs").glob("*.json"))


@cache
def pretrained() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Of each model its published checkpoints, by tag, as open_clip's own table has them.

    The table is taken out of its module, without what that imports. Where another version of
    open_clip has it elsewhere, open_clip is imported, which takes seconds.
    """
    try:
        return _table(_library() / "pretrained.py")
    except Exception:
        from open_clip import pretrained as module

        return module._PRETRAINED  # type: ignore[no-any-return]


def _table(path: Path) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """
    Raises:
        Exception: whatever the module does that is not expected of it.
    """
    alias = "d2m_open_clip"  # a package without open_clip's `__init__`, for the module's siblings
    package = ModuleType(alias)
    package.__path__ = [str(path.parent)]
    sys.modules[alias] = package
    tree = ast.parse(path.read_bytes())
    heavy = (n for n in tree.body if isinstance(n, ast.Try) or _imports(n) == "tqdm")
    dropped = {*heavy}
    tree.body = [n for n in tree.body if n not in dropped]
    names: dict[str, Any] = {"__name__": f"{alias}.pretrained", "__package__": alias}
    try:
        exec(compile(tree, str(path), "exec"), names)
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == alias]:
            del sys.modules[name]
    table: Mapping[str, Mapping[str, Mapping[str, Any]]] = names["_PRETRAINED"]
    return table


def _imports(node: ast.stmt) -> str | None:
    return node.module if isinstance(node, ast.ImportFrom) else None


class OpenClip(Family):
    """Features of image and text, and their cosine, by a model of open_clip.

    The tag's own activation is used: `ViT-B-32` with `openai` has QuickGELU, as it was trained
    with, and as open_clip has it under the name `ViT-B-32-quickgelu`.
    """

    kind: ClassVar = "open_clip"
    on_host: ClassVar = ("text",)
    paths: ClassVar = ("model", "pretrained")

    model: str
    """a name that `open_clip.list_models()` has, or a folder with an `open_clip_config.json`"""
    pretrained: str = ""
    """a tag that `open_clip.list_pretrained()` has for the model, or the path of a checkpoint,
    which may be one of a training (`.pt`, `.bin`, `.safetensors`, `.npz`)"""
    image_mean: Triple | None = None
    """of pixels in [0, 1], in place of the tag's"""
    image_std: Triple | None = None
    """in place of the tag's"""
    image_interpolation: Literal["bicubic", "bilinear"] | None = None
    """in place of the tag's"""
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """in place of the tag's"""

    def inputs(self, use: Use) -> list[Any]:
        needed = {"image": self._image, "text": self._text}
        return [make() for kind, make in needed.items() if use.wanted & {kind, "score"}]

    def outputs(self, use: Use) -> list[Output]:
        self._weights()
        shape = (int(self._config["embed_dim"]),)
        dot = {"i": "image", "j": "text"}
        return [
            Output("score", "float32", function="batched_dot_product_index", options=dot),
            Output("image", shape=shape),
            Output("text", shape=shape),
        ]

    def checkpoints(self, use: Use) -> list[Checkpoint | Path]:
        found: list[Checkpoint | Path] = [self._weights()]
        if self._home:
            found += sorted(p for p in self._home.iterdir() if p.suffix in NEEDED)
        return found

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.checkpoint import Weights
        from d2m_hpc.models.clip import OpenClipNet

        weights, config = self._weights(), dict(self._config)
        if self._tag.get("quick_gelu"):
            config["quick_gelu"] = True
        name = str(weights) if isinstance(weights, Path) else weights.name
        return OpenClipNet(device, Weights(use.folder), name, config, use.wanted)

    @cached_property
    def _home(self) -> Path | None:
        """The folder that the model is read from, where open_clip has it not built in."""
        return at_hand(self.model)

    @cached_property
    def _document(self) -> dict[str, Any]:
        """What open_clip keeps of a model: its architecture, and how its images are prepared."""
        home, name = self._home, self.model.replace("/", "-")
        if home is None:
            if name not in architectures():
                raise ParameterError(
                    "model", f"unknown model {name!r}{nearest(name, architectures())}"
                )
            path = _library() / "model_configs" / f"{name}.json"
            return {"model_cfg": json.loads(path.read_bytes())}
        try:
            found: dict[str, Any] = json.loads((home / "open_clip_config.json").read_bytes())
            int(found["model_cfg"]["embed_dim"])
            return found
        except (OSError, ValueError, LookupError, TypeError) as error:
            what = f"{home / 'open_clip_config.json'} cannot be used: {error}"
            raise ParameterError("model", what) from None

    @property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = self._document["model_cfg"]
        return config

    @cached_property
    def _tag(self) -> Mapping[str, Any]:
        """What open_clip's table says of the tag; nothing of a checkpoint at hand."""
        if self._home or at_hand(self.pretrained):
            return {}
        tags = pretrained().get(self.model.replace("/", "-"), {})
        found = tags.get(self.pretrained.lower().replace("-", "_"))
        if found is None and self._document:
            missing = f"unknown tag {self.pretrained!r}" if self.pretrained else "no tag is given"
            valid = nearest(self.pretrained, tags) if tags else "; the model has none"
            what = f"{missing}{valid}, or the path of a checkpoint"
            raise ParameterError("pretrained" if self.pretrained else "", what)
        return found or {}

    def _weights(self) -> Checkpoint | Path:
        """
        Raises:
            ParameterError: neither a tag nor a file.
        """
        if path := at_hand(self.pretrained):
            return path
        if self._home:
            found = [p for name in WEIGHTS for p in [self._home / name] if p.is_file()]
            if not found:
                what = f"{self._home} has none of {', '.join(WEIGHTS)}; give `pretrained`"
                raise ParameterError("model", what)
            return found[0]
        url: str = self._tag.get("url", "")
        name = url.rpartition("/")[2]
        if not name:
            raise ParameterError("pretrained", f"{self.pretrained!r} is on the hub alone")
        parts = (url.split("/")[-2], name.rpartition(".")[0].rpartition("-")[2])
        published = "".join(p for p in parts if _SHA256.fullmatch(p))
        return Checkpoint(name, url, published)

    def _image(self) -> ImageInput:
        told = {k: v for k, v in self._document.get("preprocess_cfg", {}).items() if v is not None}
        own = {
            "mean": self.image_mean,
            "std": self.image_std,
            "interpolation": self.image_interpolation,
            "resize_mode": self.image_resize_mode,
        }
        chosen = {**DEFAULTS, **told, **self._tag, **{k: v for k, v in own.items() if v}}
        return ImageInput(
            self._config["vision_cfg"].get("image_size", 224),
            chosen["resize_mode"],
            chosen["interpolation"],
            fill=chosen["fill_color"] if chosen["resize_mode"] == "longest" else 0,
            mean=chosen["mean"],
            std=chosen["std"],
        )

    def _text(self) -> OwnInput:
        text = self._config["text_cfg"]
        context, options = text.get("context_length", CONTEXT), text.get("tokenizer_kwargs", {})
        if not text.get("hf_tokenizer_name"):
            return OwnInput(
                "text", "d2m_hpc.models.tokens:of_open_clip", context=context, **options
            )
        return OwnInput(
            "text",
            "d2m_hpc.models.tokens:of_transformers",
            source=str(self._home),
            context=context,
            mode=text.get("tokenizer_mode"),
            **options,
        )
