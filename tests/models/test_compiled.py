from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from d2m_hpc.models import clip, dedup, scrfd
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.compiled import compile_for, is_convolutional

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_only_batches_of_the_one_size_are_compiled_and_those_once() -> None:
    net, counter = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), CompileCounter()
    images = torch.rand(4, 3, 8, 8)
    expected = net(images)
    compile_for(4, net, backend=counter)
    for rows in (1, 2, 4, 3, 4):
        np.testing.assert_allclose(net(images[:rows]).numpy(), expected[:rows].numpy(), atol=1e-6)
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_batch_that_is_nearly_full_is_padded(layout: torch.memory_format) -> None:
    """More than halves alone: those come of memory that is too small for more."""
    net, compiled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), list[int]()
    images, ran = torch.rand(8, 3, 8, 8).contiguous(memory_format=layout), list[int]()
    expected = net(images)

    def backend(module: Any, given: Any) -> Any:
        compiled.append(1)
        return lambda *values: ran.append(1) or module(*values)

    compile_for(8, net, backend=backend)
    for rows in (8, 7, 5, 6, 4):
        found = net(images[:rows])
        np.testing.assert_allclose(found.numpy(), expected[:rows].numpy(), atol=1e-6)
    assert (len(compiled), len(ran)) == (1, 3)


def _image_net(name: str, weights: Weights) -> nn.Module:
    if name == "scrfd":
        return scrfd.ScrfdNet().eval()
    made = {"clip": clip.ClipB32, "isc": dedup.IscFtV107}[name](CPU, weights)
    net: nn.Module = made.image_net
    return net


@torch.no_grad()
@pytest.mark.parametrize(("name", "side"), [("clip", 224), ("scrfd", 224), ("isc", 128)])
def test_every_image_net_is_traced_in_one_piece(name: str, side: int, checkpoints: Path) -> None:
    """Breaks in the graph would cost what compiling is to save."""
    net, counter = _image_net(name, Weights(checkpoints)), CompileCounter()
    images = torch.rand(2, 3, side, side)
    expected = _joined(net(images))
    compile_for(2, net, backend=counter)
    for _ in range(2):
        np.testing.assert_allclose(_joined(net(images)), expected, atol=1e-5)
    assert counter.frame_count == 1


def _joined(output: Any) -> Tensor:
    """All values of an output, tuples and all."""
    if isinstance(output, tuple):
        return torch.cat([_joined(part) for part in output])
    values: Tensor = output.flatten()
    return values


@torch.no_grad()
def test_compiled_outputs_are_those_of_the_net_itself_up_to_rounding() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU()).eval()
    images = torch.rand(2, 3, 8, 8)
    expected = net(images)
    compile_for(2, net)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(images)
    np.testing.assert_allclose(net(images).numpy(), expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(half.float().numpy(), expected.numpy(), atol=2e-2)


@torch.no_grad()
def test_a_net_is_compiled_after_as_many_full_batches_as_are_asked_for() -> None:
    net, counter = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), CompileCounter()
    compile_for(4, net, backend=counter, after=2)
    images, frames = torch.rand(4, 3, 8, 8), []
    for rows in (4, 3, 4, 4, 4):
        net(images[:rows])
        frames.append(counter.frame_count)
    assert frames == [0, 0, 0, 1, 1]


@torch.no_grad()
def test_what_is_run_again_at_another_precision_is_not_compiled_for() -> None:
    net, counter = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), CompileCounter()
    compile_for(4, net, backend=counter)
    images = torch.rand(4, 3, 8, 8)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert net(images).dtype == torch.bfloat16
        assert net(images).dtype == torch.float32
    assert counter.frame_count == 1


def _broken(*given: Any) -> Any:
    raise RuntimeError("no C compiler found\nat length")


@torch.no_grad()
def test_a_compiler_that_fails_is_told_once_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    images = torch.rand(4, 3, 8, 8)
    expected = net(images)
    compile_for(4, net, backend=_broken, need=False)
    for _ in range(2):
        assert torch.equal(net(images), expected)
    [said] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "Sequential cannot be compiled and runs as it is" in said
    assert "no C compiler found" in said
    compile_for(4, net, backend=_broken)
    with pytest.raises(RuntimeError, match="no C compiler found"):
        net(images)


def test_nets_of_convolutions_gain_by_it(checkpoints: Path) -> None:
    weights = Weights(checkpoints)
    assert {
        name: is_convolutional(_image_net(name, weights)) for name in ("clip", "scrfd", "isc")
    } == {
        "clip": False,
        "scrfd": True,
        "isc": True,
    }
