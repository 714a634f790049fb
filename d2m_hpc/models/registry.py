"""Names to models, preprocessors and postprocessors; the user's custom file is merged in.

Nothing here imports torch: the login node checks a config with the same tables that a task runs.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

RAW_INPUTS = ("image", "text", "json")


@dataclass(frozen=True)
class ModelSpec:
    """What the graph and the loader must know of a model before it is built.

    Attributes:
        raw_inputs, preprocessors: pairwise, the inputs of `forward`.
        dependencies: models whose outputs follow as further inputs of `forward`.
        to_device: move the inputs to the model's device.
        target: `module:class` of a built-in model; empty for one of a custom file.
        checkpoints: names of the files it needs, as `models.weights` knows them.
    """

    name: str
    raw_inputs: tuple[str, ...] = ()
    preprocessors: tuple[str, ...] = ()
    dependencies: tuple[str, ...] = ()
    to_device: bool = True
    target: str = ""
    checkpoints: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """The distinct (raw input, preprocessor) pairs, in the order of `forward`."""
        return tuple(zip(self.raw_inputs, self.preprocessors, strict=True))


@dataclass(frozen=True)
class Post:
    """A column or feature: a function of `models.postprocessors` applied to a model's output.

    `model` is empty where a custom file does not say it as a literal.
    """

    model: str = ""
    function: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


_IMAGE_TEXT: dict[str, Any] = {
    "raw_inputs": ("image", "text"),
    "preprocessors": ("clip-aug", "clip-tokens"),
}

MODELS: Mapping[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "oai-clip-vit-b32",
            **_IMAGE_TEXT,
            target="clip:ClipB32",
            checkpoints=("ViT-B-32.pt",),
        ),
        ModelSpec(
            "oai-clip-vit-l14",
            **_IMAGE_TEXT,
            target="clip:ClipL14",
            checkpoints=("ViT-L-14.pt",),
        ),
        ModelSpec(
            "nsfw-detoxify",
            raw_inputs=("text",),
            preprocessors=("identity",),
            to_device=False,
            target="toxicity:Detoxify",
            checkpoints=(
                "multilingual_debiased-0b549669.ckpt",
                "xlm-roberta-base/config.json",
                "xlm-roberta-base/tokenizer.json",
                "xlm-roberta-base/tokenizer_config.json",
            ),
        ),
        ModelSpec(
            "nsfw-image-oai-clip-vit-l-14",
            dependencies=("oai-clip-vit-l14",),
            target="nsfw:NsfwImage",
            checkpoints=("nsfw_torch.pt",),
        ),
        ModelSpec(
            "faces-scrfd10g",
            raw_inputs=("image",),
            preprocessors=("faces-aug",),
            target="faces:Scrfd10G",
            checkpoints=("scrfd_10g.pt",),
        ),
        ModelSpec(
            "dedup-isc-ft-v107",
            raw_inputs=("image",),
            preprocessors=("dedup-aug",),
            target="dedup:IscFtV107",
            checkpoints=("isc_ft_v107.pth.tar", "eval_dedup_embeddings.pt"),
        ),
        ModelSpec(
            "image-stats",
            raw_inputs=("image",),
            preprocessors=("stats-aug",),
            target="basic:ImageStats",
        ),
        ModelSpec(
            "text-stats",
            raw_inputs=("text",),
            preprocessors=("identity",),
            to_device=False,
            target="basic:TextStats",
        ),
    )
}

PREPROCESSORS = frozenset(
    {"clip-aug", "clip-tokens", "faces-aug", "dedup-aug", "stats-aug", "identity"}
)


def _select(model: str, index: int) -> Post:
    return Post(model, "select", {"index": index})


def _fields(model: str, prefix: str, *names: str) -> dict[str, Post]:
    return {f"{prefix}-{name}": _select(model, i) for i, name in enumerate(names)}


COLUMNS: Mapping[str, Post] = {
    "oai-clip-vit-b32-score": Post("oai-clip-vit-b32", "batched_dot_product"),
    "oai-clip-vit-l14-score": Post("oai-clip-vit-l14", "batched_dot_product"),
    "nsfw-detoxify-score": Post("nsfw-detoxify", "identity"),
    "nsfw-image-score": Post("nsfw-image-oai-clip-vit-l-14", "identity"),
    "face-boxes": Post("faces-scrfd10g", "identity", {"to_cpu": False}),
    "dedup-isc-ft-v107-score": _select("dedup-isc-ft-v107", 1),
    **_fields("image-stats", "image", "brightness", "contrast", "sharpness", "entropy", "phash"),
    **_fields(
        "text-stats",
        "text",
        "characters",
        "words",
        "alphanumeric-ratio",
        "uppercase-ratio",
        "digit-ratio",
        "unique-word-ratio",
    ),
}

FEATURES: Mapping[str, Post] = {
    "oai-clip-vit-b32-image": _select("oai-clip-vit-b32", 0),
    "oai-clip-vit-b32-text": _select("oai-clip-vit-b32", 1),
    "oai-clip-vit-l14-image": _select("oai-clip-vit-l14", 0),
    "oai-clip-vit-l14-text": _select("oai-clip-vit-l14", 1),
    "dedup-isc-ft-v107-image": _select("dedup-isc-ft-v107", 0),
    "image-histogram": _select("image-stats", 5),
}

DATACOMP_KEYS: Mapping[str, str] = {
    "oai-clip-vit-b32-score": "clip_b32_similarity_score",
    "oai-clip-vit-l14-score": "clip_l14_similarity_score",
    "face-boxes": "face_bboxes",
    "dedup-isc-ft-v107-score": "dedup",
    "oai-clip-vit-b32-image": "b32_img",
    "oai-clip-vit-b32-text": "b32_txt",
    "oai-clip-vit-l14-image": "l14_img",
    "oai-clip-vit-l14-text": "l14_txt",
}
"""The names that DataComp's tools read, with `use_datacomp_keys`."""


