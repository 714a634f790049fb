"""Names to models, preprocessors and postprocessors; those of a custom file come on top.

Nothing here imports torch: the login node checks a config with the same tables that a task runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

from d2m_hpc.models.published import Checkpoint, HubRepo

RAW_INPUTS = ("image", "text", "json")


@dataclass(frozen=True)
class ModelSpec:
    """What the graph and the loader must know of a model before it is built.

    Attributes:
        raw_inputs, preprocessors: pairwise, the inputs of `forward`.
        dependencies: models whose outputs follow as further inputs of `forward`.
        to_device: move the inputs to the model's device.
        on_host: preprocessors whose inputs stay on the host even so; the model sends their parts.
        target: `module:class` of a built-in model; empty for one of a custom file.
        checkpoints: what it needs: files, hub repositories, and names that `models.weights` knows.
        files: paths of the files and folders that a custom class declares as its checkpoints.
    """

    name: str
    raw_inputs: tuple[str, ...] = ()
    preprocessors: tuple[str, ...] = ()
    dependencies: tuple[str, ...] = ()
    to_device: bool = True
    on_host: tuple[str, ...] = ()
    target: str = ""
    checkpoints: tuple[str | Checkpoint | HubRepo, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """The distinct (raw input, preprocessor) pairs, in the order of `forward`."""
        return tuple(zip(self.raw_inputs, self.preprocessors, strict=True))


@dataclass(frozen=True)
class Post:
    """A column or feature: a function of `models.postprocessors` applied to a model's output.

    Attributes:
        model: empty where the code of a custom file may read any.
        type: of a column, in the words of `models.types`; empty where it is not declared.
        shape: of a feature's row, likewise.
    """

    model: str = ""
    function: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    type: str = ""
    shape: tuple[int, ...] = ()


_IMAGE_TEXT: dict[str, Any] = {
    "raw_inputs": ("image", "text"),
    "preprocessors": ("clip-aug", "clip-tokens"),
    "on_host": ("clip-tokens",),
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
            target="stats:ImageStats",
        ),
        ModelSpec(
            "text-stats",
            raw_inputs=("text",),
            preprocessors=("identity",),
            to_device=False,
            target="stats:TextStats",
        ),
    )
}

PREPROCESSORS = frozenset(
    {"clip-aug", "clip-tokens", "faces-aug", "dedup-aug", "stats-aug", "identity"}
)


def _score(model: str, function: str = "identity") -> Post:
    return Post(model, function, type="float32")


def _column(model: str, index: int, kind: str = "float32") -> Post:
    return Post(model, "select", {"index": index}, type=kind)


def _vector(model: str, index: int, width: int) -> Post:
    return Post(model, "select", {"index": index}, shape=(width,))


def _fields(model: str, prefix: str, **kinds: str) -> dict[str, Post]:
    names = (name.replace("_", "-") for name in kinds)
    return {
        f"{prefix}-{name}": _column(model, i, kind)
        for i, (name, kind) in enumerate(zip(names, kinds.values(), strict=True))
    }


COLUMNS: Mapping[str, Post] = {
    "oai-clip-vit-b32-score": _score("oai-clip-vit-b32", "batched_dot_product"),
    "oai-clip-vit-l14-score": _score("oai-clip-vit-l14", "batched_dot_product"),
    "nsfw-detoxify-score": _score("nsfw-detoxify"),
    "nsfw-image-score": _score("nsfw-image-oai-clip-vit-l-14"),
    "face-boxes": Post("faces-scrfd10g", "identity", {"to_cpu": False}, type="list<list<float32>>"),
    "dedup-isc-ft-v107-score": _column("dedup-isc-ft-v107", 1),
    **_fields(
        "image-stats",
        "image",
        brightness="float32",
        contrast="float32",
        sharpness="float32",
        entropy="float32",
        phash="string",
    ),
    **_fields(
        "text-stats",
        "text",
        characters="int64",
        words="int64",
        alphanumeric_ratio="float32",
        uppercase_ratio="float32",
        digit_ratio="float32",
        unique_word_ratio="float32",
    ),
}

FEATURES: Mapping[str, Post] = {
    "oai-clip-vit-b32-image": _vector("oai-clip-vit-b32", 0, 512),
    "oai-clip-vit-b32-text": _vector("oai-clip-vit-b32", 1, 512),
    "oai-clip-vit-l14-image": _vector("oai-clip-vit-l14", 0, 768),
    "oai-clip-vit-l14-text": _vector("oai-clip-vit-l14", 1, 768),
    "dedup-isc-ft-v107-image": _vector("dedup-isc-ft-v107", 0, 256),
    "image-histogram": _vector("image-stats", 5, 48),
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
    own: frozenset[str] = frozenset()
    """The names that a custom file gives, of all kinds; they go before built-in ones."""

    def specs(self, names: Iterable[str]) -> dict[str, ModelSpec]:
        """Of the models that are known."""
        return {name: self.models[name] for name in names if name in self.models}


LOOKUPS = (
    "model_lookup",
    "preprocessor_lookup",
    "postprocess_parquet_lookup",
    "postprocess_feature_lookup",
)


def in_order(specs: Mapping[str, ModelSpec]) -> list[str]:
    """The models' names so that each stands after its dependencies.

    Raises:
        graphlib.CycleError: the dependencies form a circle.
    """
    order = TopologicalSorter({s.name: s.dependencies for s in specs.values()}).static_order()
    return [name for name in order if name in specs]
