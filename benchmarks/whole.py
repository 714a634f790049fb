"""CPU seconds of whole processes, ours and another program's in turns, from start to exit.

    python -m benchmarks.whole --reference DIR --checkpoints DIR [ROW ...]

User and system time of all processes of each program, so that others on the machine disturb it
little. A row counts from its second run: the first one writes the libraries' bytecode. README.md
says how to make the other programs' environments.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
import yaml
from PIL import Image

from benchmarks import data, workload
from benchmarks.captions import captions
from benchmarks.tars import Sample, write

PATCHED = Path(__file__).with_name("reference_cpu.py")
SPENT = Path(__file__).with_name("spent.py")


@dataclass(frozen=True)
class Measured:
    """A row: what is computed on how many samples.

    Attributes:
        keys: of ours beside those of both programs.
    """

    what: str
    samples: int
    make: Callable[[list[Path]], dict[str, Any]]
    keys: dict[str, Any] = field(default_factory=dict)
    large: bool = False
    against: str = "dataset2metadata"


def _no_op(tars: list[Path]) -> dict[str, Any]:
    return workload.no_op_keys(tars, 2)


def _clip_only(tars: list[Path]) -> dict[str, Any]:
    names = ["oai-clip-vit-b32-image"]
    keys = workload.no_op_keys(tars, 2) | {"models": ["no-op-clip"]}
    return keys | {"postprocess_columns": [], "postprocess_features": names}


def _six(tars: list[Path]) -> dict[str, Any]:
    return workload.keys(tars, 2, workload.MODELS, batch_size=8)


def _b32(tars: list[Path]) -> dict[str, Any]:
    keys = workload.keys(tars, 2, workload.MODELS[:1], batch_size=32)
    lists = {"postprocess_columns": [], "postprocess_features": ["oai-clip-vit-b32-image"]}
    return keys | lists | {"additional_fields": []}


BFLOAT16 = {"amp": "bfloat16"}
ROWS = {
    "start": Measured("no models, start to first samples", 2, _no_op),
    "none": Measured("no models, all inputs", 1000, _no_op),
    "clip": Measured("no models, CLIP's inputs only", 1000, _clip_only),
    "clip-large": Measured("the same, 12 megapixels", 48, _clip_only, large=True),
    "clip-scaled": Measured(
        "the same, `decode: scaled`", 48, _clip_only, {"decode": "scaled"}, large=True
    ),
    "six-start": Measured("six models, start to first samples", 4, _six),
    "six-8": Measured("six models", 8, _six),
    "six-24": Measured("six models", 24, _six),
    "six-start-bf16": Measured("six models, bfloat16, start to first samples", 4, _six, BFLOAT16),
    "six-8-bf16": Measured("six models, bfloat16", 8, _six, BFLOAT16),
    "six-24-bf16": Measured("six models, bfloat16", 24, _six, BFLOAT16),
    "b32": Measured("CLIP B/32, images", 256, _b32, against="clip-retrieval"),
}


def cpu(command: Sequence[str], folder: Path) -> tuple[float, float, str]:
    """CPU seconds of a command and all of its descendants, the largest one's GB, and what it told.

    Raises:
        RuntimeError: it failed; with the end of what it told.
    """
    measure = [sys.executable, str(SPENT), *command]
    # Else both programs compile all of their libraries at each start.
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    told = subprocess.run(
        measure, capture_output=True, text=True, check=False, cwd=folder, env=variables
    )
    if told.returncode:
        raise RuntimeError(f"{command[:3]} failed:\n{told.stdout[-2000:]}{told.stderr[-4000:]}")
    spent, memory = json.loads(told.stdout.splitlines()[-1])
    return spent, memory, told.stderr[-4000:]


def large_tar(folder: Path, samples: int) -> Path:
    """Photographs of 4000x3000 pixels."""
    path = folder / f"large-{samples}.tar"
    if path.exists():
        return path
    made = []
    for name in data.PHOTOGRAPHS[:8]:
        buffer = io.BytesIO()
        large = data._photograph(name).resize((4000, 3000), Image.Resampling.BICUBIC)
        large.save(buffer, "JPEG", quality=92)
        made.append(buffer.getvalue())
    texts = enumerate(captions(samples))
    write(path, (Sample(f"{i:09d}", t, made[i % len(made)], 4000, 3000) for i, t in texts))
    return path


class Sides:
    """Both programs' commands for a row."""

    def __init__(self, row: Measured, given: argparse.Namespace) -> None:
        self._row, self._given = row, given
        if row.large:
            tars = [large_tar(given.folder, row.samples)]
        else:
            parts = (
                4 if row.samples >= 100 else 2
            )  # each of the other program's processes reads one
            tars = data.tars(given.folder, parts, row.samples // parts)
        self._keys = row.make(tars)

    def ours(self, folder: Path) -> list[str]:
        weights = {"weights_dir": str(self._given.checkpoints), "allow_unpublished_weights": True}
        config = {**self._keys, **weights, **self._row.keys, "output_metadata_dir": str(folder)}
        path = folder.with_suffix(".yml")
        path.write_text(yaml.safe_dump(config))
        return [*self._given.ours.split(), "submit", str(path), "--local"]

    def other(self, folder: Path) -> list[str]:
        given, program = self._given, self._row.against
        python = given.reference / ".venv" / "bin" / "python"
        if program == "clip-retrieval":
            python = given.clip_retrieval
        keys = {**self._keys, "device": "cpu", "output_metadata_dir": str(folder)}
        paths = (str(given.reference), str(given.checkpoints))
        return [str(python), str(PATCHED), program, json.dumps(keys), *paths]

    def run(self, side: str) -> tuple[float, float]:
        with tempfile.TemporaryDirectory(dir=self._given.folder) as place:
            folder = Path(place) / "out"
            command = getattr(self, side)(folder)
            spent, memory, told = cpu(command, Path(__file__).parents[1])
            made = [*folder.glob("*.parquet"), *folder.glob("metadata/*.parquet")]
            rows = sum(pq.read_metadata(path).num_rows for path in made)
            if rows != self._row.samples:
                raise RuntimeError(f"{side} made {rows} of {self._row.samples} rows:\n{told}")
            return spent, memory


def rows(given: argparse.Namespace) -> Iterator[str]:
    """Lines of a table."""
    yield "| what | samples | CPU s, ours | CPU s, other | ratio | GB, ours | GB, other |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name in given.rows or ROWS:
        row = ROWS[name]
        sides, seen = Sides(row, given), dict[str, list[tuple[float, float]]]()
        for _ in range(given.times):
            for side in ("ours", "other"):
                seen.setdefault(side, []).append(sides.run(side))
        told = {s: ", ".join(f"{t:.1f}" for t, _ in found) for s, found in seen.items()}
        ratio = median(o[0] / t[0] for o, t in zip(seen["ours"], seen["other"], strict=True))
        memory = {s: max(m for _, m in found) for s, found in seen.items()}
        yield (
            f"| {row.what} | {row.samples} | {told['ours']} | {told['other']} | {ratio:.2f} "
            f"| {memory['ours']:.1f} | {memory['other']:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--reference", type=Path, required=True, help="its checkout")
    parser.add_argument("--clip-retrieval", type=Path, help="the Python that has it")
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "d2m-whole")
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--ours", default=str(Path(sys.executable).with_name("d2m")))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for line in rows(given):
        print(line, flush=True)


if __name__ == "__main__":
    main()
