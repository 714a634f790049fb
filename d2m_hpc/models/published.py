"""What models need beside their code, and where it is published: files and hub repositories."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from urllib.parse import quote

HUB = "https://huggingface.co"
DATASET2METADATA = (
    "https://github.com/mlfoundations/dataset2metadata/releases/download/v0.1.0-alpha"
)
"""Where the reference program publishes its own checkpoints."""
FOLDER = "hub"
"""Of a weights folder; holds one folder a repository and revision."""
LONGEST = 200
"""Characters of the name of a repository's folder; filesystems take 255 bytes."""
ALL = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.safetensors", "*.bin")
"""What the loaders of transformers and sentence-transformers read."""
OTHERS = frozenset({"onnx", "openvino", "coreml", "tflite", "flax", "runs", "logs"})
"""Folders with the same net for other programs, or with what its training left behind."""
TWINS = (
    *(".bin", ".bin.index.json", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"),
    *(".pt", ".pth", ".tflite"),
)
"""How files end that hold once more what a `.safetensors` beside them holds."""
_REPO = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*/)?[A-Za-z0-9_][A-Za-z0-9._-]*")

_VARIANT = re.compile(r"^(model|pytorch_model)\.[^.-]+(?=\.(?:safetensors|bin)$)")


@dataclass(frozen=True)
class Checkpoint:
    """A published file.

    Example:
        >>> Checkpoint("net.pt", "https://example.org/net.pt").is_published("12ab")
        True

    Attributes:
        name: path below the weights folder.
        sha256: published hash in hex, or the prefix of it that was published, or empty.
    """

    name: str
    url: str
    sha256: str = ""

    def is_published(self, sha256: str) -> bool:
        """Whether a file with this hash is the published one; True where no hash was published."""
        return sha256.startswith(self.sha256)


@dataclass(frozen=True)
class HubRepo:
    """A model repository of the Hugging Face hub, or those of its files that a model reads.

    Example:
        >>> HubRepo("Falconsai/nsfw_image_detection").name
        'hub/Falconsai--nsfw_image_detection@main'
        >>> HubRepo("timm/resnet50.a1_in1k", "v1", files=("*.safetensors",)).revision
        'v1'

    Attributes:
        repo_id: `owner/name`, or the name alone of the hub's oldest repositories.
        revision: a branch, a tag or a commit.
        files: patterns of the paths that are needed, in which `*` matches `/` too; empty for what
            transformers reads. Where a folder has `.safetensors`, its copies in other formats are
            left out, unless a pattern is just the name of the copy, and none that of the other.

    Raises:
        ValueError: the hub can have no such repository or revision.
    """

    repo_id: str
    revision: str = "main"
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _REPO.fullmatch(self.repo_id) or re.search(r"--|\.\.", self.repo_id):
            raise ValueError(f"{self.repo_id!r}: valid is a repository's name, as owner/name")
        if not self.revision or len(self.name) > LONGEST:
            raise ValueError(f"revision {self.revision!r}: valid is a branch, a tag or a commit")

    @property
    def name(self) -> str:
        """The folder below the weights folder: plain files, which can be copied by hand."""
        return f"{FOLDER}/{self.repo_id.replace('/', '--')}@{quote(self.revision, safe='')}"

    @property
    def url(self) -> str:
        """The repository's page."""
        return f"{endpoint()}/{self.repo_id}"

    def selected(self, names: Iterable[str]) -> list[str]:
        """The files that are needed, of all in the repository.

        Example:
            >>> HubRepo("a/b").selected(["config.json", "model.safetensors", "pytorch_model.bin"])
            ['config.json', 'model.safetensors']
        """
        exact = frozenset(self.files)
        found = [n for n in sorted(names) if n in exact or self._is_asked_for(n)]
        if not self.files:
            found = [name for name in found if not _is_spare(name, found)]
        safe = {PurePosixPath(n).parent for n in found if n.endswith(".safetensors")}
        named = {PurePosixPath(n).parent for n in exact if n.endswith(".safetensors")}
        copies = [n for n in found if n.endswith(TWINS) and PurePosixPath(n).parent in safe]
        left = {n for n in copies if n not in exact or PurePosixPath(n).parent in named}
        return [name for name in found if name not in left]

    def _is_asked_for(self, name: str) -> bool:
        if self.files:
            return any(fnmatchcase(name, pattern) for pattern in self.files)
        *folders, last = name.split("/")
        if any(f in OTHERS or f.startswith((".", "checkpoint-")) for f in folders):
            return False
        training = last.startswith("training_args") or last == "trainer_state.json"
        return not training and any(fnmatchcase(last, pattern) for pattern in ALL)


def _is_spare(name: str, names: Collection[str]) -> bool:
    """Whether a file has weights that nobody reads: a variant (`model.fp16.safetensors`) beside the
    whole, or a folder's that is no module of sentence-transformers."""
    *folders, last = name.split("/")
    if not last.endswith((".safetensors", ".bin")):
        return False
    if folders and "modules.json" not in names:
        return True
    plain = _VARIANT.sub(r"\1", last)
    return plain != last and "/".join((*folders, plain)) in names


def endpoint() -> str:
    """The hub's address, which `$HF_ENDPOINT` changes."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
