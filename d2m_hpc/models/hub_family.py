"""Families of checkpoints that are folders in the layout of transformers: local ones, or the hub's.

Nothing here imports torch or transformers: what a login node must know is read from JSON files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.family import (
    NO_REVISION,
    Family,
    Output,
    ParameterError,
    Use,
    at_hand,
    here,
    read_json,
)
from d2m_hpc.models.hub_fits import misfits
from d2m_hpc.models.hub_images import described, require_usable
from d2m_hpc.models.inputs import ImageInput, OwnInput
from d2m_hpc.models.lock import Lock
from d2m_hpc.models.published import HubRepo

WEIGHTS = (".safetensors", ".bin")
"""How files of weights end."""
NEEDED = {
    "image": ("image processor", "preprocessor_config.json", "processor_config.json"),
    "text": ("tokenizer", "tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model"),
}
"""What prepares an input, and the files that it may be in."""
NETS = {
    "image-classification": ("ForImageClassification",),
    "text-classification": ("ForSequenceClassification",),
    "image-text-matching": ("BlipForImageTextRetrieval",),
    "image-to-text": (
        "ForConditionalGeneration",
        "ForCausalLM",
        "ForImageTextToText",
        "VisionEncoderDecoder",
    ),
}
"""What the names of the nets have in them that a family computes with, by its kind."""
LICENCES = {
    "Falconsai/nsfw_image_detection": "Apache-2.0",
    "sentence-transformers/all-MiniLM-L6-v2": "Apache-2.0",
    "Salesforce/blip-itm-base-coco": "BSD-3-Clause",
    "Salesforce/blip2-opt-2.7b": "MIT",
}
"""Of the presets' repositories, as their publishers name them."""
PLACES = {"blip": 512, "git": 1024}
"""Tokens of a text that a net takes where its config does not say, by its type."""
OTHERS = ("label", "scores")
"""What a classifier gives beside a column for each label."""


