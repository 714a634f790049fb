"""What is recorded as a CUDA graph, and what runs as it is; its values are in tests/gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from d2m_hpc.models.recorded import AFTER, MOST, CudaGraphs


def _started() -> CudaGraphs:
    graphs = CudaGraphs(torch.device("cuda", 0))
    graphs.start()
    return graphs


def _twice(given: Tensor) -> tuple[Tensor, list[Tensor]]:
    return given * 2, [given + 1]


def several_shapes(gpu: Any) -> list[int]:
    graphs, launched = _started(), []
    tensors = [torch.zeros(rows, 4, device="cuda") for rows in (8, 16)]
    for _ in range(AFTER + 2):
        for tensor in tensors:
            gpu.reset()
            doubled, [more] = graphs.run("twice", _twice, tensor)
            assert doubled.shape == more.shape == tensor.shape
            launched.append(
                gpu.count("cudaGraphInstantiate") * 100 + gpu.count("kernel in a graph")
            )
    graphs.stop()
    assert not graphs.has_recorded
    return launched


def test_each_shape_is_recorded_after_some_runs(nogpu: Any) -> None:
    first, again = [102, 102], [2, 2]
    assert nogpu(several_shapes) == [0, 0] * AFTER + first + again


def waiting(gpu: Any) -> list[tuple[int, int]]:
    graphs, counts = _started(), []
    tensor = torch.zeros(8, device="cuda")
    for _ in range(AFTER + 3):
        gpu.reset()
        graphs.run("waits", lambda given: given + float(given.sum()), tensor)
        counts.append((gpu.count("kernel"), gpu.count("cudaGraphLaunch")))
    torch.zeros(1 << 20, device="cuda").sum().item()  # the device is as good as before
    return counts


def test_what_looks_at_values_runs_as_it_is(nogpu: Any) -> None:
    counts = nogpu(waiting)
    del counts[AFTER]  # to begin recording, some versions of torch launch kernels of their own
    assert len({*map(tuple, counts)}) == 1
    kernels, graphs = counts[0]
    assert kernels > 1
    assert graphs == 0


def many(gpu: Any) -> int:
    graphs = _started()
    for rows in range(1, MOST + 9):
        for _ in range(AFTER + 1):
            graphs.run("twice", _twice, torch.zeros(rows, device="cuda"))
    return len(graphs._made)


def test_shapes_that_are_too_many_are_not_recorded(nogpu: Any) -> None:
    assert nogpu(many) == MOST


def scarce(gpu: Any) -> dict[str, Any]:
    graphs = _started()
    large = torch.zeros(40 << 18, device="cuda")  # 40 MB, of 100

    def thrice(given: Tensor) -> Tensor:
        return given * 2

    for _ in range(AFTER + 2):
        made = graphs.run("large", thrice, large)
        del made
    small = torch.zeros(8, device="cuda")
    for _ in range(AFTER + 2):
        graphs.run("small", _twice, small)
    return {"recorded": graphs.has_recorded, "gave up": graphs.give_up()}


def test_what_does_not_fit_is_not_recorded_and_still_computed(nogpu: Any) -> None:
    assert nogpu(scarce, memory=100 << 20) == {"recorded": False, "gave up": False}


def after_one_that_waits(gpu: Any) -> bool:
    graphs, tensor = _started(), torch.zeros(8, device="cuda")
    for key, function in (("waits", lambda given: given + float(given.sum())), ("twice", _twice)):
        for _ in range(AFTER + 1):
            graphs.run(key, function, tensor)
    return graphs.has_recorded


def test_others_are_recorded_after_one_that_cannot_be(nogpu: Any) -> None:
    assert nogpu(after_one_that_waits)


def cached(gpu: Any, others: int) -> list[bool]:
    graphs, given = _started(), torch.zeros(1 << 18, device="cuda")
    for _ in range(others * (AFTER + 1)):
        graphs.run("twice", _twice, torch.zeros(8, device="cuda"))

    def spread(given: Tensor) -> Tensor:
        return given.repeat(60)[:1].clone()  # 60 MB, of 100, which stay cached

    for _ in range(AFTER + 1):
        graphs.run("spread", spread, given)
    return [made is not None for made in graphs._made.values()]


@pytest.mark.parametrize("others", [0, 1])
def test_what_earlier_runs_used_is_given_back_where_it_is_needed(others: int, nogpu: Any) -> None:
    assert nogpu(cached, others, memory=100 << 20) == [True] * (others + 1)


def off(gpu: Any) -> int:
    for graphs in (
        CudaGraphs(torch.device("cuda", 0), allowed=False),
        CudaGraphs(torch.device("cuda")),
    ):
        if not graphs._allowed:
            graphs.start()
        for _ in range(AFTER + 2):  # the second one was not started
            graphs.run("twice", _twice, torch.zeros(8, device="cuda"))
    return gpu.count("cudaGraphInstantiate")


def test_nothing_is_recorded_where_it_is_not_allowed_or_not_started(nogpu: Any) -> None:
    assert nogpu(off) == 0
