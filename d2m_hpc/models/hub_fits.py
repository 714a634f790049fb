"""What does not fit together in the files of a checkpoint of transformers, told without torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from d2m_hpc.models.family import read_json, shipped_by
from d2m_hpc.models.headers import Axes, shapes
from d2m_hpc.models.hub_images import class_of, sides
from d2m_hpc.storage.texts import nearest

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The files of weights that transformers takes, or an index of the files in its place."""
TABLES = {
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "text-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "text-embedding": "MODEL_MAPPING_NAMES",
    "image-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
"""Which of transformers' tables has the nets that a family computes with, by its kind."""
READERS = tuple(
    f"MODEL_FOR_{name}_MAPPING_NAMES"
    for name in ("TEXT_ENCODING", "MASKED_LM", "CAUSAL_LM", "SEQUENCE_CLASSIFICATION")
)
"""Tables of the nets that give a last layer for texts alone: not CLIP, which wants a picture."""
ENCODERS = ("longt5", "switch_transformers")
"""Further ones, of whose nets the encoders are taken."""
PLACES = {
    "blip": 384,
    **dict.fromkeys(("blip-2", "clip", "deit", "git", "ijepa", "metaclip_2"), 224),
    **dict.fromkeys(("siglip", "siglip_vision_model", "vit", "vit_msn"), 224),
}
"""Nets that take pictures of one size alone, and its side where their config does not say."""
LAST = re.compile(
    r"((cls_|distillation_)?classifier(\.1|\.linear|\.out_proj)?|classification_head\.out_proj"
    r"|score)\.(weight|bias)"
)
"""Tensors that have a row for each label."""


@cache
def _auto(module: str) -> str:
    """The text of one of transformers' modules that tell which class is whose; empty where it is
    not installed so."""
    folder = shipped_by("transformers")
    path = folder / "models" / "auto" / f"{module}.py" if folder else Path("none")
    return path.read_text("utf-8") if path.is_file() else ""


def types(kind: str) -> frozenset[str]:
    """The model types for which transformers has nets of a family's kind; none if unknown."""
    return frozenset(_table(TABLES.get(kind, "-")))


@cache
def _table(name: str) -> dict[str, Any]:
    """One of transformers' tables: the names of nets by model types; empty if unknown."""
    table = re.search(rf"^{name} = .*?^\)", _auto("modeling_auto"), re.M | re.S)
    with suppress(Exception):  # of a table that another version writes otherwise
        [made] = ast.parse(table[0] if table else "").body
        return dict(ast.literal_eval(made.value.args[0]))  # type: ignore[attr-defined]
    return {}


def misfits(
    home: Path,
    names: Collection[str],
    config: Mapping[str, Any],
    kind: str,
    labels: int,
    images: Mapping[str, Any],
) -> Iterator[str]:
    """
    Args:
        names: of the files in the folder, those included that are not fetched yet.
        config: the content of its config.json.
        kind: of the family that takes the checkpoint.
        labels: how many the family takes the net to have; 0 for none.
        images: the config of the processor of pictures; empty if none is needed.
    """
    yield from _unknown(home, config, kind, images)
    yield from _unfit_sides(home, config, images)
    taken = (name for n in WEIGHTS for name in (n, f"{n}.index.json"))
    first = next((name for name in taken if name in names), "")
    if not first and not config.get("transformers_weights"):
        yield f"{home} has no file of weights ({WEIGHTS[0]})"
    files, wrong = [first], ""
    if first.endswith(".json"):
        files, wrong = _indexed(home / first, names) if (home / first).is_file() else ([], "")
    if wrong:
        yield wrong
    if labels:
        yield from _unfit_labels(home, config, labels, files)


def _unknown(
    home: Path, config: Mapping[str, Any], kind: str, images: Mapping[str, Any]
) -> Iterator[str]:
    """Of names that transformers does not have."""
    model, known = str(config.get("model_type", "")), types(kind)
    if model and known and model not in known:
        what = f"{home}/config.json: transformers has no net for {kind} of the model_type {model!r}"
        own = "; code of a repository (auto_map) is not run; a custom file can compute with it"
        yield f"{what}{own if config.get('auto_map') else nearest(model, known)}"
    elif known and kind == "text-embedding" and model not in ENCODERS:
        readers = [table for name in READERS if (table := _table(name))]
        if readers and not any(model in table for table in readers):
            built = config.get("architectures") or [_table(TABLES[kind])[model]]
            valid = "valid is a net that reads texts alone, as BertModel, T5EncoderModel"
            yield f"{home}/config.json is of a {built[0]}; {valid} and CLIPTextModel do"
    made, text = re.sub("(Fast|Pil)$", "", class_of(images)), _auto("auto_mappings")
    made = made.replace("FeatureExtractor", "ImageProcessor")
    if made and text and f'"{made}' not in text + _auto("image_processing_auto"):
        yield f"{home}: transformers has no image processor {class_of(images)!r}"


def _unfit_sides(home: Path, config: Mapping[str, Any], images: Mapping[str, Any]) -> Iterator[str]:
    kind, inner = str(config.get("model_type")), config.get("vision_config")
    told = inner if isinstance(inner, dict) else config
    side, given = told.get("image_size", PLACES.get(kind)), sides(images)
    wanted = (side, side) if isinstance(side, int) else side
    if kind in PLACES and given and isinstance(wanted, tuple | list) and given != (*wanted,):
        what = f"{home}: its processor makes pictures of {given[1]} x {given[0]} pixels"
        yield f"{what}, and image_size in config.json is {side}; give both the same"
    if images and (channels := told.get("num_channels", 3)) != 3:
        yield f"{home}/config.json: num_channels is {channels}; valid is 3, of pictures in colour"


def _indexed(path: Path, names: Collection[str]) -> tuple[list[str], str]:
    """The files that an index of weights names, and what is wrong with it."""
    try:
        found = sorted({*read_json(path)["weight_map"].values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return [], f"{path} names no files of weights (`weight_map`); copy or fetch it again"
    if missing := [str(name) for name in found if name not in names]:
        what = f"{path.parent} has no {', '.join(missing[:4])}, and {path.name} names it"
        return [], f"{what}; copy all files of the checkpoint"
    return found, ""


def _unfit_labels(
    home: Path, config: Mapping[str, Any], labels: int, files: list[str]
) -> Iterator[str]:
    number = config.get("num_labels")
    if number not in (None, labels):
        yield f"{home}/config.json: num_labels is {number}, and id2label has {labels} labels"
        return
    tensors: dict[str, Axes] = {}
    for name in files:
        with suppress(OSError, ValueError):  # of a file that is damaged, which is told elsewhere
            tensors |= shapes(home / name)
    for name, shape in tensors.items():
        if LAST.fullmatch(name) and shape and shape[0] != labels:
            told = f"{home}/config.json has {labels} labels (id2label), and {name} is of {shape[0]}"
            yield f"{told}; give the labels that the net was trained for"
            return