class HubFamily(Family):
    """A checkpoint of transformers; a family adds what is computed with it."""

    paths: ClassVar = ("checkpoint",)

    further: ClassVar[tuple[str, ...]] = ()
    """What else than its inputs the net needs the checkpoint's files for: `text` that it writes."""

    checkpoint: str
    """a folder that `save_pretrained` wrote, or a repository of the Hugging Face hub
    (`owner/name`)"""
    revision: str = "main"
    """branch, tag or commit of a repository"""

    def repo(self) -> HubRepo | None:
        """The repository, where the checkpoint is no folder at hand.

        Raises:
            ParameterError: the hub can have no such repository.
        """
        if at_hand(self.checkpoint):
            if self.revision != "main":
                raise ParameterError("revision", NO_REVISION)
            return None
        try:
            return HubRepo(self.checkpoint, self.revision)
        except ValueError as error:
            raise ParameterError("checkpoint", f"{error}, or the path of a folder") from None

    def home(self, use: Use) -> Path:
        """The folder from which the checkpoint is loaded."""
        repo = self.repo()
        return use.folder / repo.name if repo else at_hand(self.checkpoint) or Path()

    def checkpoints(self, use: Use) -> list[HubRepo | Path]:
        if repo := self.repo():
            return [repo]
        home = self.home(use)
        found = [home / name for name in HubRepo("a/b").selected(self._names(use))]
        if not any(path.suffix in WEIGHTS for path in found):
            what = f"{home} has no file of weights (model.safetensors)"
            raise ParameterError("checkpoint", what)
        return [*found]

    def _names(self, use: Use) -> list[str]:
        """The files of the checkpoint, those of a repository's commit included that are missing."""
        home, repo = self.home(use), self.repo()
        with suppress(WeightsError):  # which is told by whoever looks at files
            if repo and (locked := Lock.read(use.folder).repositories.get(repo.name)):
                return [*locked.files]
        return [p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()]

    def licence(self) -> str:
        return LICENCES.get(self.checkpoint, "")

    def check(self, use: Use, reads: Sequence[tuple[int, ...]]) -> None:
        home = self.home(use)
        self._require_files(use)
        if not (home / "config.json").exists():  # a repository that is not fetched
            if hint := here(self.checkpoint):
                what = f"{self.checkpoint!r} is the name of a repository of the hub"
                raise ParameterError("checkpoint", f"{what}{hint}")
            return
        if not {"model_type", "pretrained_cfg"} & self.document(use).keys():
            what = f"{home}/config.json has no `model_type`, as `save_pretrained` writes it"
            raise ParameterError("checkpoint", what)
        raws = {getattr(given, "raw", "") for given in self.inputs(use)}
        wanted = {n: NEEDED[n] for n in ("image", "text") if n in {*raws, *self.further}}
        if "timm" in str(self.document(use).get("model_type")):
            wanted.pop("image", None)  # timm's own config tells how pictures are prepared
        images = self._processor(use)[1] if "image" in wanted else {}
        labels = len(self.labels(use)) if self.kind.endswith("-classification") else 0
        advice = kind_for(home, self.kind) if "pretrained_cfg" in self.document(use) else ""
        copy = "copy the repository to a folder, save it there and give the folder's path"
        advice = advice or (copy if self.repo() else "save it there too")
        mistakes = [
            ("checkpoint", f"{home} has no {what} ({patterns[0]}); {advice}")
            for what, *patterns in wanted.values()
            if not any(path.is_file() for pattern in patterns for path in home.glob(pattern))
        ]
        fit = misfits(home, self._names(use), self.document(use), self.kind, labels, images)
        mistakes += [("checkpoint", what) for what in fit]
        if mistakes:
            raise ParameterError(*mistakes)

    def _require_files(self, use: Use) -> None:
        """
        Raises:
            ParameterError: the commit of the hub that was fetched is of no model of transformers.
        """
        if repo := self.repo():
            files = ("config.json", "transformers")
            require_files("checkpoint", repo, use.folder, *files, self.kind)

    def document(
        self, use: Use, name: str = "config.json", required: bool = True, kind: type = dict
    ) -> Any:
        """The content of one of the checkpoint's JSON files; an empty one where a repository is
        not fetched yet, or where a file that is not required is missing.

        Raises:
            ParameterError: the file is missing or damaged.
        """
        path = self.home(use) / name
        if not path.exists() and (self.repo() or not required):
            return kind()
        try:
            content = read_json(path)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ParameterError("checkpoint", f"{path} cannot be read: {why}") from None
        if not isinstance(content, kind):
            what = "mapping" if kind is dict else kind.__name__
            raise ParameterError("checkpoint", f"{path} holds no {what}")
        if name == "config.json":
            self._require_net(path, content)
        return content

    def _require_net(self, path: Path, config: Any) -> None:
        """
        Raises:
            ParameterError: the checkpoint is of another family's net.
        """
        wanted, built = NETS.get(self.kind), config.get("architectures")
        if not wanted or not isinstance(built, list) or not built or _any_of(wanted, built):
            return
        fit = [kind for kind, nets in NETS.items() if _any_of(nets, built)]
        valid = f"valid is a net whose name has {wanted[0]!r} in it"
        advice = f"`kind: {fit[0]}` takes it" if fit else valid
        raise ParameterError("checkpoint", f"{path} is of a {built[0]}; {advice}")

    def places(self, use: Use) -> int:
        """Tokens of a text that the net has places for; 0 where its config does not say."""
        config = self.document(use)
        inner = config.get("text_config")
        text = {**config, **(inner if isinstance(inner, dict) else {})}
        kind = str(config.get("model_type"))
        if "relative_attention_num_buckets" in text:
            return 0  # T5 counts distances, and takes texts of any length
        found = text.get("max_position_embeddings") or text.get("n_positions") or PLACES.get(kind)
        return found if isinstance(found, int) else 0

    def image(self, use: Use) -> ImageInput | OwnInput:
        """The picture, as the checkpoint's processor prepares it."""
        path, told = self._processor(use)
        try:
            require_usable(told)
        except ValueError as error:
            raise ParameterError("checkpoint", f"{path}: {error}") from None
        source = str(self.home(use))
        return described(told) or OwnInput("image", "d2m_hpc.models.hub_nets:images", source=source)

    def _processor(self, use: Use) -> tuple[Path, dict[str, Any]]:
        """The file that says how pictures are prepared, and what it says."""
        file = "preprocessor_config.json"
        told = self.document(use, file, required=False)
        if not told:  # transformers 5 keeps it within the config of all that prepares inputs
            file = "processor_config.json"
            told = self.document(use, file, required=False)
            told = told.get("image_processor") or {}
            if not isinstance(told, dict):
                raise ValueError("`image_processor` of its processor_config.json is no mapping")
        return self.home(use) / file, told

    def text(self, use: Use, **options: Any) -> OwnInput:
        """The tokens of the caption, by the checkpoint's tokenizer."""
        source = str(self.home(use))
        return OwnInput("text", "d2m_hpc.models.hub_nets:tokens", source=source, **options)

    def labels(self, use: Use) -> dict[str, str]:
        """The checkpoint's labels, in order, by the names of their columns.

        Two labels of one name, as a column has it, are told apart by their numbers. A label without
        letters and digits has the column `label_<number>`.
        """
        config = self.document(use)
        if not config:
            return {}
        told = config.get("id2label")
        if told is None:
            told = {i: f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
        try:
            numbers = sorted(told, key=int)
            labels = [str(told[i]) for i in numbers]
        except (TypeError, ValueError, LookupError):
            numbers, labels = [], []
        if not labels or [*map(int, numbers)] != [*range(len(labels))]:
            what = f"{self.home(use)}/config.json: the labels in its id2label are no names"
            raise ParameterError("checkpoint", f"{what} numbered from 0 without a gap")
        names = [column_name(label) or f"label_{i}" for i, label in enumerate(labels)]
        return {
            f"{name}-{i}" if name in OTHERS or names.count(name) > 1 else name: label
            for i, (name, label) in enumerate(zip(names, labels, strict=True))
        }

    def scores(self, use: Use) -> list[Output]:
        """The outputs of a classifier.

        Of a repository that is not fetched yet, whatever a config asks for is taken for a label.
        """
        labels = self.labels(use)
        names = [*labels] if self.document(use) else sorted(use.wanted - {*OTHERS})
        return [
            *(Output(name, "float32") for name in names),
            Output("label", "string", options={"to_cpu": False}),
            Output("scores", shape=(len(labels),) if labels else ()),
        ]


def require_files(
    parameter: str, repo: HubRepo, folder: Path, config: str, whose: str, kind: str
) -> None:
    """
    Args:
        config: the name of the file that describes a model.
        whose: the library that wrote the model.
        kind: of the family that is to take it.

    Raises:
        ParameterError: the commit of the hub that was fetched is of no such model.
    """
    locked = None
    with suppress(WeightsError):  # which is told by whoever looks at files
        locked = Lock.read(folder).repositories.get(repo.name)
    if locked is None:
        return
    names = repo.selected(locked.files)
    lacking = [] if config in names else [config]
    if not any(name.endswith(WEIGHTS) for name in names):
        lacking.append("file of weights (model.safetensors)")
    if lacking:
        what = f"{repo.url} has no {' and no '.join(lacking)} at {locked.commit[:12]}"
        advice = kind_for(folder / repo.name, kind) or "choose another repository or `revision`"
        raise ParameterError(parameter, f"{what}, so it is no model of {whose}; {advice}")


def kind_for(home: Path, given: str) -> str:
    """What to say of the kind that takes a checkpoint, by its config; empty if none is known, or
    if that is the kind which is given."""
    fit = ["open_clip"] if (home / "open_clip_config.json").is_file() else []
    with suppress(OSError, ValueError, TypeError, AttributeError):
        told = read_json(home / "config.json")
        fit += ["timm"] if {"architecture", "pretrained_cfg"} & told.keys() else []
        fit += [k for k, nets in NETS.items() if _any_of(nets, told.get("architectures") or ())]
    return f"`kind: {fit[0]}` takes it" if fit and fit[0] != given else ""


def _any_of(parts: Sequence[str], names: Sequence[Any]) -> bool:
    return any(part in str(name) for part in parts for name in names)


def column_name(label: str) -> str:
    """A label, as a column's name has it.

    Example:
        >>> column_name("Tabby, tabby cat"), column_name("LABEL_0")
        ('tabby-tabby-cat', 'label_0')
    """
    return re.sub(r"\W+", "-", label.lower()).strip("-")
