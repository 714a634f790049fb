"""The reference program itself in the baseline's place: a checkout of it, in its own Python.

It dies on webdataset 0.2.100 and newer, so it needs an environment of its own, in `.venv` of the
checkout; benchmarks/README.md says how to make one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Only the standard library here: the reference's Python does not have our packages.


def seconds(checkout: Path, kind: str, keys: Mapping[str, Any], rows: int) -> float:
    """What one run of the reference program takes, without its imports and its sleeps.

    Args:
        kind: "loader" until its last batch, "first-batch", or "task".
        keys: the config's.
        rows: how many it has to make.

    Raises:
        RuntimeError: it cannot be run, or did not make all rows.
    """
    python = checkout / ".venv" / "bin" / "python"
    if not python.exists():
        raise RuntimeError(f"{python} is missing; benchmarks/README.md says how to make it")
    command = [str(python), __file__, str(checkout), kind, json.dumps(keys)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"the reference program failed:\n{ended.stderr[-4000:]}")
    made, spent = json.loads(ended.stdout.splitlines()[-1])
    if made != rows:
        raise RuntimeError(f"the reference program made {made} of {rows} rows:\n{ended.stderr}")
    return float(spent)


def _load(keys: dict[str, Any]) -> int:
    return sum(len(batch[-1]) for batch in _loader(keys))


def _first_batch(keys: dict[str, Any]) -> int:
    _reading.append(iter(_loader(keys)))
    return len(next(_reading[0])[-1])


_reading: list[Any] = []
"""Kept to the end: stopping the processes of a loader is not what is measured."""


def _loader(keys: dict[str, Any]) -> Any:
    from dataset2metadata.dataloaders import create_loader

    wanted = ("input_tars", "models", "additional_fields", "nworkers", "batch_size")
    return create_loader(*(keys[name] for name in wanted), True)[0]


def _task(keys: dict[str, Any]) -> int:
    import numpy as np
    from dataset2metadata import process

    process.time = SimpleNamespace(time=time.time, sleep=lambda seconds: None)
    with tempfile.TemporaryDirectory() as folder:
        process.process({**keys, "output_metadata_dir": folder})
        arrays = (np.load(path, mmap_mode="r") for path in Path(folder).glob("*.npz"))
        return sum(len(array[array.files[0]]) for array in arrays)


def main(checkout: str, kind: str, keys: str) -> None:
    sys.path[0] = checkout
    import dataset2metadata.process  # noqa: F401  (what a long run pays once)

    run = {"loader": _load, "first-batch": _first_batch, "task": _task}[kind]
    started = time.perf_counter()
    made = run(json.loads(keys))
    print()
    print(json.dumps([made, time.perf_counter() - started]))


if __name__ == "__main__":
    main(*sys.argv[1:])
