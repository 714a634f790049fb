"""Every CLIP-like model that open_clip knows, or that was trained with it.

open_clip is not imported here, as it imports torch: its tables are read as files.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from d2m_hpc.models.family import (
    NO_REVISION,
    Colour,
    Family,
    Output,
    ParameterError,
    Use,
    at_hand,
    file_at_hand,
    here,
    read_json,
)
from d2m_hpc.models.headers import shapes
from d2m_hpc.models.hub_family import require_files
from d2m_hpc.models.inputs import CLIP_MEAN, CLIP_STD, ImageInput, OwnInput
from d2m_hpc.models.published import Checkpoint, HubRepo
from d2m_hpc.storage.texts import nearest

if TYPE_CHECKING:
    import torch

CONTEXT = 77
"""Tokens of a text where a model's own config does not say."""
LONGEST = 131_072
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
HUB = "hf-hub:"
OPENAI = "//openaipublic.azureedge.net/"
"""In the addresses of OpenAI's own checkpoints."""
CONFIG = "open_clip_config.json"
EXPORTED = ("open_clip_*model.safetensors", "open_clip_*model.bin")
TOKENIZER = (
    *("config.json", "*tokenizer*", "*vocab*", "merges.txt", "*.model"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_SHA256 = re.compile("[0-9a-f]{64}|[0-9a-f]{8}")
_APPLE = "Apple's for research (apple-amlr)"
LICENCES: Mapping[str, str] = {
    "webli": "Apache-2.0",
    "dfn5b": _APPLE,
    "metaclip_fullcc": "CC-BY-NC-4.0",
    "datacompdr": _APPLE,
}
"""Of checkpoints by tag, as their pages on the hub name them."""


@cache
def _library() -> Path:
    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ParameterError("kind", "needs open_clip_torch, which is not installed")
    return Path(spec.submodule_search_locations[0])


@cache
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


def exported(folder: Path) -> Path | None:
    """The weights of a model that open_clip has exported."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    """An `open_clip_config.json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it lacks what a model needs.
    """
    found: dict[str, Any] = read_json(path)
    config = found.get("model_cfg") if isinstance(found, dict) else None
    if not isinstance(config, dict):
        raise ValueError("it has no mapping `model_cfg`")
    for key in ("text_cfg", "vision_cfg"):
        if not isinstance(config.get(key), dict):
            raise ValueError(f"its `model_cfg` has no mapping `{key}`")
    if type(width := config.get("embed_dim")) is not int:
        raise ValueError(f"`embed_dim` of its `model_cfg` is {width!r}; valid is a whole number")
    if not isinstance(found.setdefault("preprocess_cfg", {}) or {}, dict):
        raise ValueError("its `preprocess_cfg` is no mapping")
    return found


def merged(needs: Iterable[Checkpoint | HubRepo | Path]) -> list[Checkpoint | HubRepo | Path]:
    """With one entry a repository, which has the files of all of them."""
    found: dict[str, Checkpoint | HubRepo | Path] = {}
    for need in needs:
        name = str(need) if isinstance(need, Path) else need.name
        if isinstance(need, HubRepo) and isinstance(known := found.get(name), HubRepo):
            need = replace(need, files=tuple(dict.fromkeys((*known.files, *need.files))))
        found[name] = need
    return list(found.values())


class OpenClip(Family):
    """Features of image and text, and their cosine, by a model of open_clip.

    The tag's own activation is used: `ViT-B-32` with `openai` has QuickGELU, as it was trained
    with, and as open_clip has it under the name `ViT-B-32-quickgelu`.
    """

    kind: ClassVar = "open_clip"
    presets: ClassVar = {  # no hash of them is published; `d2m weights` locks what was fetched
        "siglip2-b16-224": {"model": "ViT-B-16-SigLIP2", "pretrained": "webli"},
        "siglip2-so400m14-378": {"model": "ViT-SO400M-14-SigLIP2-378", "pretrained": "webli"},
        "dfn5b-h14-224": {"model": "ViT-H-14-quickgelu", "pretrained": "dfn5b"},
        "dfn5b-h14-378": {"model": "ViT-H-14-378-quickgelu", "pretrained": "dfn5b"},
        "metaclip-h14": {"model": "ViT-H-14-quickgelu", "pretrained": "metaclip_fullcc"},
        "eva02-l14": {"model": "EVA02-L-14", "pretrained": "merged2b_s4b_b131k"},
        "mobileclip-s2": {"model": "MobileCLIP-S2", "pretrained": "datacompdr"},
    }
    on_host: ClassVar = ("text",)
    paths: ClassVar = ("model", "pretrained")

    model: str
    """a name that `open_clip.list_models()` has; a folder with an `open_clip_config.json`; or
    `hf-hub:<owner>/<name>`, a repository of the hub with one"""
    pretrained: str = ""
    """a tag that `open_clip.list_pretrained()` has for the model, or the path of a checkpoint,
    which may be one of a training (`.pt`, `.bin`, `.safetensors`, `.npz`)"""
    revision: str = "main"
    """branch, tag or commit of an `hf-hub:` model"""
    image_mean: Colour | None = None
    """of pixels in [0, 1], in place of the tag's"""
    image_std: Colour | None = None
    """in place of the tag's"""
    image_interpolation: Literal["bicubic", "bilinear"] | None = None
    """in place of the tag's"""
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """in place of the tag's"""

    def inputs(self, use: Use) -> list[Any]:
        needed = {"image": self._image, "text": self._text}
        return [make(use) for kind, make in needed.items() if use.wanted & {kind, "score"}]

    def outputs(self, use: Use) -> list[Output]:
        self._weights(use)
        width = self._config(use).get("embed_dim")
        shape = (width,) if width else ()  # not known before the repository is fetched
        dot = {"i": "image", "j": "text"}
        return [
            Output("score", "float32", function="batched_dot_product_index", options=dot),
            Output("image", shape=shape, of_text=False),
            Output("text", shape=shape),
        ]

    def checkpoints(self, use: Use) -> list[Checkpoint | HubRepo | Path]:
        found: list[Checkpoint | HubRepo | Path] = [self._weights(use)]
        text = self._config(use).get("text_cfg", {})
        if use.wanted & {"text", "score"}:
            found += self._tokenizer(use, text)
        if name := text.get("hf_model_name"):
            found += [] if at_hand(name) else [HubRepo(name, files=("config.json",))]
        if home := at_hand(self.model):
            found += sorted(p for p in home.iterdir() if p.suffix in NEEDED)
        return merged(found)

    def check(self, use: Use, reads: Sequence[tuple[int, ...]]) -> None:
        if repo := self._repo():
            require_files("model", repo, use.folder, CONFIG, "open_clip", self.kind)
        home = at_hand(self.model)
        told = home and self._config(use).get("text_cfg", {}).get("hf_tokenizer_name")
        if home and told and use.wanted & {"text", "score"} and not any(home.glob("*token*")):
            what = f"{home} has no tokenizer (tokenizer.json) of {told}; save it there too"
            raise ParameterError("model", what)
        path = self._weights(use)
        if isinstance(path, Path) and path.is_file() and path.suffix != ".npz":
            self._check_weights(path, self._config(use))

    def _check_weights(self, path: Path, config: Mapping[str, Any]) -> None:
        """
        Raises:
            ParameterError: the file at hand is of no CLIP, or of one that has other features.
        """
        where, width = "pretrained" if self.pretrained else "model", config["embed_dim"]
        try:
            found = {n.removeprefix("module."): shape for n, shape in shapes(path).items()}
        except ValueError as error:
            raise ParameterError(where, f"{path}: {error}") from None
        if found and "logit_scale" not in found:
            what = f"{path} holds no CLIP, which has a `logit_scale`, but {', '.join([*found][:4])}"
            raise ParameterError(where, what)
        for name in ("visual.proj", "text_projection"):
            if len(shape := found.get(name, ())) == 2 and shape[1] != width:
                what = f"{path} has features of {shape[1]} values, and by its config of {width}"
                raise ParameterError(where, f"{what}; give the model that it is of")

    def licence(self) -> str:
        return LICENCES.get(self.pretrained, "")

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.checkpoint import Weights
        from d2m_hpc.models.clip import OpenClipNet

        config = self._config(use)
        if self._tag().get("quick_gelu"):
            config["quick_gelu"] = True
        text = config["text_cfg"]
        if (name := text.get("hf_model_name")) and not at_hand(name):
            text["hf_model_name"] = str(use.folder / HubRepo(name).name)
        weights = self._weights(use)
        path = weights if isinstance(weights, Path) else use.folder / weights.name
        if isinstance(weights, HubRepo):
            path = exported(path) or path / weights.files[0]
        is_openais = isinstance(weights, Checkpoint) and OPENAI in weights.url
        told = None if is_openais else config
        return OpenClipNet(device, Weights(use.folder), str(path), told, use.wanted)

    def _repo(self) -> HubRepo | None:
        """The repository that the model is, where it is one."""
        name = self.model.removeprefix(HUB)
        if name == self.model:
            if self.revision != "main":
                raise ParameterError("revision", NO_REVISION)
            return None
        try:
            return HubRepo(name, self.revision, (CONFIG, *EXPORTED, *TOKENIZER))
        except ValueError as error:
            raise ParameterError("model", str(error)) from None

    def _home(self, use: Use) -> Path | None:
        """The folder that the model is read from, where open_clip has it not built in."""
        repo = self._repo()
        return use.folder / repo.name if repo else at_hand(self.model)

    def _document(self, use: Use) -> dict[str, Any]:
        """What is kept of a model: its architecture, and how its images are prepared.

        Nothing of a repository that is not fetched.
        """
        home, name = self._home(use), self.model.replace("/", "-")
        if home is None:
            if name not in architectures():
                near = nearest(name, architectures())
                other = (
                    f"; a repository of the hub is '{HUB}{self.model}', a folder './{self.model}'"
                )
                other = here(self.model) or (other if "/" in self.model else "")
                raise ParameterError("model", f"unknown model {self.model!r}{near}{other}")
            path = _library() / "model_configs" / f"{name}.json"
            return {"model_cfg": read_json(path)}
        if self._repo() and not (home / CONFIG).exists():
            return {"model_cfg": {}}
        try:
            return _read(home / CONFIG)
        except OSError as error:
            what = f"{home / CONFIG}: {error.strerror}; valid is a folder with a model of open_clip"
            raise ParameterError("model", what) from None
        except ValueError as error:
            what = f"{home / CONFIG} holds no model of open_clip: {error}"
            raise ParameterError("model", what) from None

    def _config(self, use: Use) -> dict[str, Any]:
        config: dict[str, Any] = self._document(use)["model_cfg"]
        return config

    def _tag(self) -> Mapping[str, Any]:
        """What open_clip's table says of the tag; nothing of other checkpoints."""
        if self._repo() or at_hand(self.model) or at_hand(self.pretrained):
            return {}
        tags = pretrained().get(self.model.replace("/", "-"), {})
        found = tags.get(self.pretrained.lower().replace("-", "_"))
        if found is None:
            given = f"unknown tag {self.pretrained!r}" if self.pretrained else "no tag is given"
            what = f"{given}{nearest(self.pretrained, tags)}, or the path of a checkpoint"
            raise ParameterError("pretrained" if self.pretrained else "", what)
        return found

    def _weights(self, use: Use) -> Checkpoint | HubRepo | Path:
        """
        Raises:
            ParameterError: there is no such model, tag or file.
        """
        self._document(use)
        if path := file_at_hand("pretrained", self.pretrained):
            return path
        if self.pretrained and self._home(use):
            what = f"found {self.pretrained!r}, which names no file, and the model is none of "
            advice = "open_clip's own, which have tags; valid is the path of a checkpoint, or none"
            raise ParameterError("pretrained", f"{what}{advice}")
        if repo := self._repo():
            return repo
        if home := at_hand(self.model):
            if (path := exported(home)) is None:
                what = f"{home} has none of {', '.join(WEIGHTS)}; give `pretrained`"
                raise ParameterError("model", what)
            return path
        tag = self._tag()
        url = tag.get("url", "")
        if not url:
            repo_id, _, file = tag["hf_hub"].rpartition("/")
            return HubRepo(repo_id, files=(file,) if file else EXPORTED)
        folder, name = url.split("/")[-2:]
        parts = (folder, name.rpartition(".")[0].rpartition("-")[2])
        return Checkpoint(name, url, next((p for p in parts if _SHA256.fullmatch(p)), ""))

    def _image(self, use: Use) -> ImageInput:
        document = self._document(use)
        own = {
            "mean": self.image_mean,
            "std": self.image_std,
            "interpolation": self.image_interpolation,
            "resize_mode": self.image_resize_mode,
        }
        chosen = dict(DEFAULTS)
        for told in (document.get("preprocess_cfg") or {}, self._tag(), own):
            chosen |= {key: value for key, value in told.items() if value is not None}
        return ImageInput(
            document["model_cfg"].get("vision_cfg", {}).get("image_size", 224),
            chosen["resize_mode"],
            chosen["interpolation"],
            fill=chosen["fill_color"] if chosen["resize_mode"] == "longest" else 0,
            mean=chosen["mean"],
            std=chosen["std"],
        )

    def _tokenizer(self, use: Use, text: Mapping[str, Any]) -> list[HubRepo]:
        """The repository of the model's tokenizer, where it has one."""
        name = text.get("hf_tokenizer_name")
        if not name or at_hand(self.model):
            return []
        repo = self._repo()
        return [
            HubRepo(name, self.revision if repo and repo.repo_id == name else "main", TOKENIZER)
        ]

    def _text(self, use: Use) -> OwnInput:
        text = self._config(use).get("text_cfg", {})
        context, options = text.get("context_length", CONTEXT), text.get("tokenizer_kwargs", {})
        if not isinstance(options, dict):
            raise ParameterError("model", f"tokenizer_kwargs {options!r}; valid is a mapping")
        if type(context) is not int or not 1 <= context <= LONGEST:
            raise ParameterError(
                "model", f"a context_length of {context!r}; valid is 1 to {LONGEST}"
            )
        if not text.get("hf_tokenizer_name"):
            made_by = "d2m_hpc.models.tokens:of_open_clip"
            return OwnInput("text", made_by, context=context, **options)
        repos = self._tokenizer(use, text)
        return OwnInput(
            "text",
            "d2m_hpc.models.tokens:of_transformers",
            source=str(use.folder / repos[0].name if repos else self._home(use)),
            context=context,
            tokenizer_mode=text.get("tokenizer_mode"),
            **options,
        )
