"""That a recorded net computes what it computes kernel by kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2m_hpc.models.recorded import AFTER, CudaGraphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda", 0)


def test_what_one_call_gives_stays_when_the_next_is_made() -> None:
    graphs = CudaGraphs(CUDA)
    graphs.start()
    big = torch.rand(4096, 4096, device=CUDA)

    def work(given: Tensor) -> tuple[Tensor, Tensor]:
        return (given @ big) @ big, given * 2

    given = [torch.rand(512, 4096, device=CUDA) for _ in range(12)]
    made = [graphs.run("work", work, tensor) for tensor in given]
    assert graphs.has_recorded
    for tensor, (product, twice) in zip(given, made, strict=True):
        assert torch.equal(twice, tensor * 2)
        torch.testing.assert_close(product, work(tensor)[0])
    graphs.stop()


def test_recording_leaves_memory_to_others() -> None:
    """Several shapes take turns in one pool, which is free again afterwards."""
    graphs = CudaGraphs(CUDA)
    graphs.start()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(CUDA)

    def work(given: Tensor) -> Tensor:
        for _ in range(6):
            given = given.repeat(2, 1)[: len(given)] * 1.5
        return given.sum(dim=0)

    for rows in (4096, 2048, 1024):
        tensor = torch.rand(rows, 4096, device=CUDA)
        for _ in range(AFTER + 2):
            graphs.run("work", work, tensor)
    del tensor
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(CUDA) - before
    assert held < 10 * 4096 * 4096 * 4
    graphs.stop()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(CUDA) - before < 4096 * 4096 * 4


def test_what_looks_at_values_runs_as_it_is() -> None:
    graphs = CudaGraphs(CUDA)
    graphs.start()
    for number in range(AFTER + 3):
        given = torch.full((8,), float(number), device=CUDA)
        made = graphs.run("waits", lambda tensor: tensor + float(tensor.sum()), given)
        assert torch.equal(made, given + 8 * number)
    assert not graphs.has_recorded
    graphs.stop()
