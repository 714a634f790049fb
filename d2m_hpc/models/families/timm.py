"""Features and classes of images, by any model of timm.

timm is not imported here, as it imports torch: its tables are read as files.
"""

from __future__ import annotations

import ast
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args

from d2m_hpc.models.family import (
    Between,
    Family,
    Output,
    ParameterError,
    Use,
    at_hand,
    here,
    published,
    read_json,
)
from d2m_hpc.models.headers import shapes
from d2m_hpc.models.hub_family import kind_for, require_files
from d2m_hpc.models.inputs import LARGEST_SIDE, ImageInput, Interpolation, OwnInput, require_sides
from d2m_hpc.models.published import Checkpoint, HubRepo
from d2m_hpc.storage.texts import nearest

if TYPE_CHECKING:
    import torch

DEFAULTS: Mapping[str, Any] = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "num_classes": 1000,
    "fixed_input_size": False,
}
"""What timm takes where a model's own config does not say."""
HUB = "hf-hub:"
FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
WEIGHTS = FILES[1:]
_REGISTERED = re.compile(r"^@register_model\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


@cache
def architectures() -> Mapping[str, Path]:
    """The modules of timm by the names of the architectures that they have."""
    spec = find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise ParameterError("kind", "needs timm, which is not installed")
    folder = Path(spec.submodule_search_locations[0])
    paths = [*(folder / "models").glob("*.py")]
    return {name: p for p in paths for name in _REGISTERED.findall(p.read_text("utf-8"))}


@cache
def tables(module: Path) -> Mapping[str, Mapping[str, Any]]:
    """How the models of one of timm's modules are published, by `architecture.tag`.

    The tables are what is left when only the module's assignments, loops and functions are
    executed, and what they import of Python itself: all else needs torch. A tag that is an
    architecture's first choice may end in `*`.
    """
    table: dict[str, Mapping[str, Any]] = {}
    names: dict[str, Any] = {"generate_default_cfgs": table.update}
    exec((module.parent.parent / "data" / "constants.py").read_text("utf-8"), names)
    future = ast.parse("from __future__ import annotations").body
    for node in ast.parse(module.read_bytes()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.For | ast.FunctionDef) or (
            isinstance(node, ast.Import) and {n.name for n in node.names} <= sys.stdlib_module_names
        ):
            with suppress(Exception):  # of what needs more than the module itself
                exec(compile(ast.Module([*future, node], []), str(module), "exec"), names)
    return table


def has_weights(told: Mapping[str, Any]) -> bool:
    return bool(told.get("hf_hub_id") or told.get("url"))


def chosen(architecture: str, tag: str) -> tuple[str, Mapping[str, Any]]:
    """A model's name with its tag, and how that is published.

    Args:
        tag: where it is empty, timm's first choice is taken.

    Raises:
        ParameterError: there is none such.
    """
    if architecture not in architectures():
        valid = nearest(architecture, architectures())
        given = f"{architecture}{tag and '.'}{tag}"
        other = f"; a repository of the hub is '{HUB}{given}', a folder './{given}'"
        other = here(architecture) or (other if "/" in architecture else "")
        what = f"unknown model {architecture!r}{valid}{other}"
        raise ParameterError("model", what)
    own = {
        name: told
        for name, told in tables(architectures()[architecture]).items()
        if name.partition(".")[0] == architecture
    }
    tags = {name.partition(".")[2].rstrip("*"): told for name, told in own.items()}
    if tag in tags and (tag or has_weights(tags[tag])):
        return f"{architecture}.{tag}".rstrip("."), tags[tag]
    if tag:
        raise ParameterError("model", f"unknown tag {tag!r} of {architecture}{nearest(tag, tags)}")
    starred = [n for n, told in own.items() if n.endswith("*")]
    first = [*starred, *(n for n, told in own.items() if has_weights(told)), *own]
    return (first[0].rstrip("*").rstrip("."), own[first[0]]) if first else (architecture, {})


class Timm(Family):
    """The pooled feature of the image, and the scores of its classes, by a model of timm."""

    kind: ClassVar = "timm"
    presets: ClassVar = {
        "dinov2-b14": {"model": "hf-hub:timm/vit_base_patch14_dinov2.lvd142m"},
        "dinov2-l14": {"model": "hf-hub:timm/vit_large_patch14_dinov2.lvd142m"},
    }
    paths: ClassVar = ("model", "checkpoint")

    model: str
    """a name of timm (`vit_small_patch14_dinov2.lvd142m`), a folder that timm wrote
    (`save_for_hf`), or `hf-hub:<owner>/<name>`, a repository of the hub with such files"""
    checkpoint: str = ""
    """the path of a file in place of the published one (`.safetensors`, `.pth`), which may be one
    of a training"""
    revision: str = "main"
    """branch, tag or commit of the repository"""
    num_classes: Annotated[int, Between(0, 1 << 24)] | None = None
    """of `checkpoint`, where they are not as many as the published model's"""
    image_size: Annotated[int, Between(8, LARGEST_SIDE)] | None = None
    """side of the square to which images are resized, in place of the model's own"""

    def inputs(self, use: Use) -> list[Any]:
        told = self._data(use)
        require_sides(*told["input_size"][1:])
        return [described(told) or OwnInput("image", "d2m_hpc.models.timm_nets:images", **told)]

    def outputs(self, use: Use) -> list[Output]:
        self._weights(use)
        classes = self._told(use)["num_classes"]
        scores = [Output("label", "int64"), Output("scores", shape=(classes,))]
        return [Output("feature"), *(scores if classes else ())]

    def checkpoints(self, use: Use) -> list[Checkpoint | HubRepo | Path]:
        return [self._weights(use)]

    def check(self, use: Use, reads: Sequence[tuple[int, ...]]) -> None:
        if repo := self._repo():
            require_files("model", repo, use.folder, FILES[0], "timm", self.kind)
        name = self._published(use)[0].partition(".")[0]
        if name and name not in architectures():
            what = f"{self.model} is of an unknown architecture {name!r}"
            raise ParameterError("model", f"{what}{nearest(name, architectures())}")
        self._check_classes(use)

    def _check_classes(self, use: Use) -> None:
        """
        Raises:
            ParameterError: the file at hand has another number of classes than is said of it.
        """
        path, last = self._weights(use), self._published(use)[1].get("classifier")
        where = "checkpoint" if self.checkpoint else "model"
        if not isinstance(path, Path) or path.suffix == ".npz" or not isinstance(last, str):
            return
        try:
            found = shapes(path)
        except ValueError as error:
            raise ParameterError(where, f"{path}: {error}") from None
        wanted, name = self._told(use)["num_classes"], f"{last}.weight"
        shape = found.get(name) or found.get(f"module.{name}")
        if wanted and shape and shape[0] != wanted:
            what = f"{path} has {shape[0]} classes, and {wanted} are asked for"
            own = "give" if self.checkpoint else "write into its config.json"
            raise ParameterError(where, f"{what}; {own} `num_classes: {shape[0]}`")

    def licence(self) -> str:
        known = self.model in {preset["model"] for preset in self.presets.values()}
        return "Apache-2.0" if known and not self.checkpoint else ""

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.timm_nets import TimmNet

        name, told = self._published(use)
        weights = self._weights(use)
        path = weights if isinstance(weights, Path) else use.folder / weights.name
        if isinstance(weights, HubRepo):
            path = exported(path, weights.files) or path / FILES[1]
        given = {**told.get("model_args", {}), "num_classes": self._told(use)["num_classes"]}
        if self.image_size and self._told(use)["fixed_input_size"]:
            given["img_size"] = self.image_size
        return TimmNet(device, name, path, told.get("pretrained_cfg", told), given, use.wanted)

    def _repo(self) -> HubRepo | None:
        """The repository that the model is, where it is one."""
        name = self.model.removeprefix(HUB)
        if name == self.model:
            return None
        try:
            return HubRepo(name, self.revision, FILES)
        except ValueError as error:
            raise ParameterError("model", str(error)) from None

    def _published(self, use: Use) -> tuple[str, Mapping[str, Any]]:
        """The architecture, with its tag, and its config; nothing of a repository that is not
        fetched."""
        repo = self._repo()
        home = use.folder / repo.name if repo else at_hand(self.model)
        if home is None:
            architecture, _, tag = self.model.partition(".")
            return chosen(architecture, tag)
        path = home / FILES[0]
        if repo and not path.exists():
            return "", {}
        try:
            return _read(path)
        except OSError as error:
            what = f"{path} cannot be used: {error.strerror or error}"
            raise ParameterError("model", what) from None
        except ValueError as error:
            advice = f"; {fit}" if (fit := kind_for(home, self.kind)) else ""
            what = f"{path} holds no model of timm that can be used: {error}{advice}"
            raise ParameterError("model", what) from None

    def _told(self, use: Use) -> dict[str, Any]:
        """What a model's config says, and timm's defaults for what it leaves out."""
        _, told = self._published(use)
        given = {k: told[k] for k in DEFAULTS if told.get(k) is not None}
        found = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        if self.num_classes is not None:
            found["num_classes"] = self.num_classes
        return {**DEFAULTS, **found}

    def _data(self, use: Use) -> dict[str, Any]:
        """How images are prepared, in timm's words."""
        told = self._told(use)
        size = self.image_size
        told["input_size"] = (3, size, size) if size else told["input_size"]
        return {k: told[k] for k in DEFAULTS if k not in ("num_classes", "fixed_input_size")}

    def _weights(self, use: Use) -> Checkpoint | HubRepo | Path:
        """
        Raises:
            ParameterError: there is no such model, tag or file, or it has no weights.
        """
        name, told = self._published(use)
        if self.num_classes is not None and not self.checkpoint:
            raise ParameterError("num_classes", "is for a `checkpoint` of your own; leave it out")
        if self.checkpoint:
            found = at_hand(self.checkpoint)
            if found is None or not found.is_file():
                what = f"found {self.checkpoint!r}, which is no file; valid is the path of one"
                raise ParameterError("checkpoint", what)
            return found
        if repo := self._repo():
            return repo
        if home := at_hand(self.model):
            if (path := exported(home)) is None:
                what = f"{home} has none of {', '.join(WEIGHTS)}; give `checkpoint`"
                raise ParameterError("model", what)
            return path
        if hub := told.get("hf_hub_id"):
            file = told.get("hf_hub_filename")
            repo_id = f"timm/{name}" if hub == "timm/" else hub
            return HubRepo(repo_id, self.revision, (file,) if file else FILES)
        if not told.get("url"):
            raise ParameterError("model", f"{name} is not published; give `checkpoint`")
        return published("model", told["url"])


def _read(path: Path) -> tuple[str, Mapping[str, Any]]:
    """The architecture and the config of a `config.json` that timm wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    told = read_json(path)
    if not isinstance(told, dict) or "architecture" not in told:
        raise ValueError("it has no `architecture`")
    if not isinstance(inner := told.get("pretrained_cfg") or {}, dict):
        raise ValueError(f"`pretrained_cfg` is {inner!r}; valid is a mapping")
    found = {**told, **(inner or told)}
    found |= {"num_classes": told["num_classes"]} if "num_classes" in told else {}
    if isinstance(size := found.get("input_size"), list) and size[:1] not in ([], [3]):
        raise ValueError(f"its net takes pictures of {size[0]} channels; valid are 3")
    for key, default in DEFAULTS.items():
        valid = (int, float) if isinstance(default, float) else (type(default), list)
        value: Any = found.get(key)
        if value is None:
            continue
        is_kind = isinstance(value, valid)
        if not is_kind or (isinstance(default, tuple) and len(value) != len(default)):
            raise ValueError(f"`{key}` is {value!r}; valid is for example {default!r}")
    return str(told["architecture"]), found


def exported(folder: Path, names: tuple[str, ...] = WEIGHTS) -> Path | None:
    """The weights in a folder."""
    found = (folder / name for name in names if not name.endswith(".json"))
    return next((path for path in found if path.is_file()), None)


def described(told: Mapping[str, Any]) -> ImageInput | None:
    """How timm prepares images, where an `ImageInput` can say the same.

    Args:
        told: as `timm.data.resolve_data_config` gives it.
    """
    (_, height, width), part = told["input_size"], told["crop_pct"]
    if (how := told["interpolation"]) not in get_args(Interpolation):
        raise ValueError(f"interpolation {how!r}; valid: {', '.join(get_args(Interpolation))}")
    if not part > 0:
        raise ValueError(f"crop_pct {part}; valid is a share above 0")
    mode = told["crop_mode"]
    if part > 1 or not (height == width or part == 1):
        return None
    if (mode == "squash" and part != 1) or mode == "border":
        return None
    return ImageInput(
        (height, width),
        "squash" if mode == "squash" else "shortest",
        how,
        short=0 if mode == "squash" or height != width else math.floor(height / part),
        mean=told["mean"],
        std=told["std"],
    )
