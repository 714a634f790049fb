"""Page-locked memory: as much as is asked for, given back, and refused as the node's fault."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from d2m_hpc.errors import NodeError
from d2m_hpc.models.blocks import Reused
from d2m_hpc.models.transfer import CudaCopies, page_locked, to_device
from d2m_hpc.worker.batch import collate

SHAPE = (30, 3, 224, 224)
PAGE = 4096


def locking(gpu: Any) -> dict[str, Any]:
    device = torch.device("cuda", 0)
    memory, seen = Reused(SHAPE[0], device), []
    for _ in range(3):
        batch = memory(SHAPE, torch.uint8)
        seen.append((batch.data_ptr(), batch.is_pinned()))
        del batch
    taken = gpu.count("pinned bytes")
    kept, smaller = memory(SHAPE, torch.uint8), memory((7, *SHAPE[1:]), torch.uint8)
    two = gpu.count("pinned bytes")
    del memory
    held = gpu.count("pinned bytes")
    del kept, smaller
    gc.collect()
    left = gpu.count("pinned bytes")
    return {"seen": seen, "taken": taken, "two": two, "held": held, "left": left}


def test_batches_take_whole_pages_and_no_more(nogpu: Any) -> None:
    found = nogpu(locking)
    [(_, is_pinned)] = {tuple(pair) for pair in found["seen"]}
    assert is_pinned
    size = -(-30 * 3 * 224 * 224 // PAGE) * PAGE
    assert (found["taken"], found["two"], found["held"]) == (size, 2 * size, 2 * size)
    assert found["left"] == 0


def copying(gpu: Any) -> dict[str, Any]:
    device = torch.device("cuda", 0)
    copies = CudaCopies(device)
    source = torch.arange(6.0).view(2, 3)
    counts = []
    for _ in range(3):
        there = to_device(source, device)
        sliced = torch.zeros(4, 2, 3, device=device).permute(2, 0, 1)[1:]
        fetched = copies.fetch({"a": (there, sliced), "b": "text"})
        copies.mark()()
        counts.append(gpu.count("cudaHostRegister"))
        a, b = fetched["a"]
        layout = [[*a.shape], a.is_pinned(), [*b.shape], b.is_pinned(), fetched["b"]]
        kept = [part.is_pinned() for part in copies.kept(fetched)["a"]]
        del fetched, a, b
    again = page_locked(device) is page_locked(device)
    return {"counts": counts, "layout": layout, "kept": kept, "again": again}


def test_small_copies_use_the_same_memory_again(nogpu: Any) -> None:
    found = nogpu(copying)
    assert len(set(found["counts"])) == 1
    assert found["layout"] == [[2, 3], True, [2, 4, 2], True, "text"]
    assert found["kept"] == [False, False]
    assert found["again"]


def refused(gpu: Any) -> list[str]:
    """What a loader's thread and a caller are told on a GPU that has failed."""
    device = torch.device("cuda", 0)
    ones = torch.ones(4, device=device)
    gpu.die_after(0)
    with pytest.raises(torch.AcceleratorError):
        ones + 1
    with pytest.raises(NodeError) as error:
        collate([torch.zeros(3)] * 2, Reused(2, device))
    return [str(error.value)]


def test_memory_that_cannot_be_had_is_the_nodes_fault(nogpu: Any) -> None:
    assert nogpu(refused) == [
        "CUDA gives no 4,096 bytes of page-locked memory: an illegal memory access was encountered"
    ]


def test_a_gpus_error_is_not_put_down_to_a_preprocessor() -> None:
    def allocate(shape: Any, dtype: torch.dtype) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: out of memory")

    with pytest.raises(torch.AcceleratorError):
        collate([torch.zeros(3)], allocate)
