"""The row of the writer: computed outputs to files on disk."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import baseline, data, workload
from benchmarks.captions import captions
from benchmarks.harness import Row, Setting, Sides, timed
from benchmarks.noop_models import WIDTHS
from d2m_hpc.config import Config
from d2m_hpc.run.records import Record
from d2m_hpc.worker.batch import Outputs
from d2m_hpc.worker.write.table import Table
from d2m_hpc.worker.write.writer import write_pair

ROWS_WRITTEN = 10_000


def outputs(config: Config, rows: int) -> list[Outputs]:
    """Batches of random features of length 1, scores, up to three boxes each, and fields.

    CLIP's features are halves in float32, as OpenAI's nets give them on a GPU.
    """
    generator = torch.Generator().manual_seed(0)
    texts = captions(rows)
    return [
        _batch(config, range(start, min(start + config.batch_size, rows)), texts, generator)
        for start in range(0, rows, config.batch_size)
    ]


def _batch(config: Config, numbers: range, texts: list[str], generator: torch.Generator) -> Outputs:
    count = len(numbers)
    scores = torch.rand(len(config.postprocess_columns), count, generator=generator)
    columns: dict[str, Any] = dict(zip(config.postprocess_columns, scores.numpy(), strict=True))
    columns["face-boxes"] = [torch.rand(i % 4, 4, generator=generator).tolist() for i in numbers]
    features = {
        name: _feature(count, width, "clip" in name, generator)
        for name, width in zip(config.postprocess_features, WIDTHS, strict=True)
    }
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in numbers]
    made: dict[str, list[Any]] = {
        "uid": [digest[:32] for digest in digests],
        "url": [f"https://example.org/{digest[:12]}.jpg" for digest in digests],
        "caption": [texts[i] for i in numbers],
        "original_width": [320 + i % 200 for i in numbers],
        "original_height": [240 + i % 300 for i in numbers],
        "sha256": digests,
    }
    return Outputs([f"{i:09d}" for i in numbers], columns, features, made)


def _feature(rows: int, width: int, half: bool, generator: torch.Generator) -> NDArray[np.float32]:
    unit = torch.nn.functional.normalize(torch.randn(rows, width, generator=generator))
    made: NDArray[np.float32] = (unit.half().float() if half else unit).numpy()
    return made


def _write_ours(config: Config, batches: list[Outputs], folder: Path) -> None:
    """Both files, durable and read back."""
    table = Table(config)
    for batch in batches:
        table.add(batch)
    write_pair(table, Record("00000", "done", rows=table.rows), folder)


def _tensors(batches: list[Outputs], name: str) -> list[Tensor]:
    return [torch.from_numpy(batch.features[name]) for batch in batches]


def _write_conventionally(batches: list[Outputs], folder: Path) -> None:
    columns = {
        name: [torch.from_numpy(v) if hasattr(v, "dtype") else v for v in _column(batches, name)]
        for name in (*batches[0].columns, *batches[0].fields)
    }
    features = {name: _tensors(batches, name) for name in batches[0].features}
    baseline.write(folder / "conventional", columns, features)


def _column(batches: list[Outputs], name: str) -> list[Any]:
    return [batch.columns.get(name, batch.fields.get(name)) for batch in batches]


class WriterThreads:
    """Counts, by thread, the openings of output files for writing; Python tells of each."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._on = True
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._on and event == "open" and str(arguments[0]).endswith((".npz", ".parquet")):
            mode, flags = arguments[1], arguments[2]
            if (mode and mode[0] in "wxa") or flags & 1:
                self.found[threading.current_thread().name] += 1

    def stop(self) -> None:
        """Hooks cannot be removed."""
        self._on = False


def threads_of_writes(folder: Path) -> dict[str, int]:
    """In a task over four small tars.

    Raises:
        RuntimeError: something was written on the thread that computes.
    """
    watched = WriterThreads()
    tars = data.tars(folder, 4, 8)
    workload.run_task(workload.no_op_keys(tars, 2))
    watched.stop()
    computes = threading.current_thread().name
    if watched.found[computes] or sum(watched.found.values()) < 2 * len(tars):
        raise RuntimeError(f"outputs were written on these threads: {dict(watched.found)}")
    return dict(watched.found)


@contextmanager
def pair_of_files(setting: Setting) -> Iterator[Sides]:
    """10,000 rows of five features, six columns and six fields, to an npz and a parquet."""
    config = Config(**workload.keys([Path("00000.tar")], setting.workers, workload.MODELS))
    batches = outputs(config, setting.size(ROWS_WRITTEN, 200))
    threads = threads_of_writes(setting.folder)
    with tempfile.TemporaryDirectory(dir=setting.folder) as name:
        folder = Path(name)
        yield Sides(
            ours=lambda: timed(lambda: _write_ours(config, batches, folder)),
            baseline=lambda: timed(lambda: _write_conventionally(batches, folder)),
            more={"files_opened_by_thread": threads},
        )


ROWS = (Row("writer", "10,000 rows to files", 50, pair_of_files),)
