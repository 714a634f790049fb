"""What each part of the GPU benchmark measures."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks import gpu_conventional
from benchmarks.gpu_pipeline import tar_to_files
from benchmarks.gpu_roofline import Ceiling, Cost, Counting
from benchmarks.workload import MODELS, batches, keys
from d2m_hpc.config import Config
from d2m_hpc.models import blocks
from d2m_hpc.models.compiled import compile_for
from d2m_hpc.models.recorded import AFTER
from d2m_hpc.worker.batch import Batch
from d2m_hpc.worker.compute import graph as graphs
from d2m_hpc.worker.compute.graph import Graph
from d2m_hpc.worker.compute.resolve import Toolbox

ROOT = Path(__file__).parents[1]
THREADS = (4, 8, 16)
PLAIN, RECORDED, COMPILED = "kernel by kernel", "recorded", "compiled and recorded"
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
KERNELS = 12
"""The kernels named of a batch, those that take longest."""
ACTIVITIES = (ProfilerActivity.CPU, ProfilerActivity.CUDA)
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """How it is measured.

    Attributes:
        seconds: of each measurement.
        folder: for checkpoints, tars and outputs.
        ceiling: of the device; None before it is measured.
    """

    device: torch.device
    tiny: bool
    seconds: float
    batch_size: int
    folder: Path
    ceiling: Ceiling | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def most(self) -> Ceiling:
        assert self.ceiling, "the device's ceiling is measured first"
        return self.ceiling

    @property
    def tars(self) -> list[Path]:
        return sorted((self.folder / "tars").glob("*.tar"))

    def config_keys(self, threads: int, **more: Any) -> dict[str, Any]:
        return keys(
            self.tars,
            threads,
            MODELS,
            device=0 if self.cuda else "cpu",
            batch_size=self.batch_size,
            weights_dir=str(self.folder / "checkpoints"),
            allow_unpublished_weights=True,
            **more,
        )

    def config(self, **more: Any) -> Config:
        given = self.config_keys(THREADS[-1], output_metadata_dir=str(self.folder / "out"), **more)
        return Config(**given)

    def graph(self, **more: Any) -> Graph:
        config = self.config(**more)
        return Graph(config, Toolbox.of(config), self.device)

    def uncompiled(self) -> Graph:
        with patch.object(graphs, "PAYS_AFTER", sys.maxsize):
            return self.graph()

    def batch(self) -> Batch:
        """What the loader makes of the first tar."""
        return next(batches(self.config(), self.folder))

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def wait(self) -> None:
        if self.cuda:
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


def device(bench: Bench) -> Iterator[Row]:
    """The ceilings: large matrix products, and large copies within the device."""
    side, dtype = (8192, torch.float16) if bench.cuda else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in "ab")
    flops = max(bench.rate(lambda: a @ b) for _ in range(3)) * 2 * side**3
    source = torch.empty(2**32 if bench.cuda else 2**24, device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    moved = bench.rate(lambda: target.copy_(source)) * 2 * source.numel()
    yield {
        "part": "device",
        "name": torch.cuda.get_device_name(bench.device) if bench.cuda else "cpu",
        "tflops": flops / 1e12,
        "bandwidth_tb": moved / 1e12,
    }


def tests(bench: Bench) -> Iterator[Row]:
    """The project's own tests that need a device, their failures by name."""
    told = bench.folder / "tests.xml"
    # Warnings are printed, not raised: another version of torch warns of itself.
    options = ["-q", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={told}"]
    subprocess.run([sys.executable, "-m", "pytest", "tests/gpu", *options], cwd=ROOT)
    cases = list(ET.parse(told).getroot().iter("testcase"))
    by_end: dict[str, list[str]] = {"passed": [], "skipped": [], "failure": [], "error": []}
    for case in cases:
        ends = [end for end in ("failure", "error", "skipped") if case.find(end) is not None]
        by_end[ends[0] if ends else "passed"].append(str(case.get("name")))
    counts = {end: len(names) for end, names in by_end.items()}
    failed = by_end["failure"] + by_end["error"]
    yield {"part": "tests", "name": "tests/gpu", **counts, "failed": failed}


def models(bench: Bench) -> Iterator[Row]:
    """Each model alone, as it is, its inputs where it takes them."""
    graph, batch = bench.uncompiled(), bench.batch()
    yield from page_locked(bench, batch)
    with graph:
        for row, _ in _models(bench, graph, batch, RECORDED):
            yield row


def whole(bench: Bench) -> Iterator[Row]:
    """All models with resident inputs, without loading and writing."""
    batch = bench.batch()
    for mode, make in ((PLAIN, partial(bench.graph, compile=False)), (RECORDED, bench.uncompiled)):
        with make() as graph:
            yield _whole(bench, graph, batch, mode)
        del graph
        bench.free()


def compiled(bench: Bench) -> Iterator[Row]:
    """The nets that `compile: auto` compiles, and all models with these."""
    backend = "eager" if bench.tiny else "inductor"
    asked: list[Any] = []

    def at_once(rows: int, net: Any, run: Any, **_: Any) -> None:
        asked.append(net)
        compile_for(rows, net, backend=backend, run=run)

    with patch.object(graphs, "compile_for", at_once):
        graph, batch = bench.graph(compile="auto" if bench.cuda else True), bench.batch()
    with graph:
        for row, name in _models(bench, graph, batch, COMPILED):
            if getattr(graph.models[name], "image_net", None) in asked:
                yield row
        yield _whole(bench, graph, batch, COMPILED)


def tar(bench: Bench) -> Iterator[Row]:
    """Tars to files, most threads first: as it is, compiled, and kernel by kernel."""
    for threads in reversed(THREADS):
        keys = bench.config_keys(threads)
        yield {**tar_to_files(keys, bench.device), "mode": RECORDED}
        bench.free()
        if threads == THREADS[-1] and not bench.tiny:
            with patch.object(graphs, "PAYS_AFTER", 0):
                yield {**tar_to_files(keys, bench.device), "mode": COMPILED}
            bench.free()
            keys = bench.config_keys(threads, compile=False)
            yield {**tar_to_files(keys, bench.device), "mode": PLAIN}
            bench.free()


def conventional(bench: Bench) -> Iterator[Row]:
    """The conventional loop on the same nets."""
    graph = bench.graph()
    for workers in THREADS[:1] if bench.tiny else THREADS[::-1]:
        size = min(bench.batch_size, gpu_conventional.MOST_ROWS)
        yield gpu_conventional.measure(graph, bench.tars, workers, size, bench.seconds)


def attention(bench: Bench) -> Iterator[Row]:
    """Which kernel torch picks, and what cuDNN's plans for shapes not seen before would take."""
    if not bench.cuda:
        return
    shapes = {"images": (512, 16, 257, 64), "texts": (64, 12, 40, 64)}
    for name, shape in shapes.items():
        for cudnn in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            took = []
            for i in range(6):  # each time of another length
                b, h, length, d = shape
                q = torch.randn(b, h, length + i, d, device=bench.device, dtype=torch.float16)
                mask = None
                if name == "texts":
                    mask = torch.zeros(length + i, length + i, device=bench.device, dtype=q.dtype)
                for _ in range(2):
                    bench.wait()
                    started = time.perf_counter()
                    out = scaled_dot_product_attention(q, q, q, attn_mask=mask)
                    bench.wait()
                    took.append(time.perf_counter() - started)
            first, again = sorted(took[2::2])[2], sorted(took[3::2])[2]
            with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
                out = scaled_dot_product_attention(q, q, q, attn_mask=mask)
                bench.wait()
            del out
            yield {
                "part": "attention",
                "name": name,
                "mode": "cuDNN allowed" if cudnn else "as the graph sets it",
                "new_shape_ms": first * 1e3,
                "known_shape_ms": again * 1e3,
                "kernels": list(_kernels(seen)),
            }


@torch.no_grad()
def _models(bench: Bench, graph: Graph, batch: Batch, mode: str) -> Iterator[tuple[Row, str]]:
    """Each model's figures and its name."""
    cache: dict[str, Any] = {}
    sent: list[Any] = []
    finished = graph._finished(batch.inputs, sent)
    for name in graph.models:
        wanted = graph.toolbox.specs[name].inputs
        arguments = graph._arguments(name, finished, cache, wanted)
        work = partial(graph._run, name, arguments, graph.dtype)
        started = time.perf_counter()
        cache[name] = work()
        bench.wait()
        first = time.perf_counter() - started
        with _uncompiled(graph), Counting(bench.most, bench.device) as cost:
            work()
        row = {"part": "model", "name": name, "first_seconds": first}
        yield {**row, **_speed(bench, work, batch, mode, cost)}, name


def _uncompiled(graph: Graph) -> ExitStack:
    """Operations are counted in the nets themselves, not in what they are compiled to or recorded
    as."""
    stack = ExitStack()
    stack.enter_context(patch.object(graph._graphs, "_on", False))
    for model in graph.models.values():
        if (net := getattr(model, "image_net", None)) is not None:
            stack.enter_context(patch.object(net, "forward", partial(type(net).forward, net)))
    return stack


@torch.no_grad()
def _whole(bench: Bench, graph: Graph, batch: Batch, mode: str) -> Row:
    """All models, batch after batch, from inputs on the device to outputs on the host."""
    inputs = graph._copies.send({i: v for i, v in batch.inputs.items() if i[0] != "text"})
    resident = Batch(batch.keys, {**batch.inputs, **inputs}, batch.fields)
    outputs = graph.run(cycle([resident]))
    started = time.perf_counter()
    next(outputs)
    first = time.perf_counter() - started
    with _uncompiled(graph), Counting(bench.most, bench.device) as cost:
        next(outputs)
    row = {"part": "graph", "name": f"{len(graph.models)} models", "first_seconds": first}
    for _ in range(AFTER):
        next(outputs)
    row |= _speed(bench, lambda: next(outputs), batch, mode, cost)
    if bench.cuda:
        row["reserved_gb"] = torch.cuda.max_memory_reserved(bench.device) / 1e9
    return {**row, "recomputed": next(outputs).recomputed}


def _speed(bench: Bench, work: Callable[[], object], batch: Batch, mode: str, cost: Cost) -> Row:
    """Speed, its shares of the ceilings, and what the device was given for a batch.

    `idle` is the share of the time in which no kernel ran, by the kernels' own times.
    """
    rows = len(batch.keys)
    rate = bench.rate(work) * rows
    tflops = rate * cost.flops / rows / 1e12
    roofline = rows / cost.seconds if cost.seconds else 0.0
    row = {
        "mode": mode,
        "samples_per_second": rate,
        "gflop_per_sample": cost.flops / rows / 1e9,
        "mb_per_sample": cost.bytes / rows / 1e6,
        "tflops": tflops,
        "share": tflops * 1e12 / bench.most.flops,
        "roofline": roofline,
        "of_roofline": rate / roofline if roofline else 0.0,
    }
    if not bench.cuda:
        return row
    seen = _profiled(bench, work)
    return {**row, **seen, "idle": max(0.0, 1 - seen["kernel_ms"] * rate / rows / 1e3)}


def _profiled(bench: Bench, work: Callable[[], object]) -> Row:
    """Launches, waits and the longest kernels of a batch."""
    work()
    bench.wait()
    with profile(activities=ACTIVITIES, acc_events=True) as seen:
        work()
        bench.wait()
    kernels = _kernels(seen)
    longest = sorted(kernels, key=lambda key: kernels[key], reverse=True)[:KERNELS]
    calls = {event.key: event.count for event in seen.key_averages()}

    def count(*starts: str) -> int:
        return sum(number for key, number in calls.items() if key.startswith(starts))

    return {
        "launches": count(*LAUNCHES),
        "waits": count(*WAITS) - 1,  # less the one above
        "mallocs": count("cudaMalloc"),
        "kernel_ms": sum(kernels.values()),
        "kernels": {key: round(kernels[key], 3) for key in longest},
    }


def _kernels(seen: Any) -> dict[str, float]:
    """Milliseconds of the kernels by the beginning of their names, which are long."""
    found: Counter[str] = Counter()
    for event in seen.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.key[:120]] += event.self_device_time_total / 1e3
    return {key: ms for key, ms in found.items() if ms and "Activity Buffer" not in key}


def page_locked(bench: Bench, batch: Batch) -> Iterator[Row]:
    """Page-locked memory of a batch, and what is taken for it."""
    if not bench.cuda:
        return
    tensors = [t for t in batch.inputs.values() if isinstance(t, torch.Tensor)]
    taken: list[int] = []

    def locked(size: int, device: torch.device) -> Any:
        taken.append(size)
        return own(size, device)

    own = blocks.locked
    with patch.object(blocks, "locked", locked):
        allocate = blocks.Reused(bench.batch_size, bench.device)
        held = [blocks.like(tensor, allocate) for tensor in tensors]
    needed = sum(t.numel() * t.element_size() for t in held)
    yield {
        "part": "page-locked",
        "name": "a batch",
        "needed_mb": needed / 1e6,
        "taken_mb": sum(taken) / 1e6,
    }


PARTS: dict[str, tuple[Callable[[Bench], Iterator[Row]], float]] = {
    "device": (device, 1),
    "tests": (tests, 3),
    "attention": (attention, 1),
    "models": (models, 3),
    "graph": (whole, 2),
    "compiled": (compiled, 5),
    "tar": (tar, 3),
    "conventional": (conventional, 2),
}
"""Each part, and its minutes at most."""
