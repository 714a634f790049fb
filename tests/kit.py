"""What the tests share: the golden kit, tars made on the spot, configs, runs of the commands."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import warm
import yaml
from PIL import Image

from d2m_hpc.models import weights
from d2m_hpc.models.registry import builtin
from d2m_hpc.run.outputs import OutputDir

GOLDEN = Path(__file__).parent / "golden"
SHARDS = GOLDEN / "shards"
EXPECTED = GOLDEN / "expected"

DATACOMP: dict[str, Any] = {
    "models": [
        "oai-clip-vit-b32",
        "oai-clip-vit-l14",
        "nsfw-detoxify",
        "nsfw-image-oai-clip-vit-l-14",
        "faces-scrfd10g",
        "dedup-isc-ft-v107",
    ],
    "postprocess_columns": [
        "oai-clip-vit-b32-score",
        "oai-clip-vit-l14-score",
        "nsfw-detoxify-score",
        "nsfw-image-score",
        "face-boxes",
        "dedup-isc-ft-v107-score",
    ],
    "postprocess_features": [
        "oai-clip-vit-b32-image",
        "oai-clip-vit-b32-text",
        "oai-clip-vit-l14-image",
        "oai-clip-vit-l14-text",
        "dedup-isc-ft-v107-image",
    ],
    "additional_fields": [
        "uid",
        "url",
        "caption",
        "original_width",
        "original_height",
        "sha256",
    ],
    "device": "cpu",
    "nworkers": 2,
}

CHECKPOINTS = {c.name: c for c in weights.needed(builtin().specs(DATACOMP["models"]).values())}
"""What the six models of DataComp need."""

STATS: dict[str, Any] = {
    "models": ["image-stats", "text-stats"],
    "postprocess_columns": ["image-brightness", "image-phash", "text-words"],
    "postprocess_features": ["image-histogram"],
    "additional_fields": ["uid", "caption"],
    "device": "cpu",
    "nworkers": 2,
    "batch_size": 16,
}
"""A workload without checkpoints, for all tests that are not about the models."""


def write_config(path: Path, values: Mapping[str, Any], **more: Any) -> Path:
    """A YAML config; `more` overrides `values`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**values, **more}, allow_unicode=True), encoding="utf-8")
    return path


CUSTOM = """
import torch

class Own(torch.nn.Module):
    raw_inputs = ["text"]
    preprocessors = ["identity"]
    dependencies = []
    to_device = False

    def __init__(self, device):
        super().__init__()

    def forward(self, texts):
        {before}
        return torch.tensor([float(len(text)) for text in texts])

model_lookup = {{"{name}": Own}}
postprocess_parquet_lookup = {{"{column}": lambda cache: cache["{name}"]}}
"""


def custom_file(name: str, column: str = "", before: str = "pass") -> str:
    """A custom file with one model, whose column (`{name}-length`) has the lengths of the texts.

    Args:
        before: statements before a batch is computed, which may use its `texts`.
    """
    lines = before.replace("\n", "\n" + " " * 8)
    return CUSTOM.format(name=name, column=column or f"{name}-length", before=lines)


def custom_config(folder: Path, code: str, name: str, **more: Any) -> Path:
    """`c.yml` over `tars` to `out`, with the model of a custom file besides those of `STATS`."""
    (folder / f"{name}.py").write_text(code)
    values = {
        **STATS,
        "models": [*STATS["models"], name],
        "postprocess_columns": [f"{name}-length"],
        "input_tars": str(folder / "tars" / "*.tar"),
        "output_metadata_dir": str(folder / "out"),
        "custom_pypath": str(folder / f"{name}.py"),
    }
    return write_config(folder / "c.yml", {**values, **more})


def put(output: OutputDir, name: str, data: bytes) -> None:
    """Write a file into an output folder, on a disk or in a store."""
    output.fs.makedirs(output.root, exist_ok=True)
    with output.fs.open(output.path(name), "wb") as file:
        file.write(data)


def jpeg(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    """A small JPEG of smooth noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def sample(key: str, seed: int = 0) -> dict[str, bytes]:
    """The members of a good sample, by name."""
    fields = {"uid": f"{seed:032x}", "caption": f"caption {seed}", "original_width": 40}
    return {
        f"{key}.jpg": jpeg(seed),
        f"{key}.json": json.dumps(fields).encode(),
        f"{key}.txt": f"caption {seed}".encode(),
    }


def write_tar(
    path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], **options: Any
) -> Path:
    """A tar of these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name, data in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, count: int, samples: int = 5) -> list[Path]:
    """`00000.tar` and on, each of some good samples; no two images are alike."""
    paths = []
    for i in range(count):
        members: dict[str, bytes] = {}
        for j in range(samples):
            members |= sample(f"{i:05d}{j:04d}", seed=i * 1000 + j)
        paths.append(write_tar(folder / f"{i:05d}.tar", members))
    return paths


def calls(work: Callable[..., object], *arguments: object) -> int:
    """How many functions, of Python or C, a function calls; the same on every machine."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work(*arguments)
    finally:
        sys.setprofile(None)
    return count


def d2m(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `d2m` as a user would, in a process of its own, which `warm` starts."""
    return warm.run(["d2m", *map(str, arguments)], **options)


def submit(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `d2m submit --local`."""
    return d2m("submit", *arguments, "--local", **options)


def peak() -> int:
    """The most bytes that this process has held since its program began.

    A process that a larger one started has that one's size as its `ru_maxrss` from its first step,
    and the process of the tests grows to gigabytes.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def photographs(count: int = 35) -> list[Image.Image]:
    """The first photographs of the golden shard, decoded by PIL."""
    with tarfile.open(SHARDS / "00000.tar") as tar:
        files = [m for m in tar if m.name.endswith(".jpg")][:count]
        return [Image.open(io.BytesIO(_content(tar, m))).convert("RGB") for m in files]


def captions() -> list[str]:
    """The captions of the golden shards of all kinds: ordinary, empty, very long, odd."""
    found = []
    for name in ("00000", "odd"):
        with tarfile.open(SHARDS / f"{name}.tar") as tar:
            texts = [m for m in tar if m.name.endswith(".txt")]
            found += [_content(tar, m).decode() for m in texts]
    return found


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()