@dataclass(frozen=True)
class Registry:
    """All names that a config may use."""

    models: Mapping[str, ModelSpec] = field(default_factory=lambda: MODELS)
    columns: Mapping[str, Post] = field(default_factory=lambda: COLUMNS)
    features: Mapping[str, Post] = field(default_factory=lambda: FEATURES)
    preprocessors: frozenset[str] = PREPROCESSORS
    complete: bool = True
    """False when a custom file builds its tables in a way that only running it can tell."""

    @classmethod
    def with_custom(cls, path: Path | None) -> Registry:
        """The built-in names and those that a custom file declares, read without running it.

        Raises:
            OSError, SyntaxError: the file cannot be read or parsed.
        """
        return cls() if path is None else _merge(_CustomFile(path))


LOOKUPS = (
    "model_lookup",
    "preprocessor_lookup",
    "postprocess_parquet_lookup",
    "postprocess_feature_lookup",
)


STATIC_FIELDS = ("raw_inputs", "preprocessors", "dependencies", "to_device")


class _CustomFile:
    """A custom file's lookup tables and its classes' static fields, by its syntax tree."""

    def __init__(self, path: Path) -> None:
        tree = ast.parse(path.read_bytes(), filename=str(path))
        self.classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
        self.assigned = dict(_assignments(tree.body))
        mentions = Counter(_mentions(tree))
        # A lookup that is mentioned elsewhere may be changed or made there.
        plain = all(mentions[n] == (self.table(n) is not None) for n in LOOKUPS)
        models = (self.table("model_lookup") or {}).values()
        self.complete = (
            plain and "*" not in mentions and all(self._static(m) is not None for m in models)
        )

    def table(self, name: str) -> dict[str, ast.expr] | None:
        """A lookup's entries; None when it is not a plain dict of string keys."""
        node = self.assigned.get(name)
        if not isinstance(node, ast.Dict):
            return None
        keys = [k.value if isinstance(k, ast.Constant) else None for k in node.keys]
        if not all(isinstance(k, str) for k in keys):
            return None
        return dict(zip((str(k) for k in keys), node.values, strict=True))

    def model(self, name: str, value: ast.expr) -> ModelSpec:
        static = self._static(value) or {}
        return ModelSpec(
            name,
            raw_inputs=tuple(static.get("raw_inputs") or ()),
            preprocessors=tuple(static.get("preprocessors") or ()),
            dependencies=tuple(static.get("dependencies") or ()),
            to_device=bool(static.get("to_device", True)),
        )

    def _static(self, value: ast.expr) -> dict[str, Any] | None:
        """A class's static fields, inherited ones included; None when one is not a literal."""
        node = self.classes.get(value.id) if isinstance(value, ast.Name) else None
        if node is None:
            return {}
        found: dict[str, Any] = {}
        for base in reversed(node.bases):
            inherited = self._static(base)
            if inherited is None:
                return None
            found |= inherited
        try:
            own = [(k, v) for k, v in _assignments(node.body) if k in STATIC_FIELDS]
            return found | {k: ast.literal_eval(v) for k, v in own}
        except ValueError:
            return None

    def posts(self, lookup: str) -> dict[str, Post]:
        return {k: Post(_keyword(v, "model")) for k, v in (self.table(lookup) or {}).items()}


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """Names that are assigned to one by one, annotated or not, and their values."""
    for node in body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and value is not None:
                yield target.id, value


def _mentions(tree: ast.Module) -> Iterator[str]:
    """Every name that the file uses or imports, each time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.asname or node.name


def _keyword(node: ast.expr, name: str) -> str:
    """The string given as a keyword argument of a call, or an empty one."""
    for keyword in node.keywords if isinstance(node, ast.Call) else ():
        if keyword.arg == name and isinstance(keyword.value, ast.Constant):
            return str(keyword.value.value)
    return ""


def _merge(custom: _CustomFile) -> Registry:
    models = {k: custom.model(k, v) for k, v in (custom.table("model_lookup") or {}).items()}
    return Registry(
        models={**MODELS, **models},
        columns={**COLUMNS, **custom.posts("postprocess_parquet_lookup")},
        features={**FEATURES, **custom.posts("postprocess_feature_lookup")},
        preprocessors=PREPROCESSORS | (custom.table("preprocessor_lookup") or {}).keys(),
        complete=custom.complete,
    )


def in_order(specs: Mapping[str, ModelSpec]) -> list[str]:
    """The models' names so that each stands after its dependencies.

    Raises:
        graphlib.CycleError: the dependencies form a circle.
    """
    order = TopologicalSorter({s.name: s.dependencies for s in specs.values()}).static_order()
    return [name for name in order if name in specs]
