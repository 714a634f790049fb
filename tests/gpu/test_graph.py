"""The same workload on CUDA and on the CPU; and that nothing waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import DATACOMP, SHARDS, captions, photographs, write_config
from torch import Tensor, nn

from d2m_hpc import config as configs
from d2m_hpc.models.blocks import Reused
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options, Picture
from d2m_hpc.models.recorded import AFTER
from d2m_hpc.models.transfer import CudaCopies
from d2m_hpc.worker.batch import Batch, Outputs, collate
from d2m_hpc.worker.compute.graph import Graph
from d2m_hpc.worker.compute.resolve import Toolbox

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


def _graph(folder: Path, checkpoints: Path, device: torch.device, **more: Any) -> Graph:
    config = configs.load(
        write_config(
            folder / "config.yml",
            {**DATACOMP, "device": 0 if device == CUDA else "cpu", **more},
            input_tars=str(SHARDS / "00000.tar"),
            output_metadata_dir=str(folder / "out"),
            weights_dir=str(checkpoints),
            allow_unpublished_weights=True,
        )
    )
    return Graph(config, Toolbox.of(config), device)


def _batches(toolbox: Toolbox, size: int = 8) -> list[Batch]:
    pictures = [Picture(p) for p in photographs(24)]
    memory = Reused(size, CUDA)
    raw = {"image": pictures, "text": captions()[: len(pictures)]}
    made = {
        wanted: [p.prepare(value, Options()) for value in raw[wanted[0]]]
        for wanted, p in toolbox.inputs.items()
    }
    return [
        Batch(
            keys=[str(i) for i in range(start, start + size)],
            inputs={w: collate(v[start : start + size], memory) for w, v in made.items()},
            fields={},
        )
        for start in range(0, len(pictures), size)
    ]


def _all(outputs: list[Outputs]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in outputs[0].features:
        values[name] = np.concatenate([o.features[name] for o in outputs])
    for name in outputs[0].columns:
        values[name] = [value for o in outputs for value in o.columns[name]]
    return values


def _assert_close(ours: dict[str, Any], theirs: dict[str, Any], atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"face-boxes"}:
        np.testing.assert_allclose(ours[name], theirs[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("batch_size", [8, 512])
def test_float32_on_cuda_is_that_of_the_cpu(
    tmp_path: Path, checkpoints: Path, batch_size: int
) -> None:
    made = {}
    for device in (CUDA, CPU):
        graph = _graph(tmp_path, checkpoints, device, amp="off", batch_size=batch_size)
        with graph:
            made[device] = _all(list(graph.run(_batches(graph.toolbox))))
    _assert_close(made[CUDA], made[CPU], 2e-4)
    for ours, theirs in zip(made[CUDA]["face-boxes"], made[CPU]["face-boxes"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_batch_alone_gives_what_it_gives_in_the_pipeline(
    tmp_path: Path, checkpoints: Path
) -> None:
    """What a copy came too late for, or was given up too early, would differ."""
    graph = _graph(tmp_path, checkpoints, CUDA, batch_size=8)
    batches = _batches(graph.toolbox)
    with graph:
        alone = _all([graph(batch) for batch in batches])
        for _ in range(5):
            _assert_close(_all(list(graph.run(iter(batches)))), alone, 0)


@pytest.mark.parametrize("amp", ["auto", "off"])
def test_recorded_models_give_the_same(tmp_path: Path, checkpoints: Path, amp: Any) -> None:
    made, recorded = [], []
    for choice in (False, "auto"):
        graph = _graph(tmp_path, checkpoints, CUDA, amp=amp, batch_size=8, compile=choice)
        batches = _batches(graph.toolbox) * (AFTER + 2)
        with graph:
            made.append(_all(list(graph.run(batches))))
            recorded.append(len(graph._graphs._made))
    assert recorded[0] == 0
    assert recorded[1] >= 7
    kernel_by_kernel, as_one = made
    for name in kernel_by_kernel.keys() - {"face-boxes"}:
        np.testing.assert_allclose(as_one[name], kernel_by_kernel[name], atol=2e-3, err_msg=name)


def test_compiled_nets_give_the_same_up_to_rounding(tmp_path: Path, checkpoints: Path) -> None:
    made = []
    for compile_nets in (False, True):
        graph = _graph(tmp_path, checkpoints, CUDA, batch_size=8, compile=compile_nets)
        with graph:
            made.append(_all(list(graph.run(_batches(graph.toolbox)))))
    features = ("oai-clip-vit-b32-image", "oai-clip-vit-l14-image", "oai-clip-vit-l14-text")
    for name in features:
        np.testing.assert_allclose(made[0][name], made[1][name], atol=5e-3, err_msg=name)


def test_weights_and_images_lie_as_tensor_cores_read_them(
    tmp_path: Path, checkpoints: Path
) -> None:
    graph = _graph(tmp_path, checkpoints, CUDA, batch_size=8)
    for name in ("faces-scrfd10g", "dedup-isc-ft-v107"):
        convs = [m for m in graph.models[name].modules() if isinstance(m, nn.Conv2d)]
        layouts = [c.weight.is_contiguous(memory_format=torch.channels_last) for c in convs]
        assert layouts
        assert all(layouts)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error from here on."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_batch_is_launched_without_waiting_for_the_device(
    tmp_path: Path, checkpoints: Path
) -> None:
    graph = _graph(tmp_path, checkpoints, CUDA, batch_size=8)
    first, second, third = _batches(graph.toolbox)
    with graph:
        graph(first)  # constants are copied and algorithms chosen
        with no_waiting():
            launched = [graph.launch(second), graph.launch(third)]
        assert [len(made.outputs().keys) for made in launched] == [8, 8]


def test_copies_run_beside_the_computation() -> None:
    """A copy is there while kernels launched before it still run."""
    copies = CudaCopies(CUDA)
    pixels = torch.randint(0, 256, (64, 3, 512, 512), dtype=torch.uint8).pin_memory()
    big = torch.rand(8192, 8192, device=CUDA)
    copies.send(pixels)
    torch.cuda.synchronize()
    for _ in range(50):
        big = torch.tanh(big @ big)
    busy = torch.cuda.Event()
    busy.record()
    copies.send(pixels)
    assert copies._copying is not None
    copies._copying.synchronize()
    assert not busy.query()


def test_what_is_sent_and_fetched_is_what_was_given() -> None:
    copies, kept, there = CudaCopies(CUDA), [], []
    values = [torch.full((256, 1024), float(i)).pin_memory() for i in range(40)]
    for value in values:
        [copy] = copies.send([value])
        kept.append(copy)  # until the mark: on an H200 it was overwritten without
        there.append(copies.fetch({"twice": (copy * 2, "text")}))
    copies.mark()()
    for i, fetched in enumerate(there):
        twice, text = fetched["twice"]
        assert text == "text"
        assert twice.device == CPU
        assert bool((twice == 2 * i).all())


def test_every_preprocessor_finishes_alike_on_both_devices() -> None:
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    ours: Tensor = PREPROCESSORS["clip-aug"].finish(pixels.to(CUDA))
    expected = PREPROCESSORS["clip-aug"].finish(pixels)
    assert ours.stride() == expected.stride()
    np.testing.assert_allclose(ours.cpu().numpy(), expected.numpy(), atol=1e-6)


def test_rows_that_overflow_are_mended(tmp_path: Path, checkpoints: Path) -> None:
    graph = _graph(tmp_path, checkpoints, CUDA, batch_size=8)
    batches = _batches(graph.toolbox)
    net = graph.models["faces-scrfd10g"].net
    with graph, torch.no_grad():
        net.bbox_head.stride_reg[0].bias[0] = 1e5  # beyond float16, not beyond float32
        made = list(graph.run(batches))
    assert [outputs.recomputed for outputs in made] == [8, 8, 8]
    assert not any(outputs.rejections for outputs in made)
