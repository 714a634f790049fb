"""Estimate how much host memory a task needs, to check `slurm.mem` against it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from d2m_hpc.config import Config
from d2m_hpc.models.inputs import NAMED, ImageInput, as_prepared
from d2m_hpc.models.registry import Registry

BATCHES = 8
"""Batches in memory at once: four that wait, two that are filled, two that are computed."""
DECODED, DECODING = 110 << 20, 2 << 30
"""Bytes of a picture of 12 megapixels while it is decoded; and of all of them at the most."""
PROGRAM, CUDA = 1 << 30, 2 << 30
"""Bytes of Python, torch and outputs that wait to be written; and of CUDA's libraries."""
WEIGHTS = 3
"""A checkpoint of half precision is read, and its net built in float32."""
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
GB = 1e9


def needed(config: Config, known: Registry, checkpoints: Iterable[int]) -> int:
    """Bytes for a task. Custom preprocessors' values and models without checkpoints do not count.

    Args:
        checkpoints: bytes of each; a net stays on the host where there is no GPU.
    """
    inputs = {
        as_prepared((raw, NAMED.get(form, form) if isinstance(form, str) else form))
        for name in config.model_names
        for raw, form in known.models[name].inputs
    }
    pictures = [form for _, form in inputs if isinstance(form, ImageInput)]
    batch = config.batch_size * sum(3 * form.height * form.width for form in pictures)
    threads = config.nworkers or config.slurm.cpus_per_task or DECODING
    decoding = min(threads * DECODED, DECODING) if pictures else 0
    sizes = [*checkpoints]
    nets = 2 * sum(sizes) if config.device == "cpu" else CUDA
    largest = WEIGHTS * max(sizes, default=0)
    return PROGRAM + decoding + BATCHES * batch + nets + largest


def given(mem: str | int | None) -> float:
    """Bytes that sbatch's `--mem` asks for; infinite where it says nothing, or takes all."""
    text = str(mem or 0).upper().removesuffix("B")
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "M")
    return int(number) * UNITS[unit] or math.inf if number.isdecimal() else math.inf


def notices(config: Config, known: Registry, checkpoints: Iterable[int]) -> list[str]:
    """What a user should know of a `slurm.mem` that is too small."""
    tasks = config.slurm.tasks_per_node
    need = tasks * needed(config, known, checkpoints)
    if need <= (mem := given(config.slurm.mem)):
        return []
    of = f"{tasks} tasks take" if tasks > 1 else "a task takes"
    return [
        f"slurm.mem: {mem / GB:.1f} GB; {of} about {need / GB:.1f} GB with batch_size "
        f"{config.batch_size}, and what takes more than it asked for is killed"
    ]
