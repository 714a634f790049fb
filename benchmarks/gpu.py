"""What a GPU makes of the six models, from its arithmetic's ceiling to tars turned into files.

    python -m benchmarks.gpu [--seconds 5] [--batch-size 512] [--json FILE]
    python -m benchmarks.gpu --tiny      # small nets, on whatever there is: to see that it runs

It needs no internet: the nets have the published sizes and random values. Full, it takes about nine
minutes on an H100. TFLOP/s are of operations counted in the nets (two for a
multiplication with its addition), and their share is of the large half-precision matrix products
of the same card.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_conventional, gpu_data
from benchmarks.gpu_pipeline import tar_to_files
from benchmarks.machine import Watch
from benchmarks.workload import MODELS, batches, keys
from d2m_hpc.config import Config
from d2m_hpc.models.compiled import compile_for
from d2m_hpc.worker.batch import Batch
from d2m_hpc.worker.compute import graph as graphs
from d2m_hpc.worker.compute.graph import Graph
from d2m_hpc.worker.compute.resolve import Toolbox

THREADS = (4, 8, 16)
EAGER, COMPILED = "eager", "compiled"
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """How it is measured.

    Attributes:
        seconds: of each measurement.
        folder: for checkpoints, tars and outputs.
    """

    device: torch.device
    tiny: bool
    seconds: float
    batch_size: int
    folder: Path

    @property
    def tars(self) -> list[Path]:
        return sorted((self.folder / "tars").glob("*.tar"))

    def config_keys(self, threads: int, **more: Any) -> dict[str, Any]:
        return keys(
            self.tars,
            threads,
            MODELS,
            device=0 if self.device.type == "cuda" else "cpu",
            batch_size=self.batch_size,
            weights_dir=str(self.folder / "checkpoints"),
            allow_unpublished_weights=True,
            **more,
        )

    def config(self, **more: Any) -> Config:
        given = self.config_keys(THREADS[-1], output_metadata_dir=str(self.folder / "out"), **more)
        return Config(**given)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rate(self, work: Callable[[], object]) -> float:
        """How often a second, after some times that are not counted."""
        for _ in range(1 if self.tiny else 3):
            work()
        self.wait()
        count, started = 0, time.perf_counter()
        while not count or time.perf_counter() - started < self.seconds:
            work()
            count += 1
        self.wait()
        return count / (time.perf_counter() - started)


def ceiling(bench: Bench) -> float:
    """TFLOP/s of large matrix products, the most that any net could reach."""
    cuda = bench.device.type == "cuda"
    side, dtype = (8192, torch.float16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in "ab")
    return max(bench.rate(lambda: a @ b) for _ in range(3)) * 2 * side**3 / 1e12


@torch.no_grad()
def models(bench: Bench, graph: Graph, batch: Batch, mode: str, most: float) -> Iterator[Row]:
    """Each model alone, its inputs where it takes them."""
    cache: dict[str, Any] = {}
    sent: list[Any] = []  # keeps the copies that the models compute from
    finished = graph._finished(batch.inputs, sent)
    for name in graph.models:
        arguments = graph._arguments(name, finished, cache)
        work = partial(graph._run, name, arguments, graph.dtype)
        with FlopCounterMode(display=False) as counter, patch_compiled(graph, name):
            cache[name] = work()
        if mode == EAGER or hasattr(graph.models[name], "image_net"):
            flops = counter.get_total_flops() / len(batch.keys)
            yield {"part": "model", "name": name, **_speed(bench, work, batch, mode, flops, most)}


def patch_compiled(graph: Graph, name: str) -> Any:
    """Operations are counted in the net itself, not in what it is compiled to."""
    net = getattr(graph.models[name], "image_net", None)
    if net is None:
        return patch.dict({})
    return patch.object(net, "forward", partial(type(net).forward, net))


def whole_graph(
    bench: Bench, graph: Graph, batch: Batch, mode: str, flops: float, most: float
) -> Row:
    """All models with resident inputs, batch after batch, to outputs on the host."""
    inputs = graph._copies.send({i: v for i, v in batch.inputs.items() if i[0] != "text"})
    resident = Batch(batch.keys, {**batch.inputs, **inputs}, batch.fields)
    outputs = graph.run(cycle([resident]))
    row = _speed(bench, lambda: next(outputs), batch, mode, flops, most)
    return {"part": "graph", "name": "six models", **row, "recomputed": next(outputs).recomputed}


def _speed(
    bench: Bench, work: Callable[[], object], batch: Batch, mode: str, flops: float, most: float
) -> Row:
    rate = bench.rate(work) * len(batch.keys)
    tflops = rate * flops / 1e12
    return {
        "mode": mode,
        "samples_per_second": rate,
        "gflop_per_sample": flops / 1e9,
        "tflops": tflops,
        "share": tflops / most,
    }


def resident(bench: Bench, most: float) -> Iterator[Row]:
    """Models and graph without loading and writing, as they are and compiled."""
    backend = "eager" if bench.tiny else "inductor"
    batch = next(batches(bench.config(), bench.folder))
    flops = 0.0
    for mode in (EAGER, COMPILED):
        config = bench.config(compile=mode == COMPILED)
        with patch.object(graphs, "compile_for", partial(compile_for, backend=backend)):
            graph = Graph(config, Toolbox.of(config), bench.device)
        with graph:
            for row in models(bench, graph, batch, mode, most):
                flops += row["gflop_per_sample"] * 1e9 * (mode == EAGER)
                yield row
            yield whole_graph(bench, graph, batch, mode, flops, most)
        del graph


def rows(bench: Bench, most: float) -> Iterator[Row]:
    yield from resident(bench, most)
    for threads in THREADS:
        yield tar_to_files(bench.config_keys(threads), bench.device)
    config = bench.config()
    graph = Graph(config, Toolbox.of(config), bench.device)
    for workers in THREADS[: 1 if bench.tiny else None]:
        size = min(bench.batch_size, gpu_conventional.MOST_ROWS)
        yield gpu_conventional.measure(graph, bench.tars, workers, size, bench.seconds)


def prepare(bench: Bench) -> None:
    """Checkpoints, and tars for the seconds: a first one to warm up, as many as a fast GPU does."""
    make = gpu_data.tiny_checkpoints if bench.tiny else gpu_data.full_checkpoints
    make(bench.folder / "checkpoints")
    samples = bench.batch_size * 2
    count = 2 if bench.tiny else max(THREADS[-1], round(2500 * bench.seconds / samples) + 1)
    gpu_data.tars(bench.folder / "tars", count, samples)


def table(found: list[Row]) -> Table:
    shown = Table("part", "name", "mode", "samples/s", "TFLOP/s", "share", "idle", "limit")
    for row in found:
        shown.add_row(
            row["part"],
            row["name"],
            row.get("mode", ""),
            f"{row['samples_per_second']:.1f}",
            *(f"{row[k]:.3f}" if k in row else "" for k in ("tflops", "share", "idle")),
            row.get("limit", ""),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tiny", action="store_true", help="small nets, to see that it runs")
    parser.add_argument("--seconds", type=float, help="of each measurement (5; tiny: 0.2)")
    parser.add_argument("--batch-size", type=int, help="512; tiny: 4")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    given = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not given.tiny:
        sys.exit("there is no CUDA device here; --tiny runs small nets on the CPU")
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            device=device,
            tiny=given.tiny,
            seconds=given.seconds or (0.2 if given.tiny else 5.0),
            batch_size=given.batch_size or (4 if given.tiny else 512),
            folder=Path(folder),
        )
        prepare(bench)
        most = ceiling(bench)
        found: list[Row] = []
        for row in rows(bench, most):
            found.append(row)
            if given.json:  # each time: what was measured stays, whatever stops the rest
                result = {**about(bench, watch), "ceiling_tflops": most, "rows": found}
                given.json.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(f"large matrix products: {most:.1f} TFLOP/s", table(found))


def about(bench: Bench, watch: Watch) -> dict[str, Any]:
    cuda = bench.device.type == "cuda"
    return {
        "name": "gpu",
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(bench.device) if cuda else "cpu",
        "tiny": bench.tiny,
        "seconds": bench.seconds,
        "batch_size": bench.batch_size,
        "machine": watch.describe(),
    }


if __name__ == "__main__":
    main()
