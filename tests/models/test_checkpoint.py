from __future__ import annotations

import argparse
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2m_hpc.errors import WeightsError
from d2m_hpc.models import clip, dedup, toxicity
from d2m_hpc.models.checkpoint import Weights, fill, state_of


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_tensors_and_plain_training_arguments_are_read(tmp_path: Path) -> None:
    content = {"args": argparse.Namespace(input_size=512), "state_dict": {"x": torch.ones(2)}}
    torch.save(content, tmp_path / "a.pt")
    loaded = Weights(tmp_path).load("a.pt")
    assert loaded["args"].input_size == 512
    assert torch.equal(loaded["state_dict"]["x"], torch.ones(2))


def test_what_a_checkpoint_would_execute_is_not_executed(tmp_path: Path) -> None:
    torch.save({"x": _Evil(tmp_path / "made")}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a\.pt cannot be read as a checkpoint"):
        Weights(tmp_path).load("a.pt")
    assert not (tmp_path / "made").exists()


def test_a_missing_file_is_named_with_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"a\.pt is missing; run `d2m weights"):
        Weights(tmp_path).load("a.pt")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", pickle.dumps([1]), b"PK\3\4"])
def test_a_file_that_is_no_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"a\.pt"):
        Weights(tmp_path).load("a.pt")["state_dict"]


A_NET = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_nets_tensors_are_found_in_a_training_checkpoint(prefix: str, wrapped: bool) -> None:
    state = {prefix + name: tensor for name, tensor in A_NET.items()}
    content = {"epoch": 3, "state_dict": state, "optimizer": {"lr": 1e-3}} if wrapped else state
    found = state_of(content)
    assert found.keys() == A_NET.keys()
    assert all(found[name] is tensor for name, tensor in A_NET.items())


def test_a_prefix_that_not_all_have_is_part_of_the_name() -> None:
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert state_of(state).keys() == state.keys()


@pytest.mark.parametrize(
    "content", [[], 3, {}, {"state_dict": {}}, {"model": {"a": torch.ones(1)}}]
)
def test_what_holds_no_state_dict_is_said(content: object) -> None:
    with pytest.raises(ValueError, match="it holds no state dict"):
        state_of(content)


def _old(tensor: torch.Tensor) -> bytes:
    torch.save(tensor, file := io.BytesIO(), _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            nn.Linear(1, 1),
            r"it holds a torch\.nn\.modules\.linear\.Linear, and only tensors are lo",
        ),
        (
            {"path": Path("x")},
            r"it holds a pathlib\.PosixPath, .*; save the net's `state_dict\(\)`",
        ),
        ("TorchScript", "it is a TorchScript archive"),
        (b"", "it is empty"),
        (b"hello", "it is damaged, or no file of torch's"),
        (pickle.dumps([1]), "it is damaged, or no file of torch's"),
        (_old(torch.ones(9))[:30], "it is damaged, or no file of torch's"),
        (_old(torch.ones(9))[:-8], "it is damaged, or no file of torch's"),
    ],
    ids=["net", "object", "TorchScript", "empty", "text", "pickle", "half", "without its end"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_torch_says_is_told_in_words_for_users(
    content: object, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1)), str(path))
    else:
        torch.save(content, path)
    with pytest.raises(
        WeightsError, match=rf"a\.pt cannot be read as a checkpoint: {told}"
    ) as found:
        Weights(tmp_path).load("a.pt")
    assert "weights_only" not in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("load", [dedup.load, lambda w: clip.load(w, "ViT-B-32.pt"), toxicity.load])
def test_no_random_values_are_drawn_for_a_net_that_has_a_checkpoints(
    load: Callable[[Weights], Any], checkpoints: Path
) -> None:
    """They took half of the time in which a large net is loaded."""
    before = torch.get_rng_state()
    first, again = (load(Weights(checkpoints)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    nets = [made[0] if isinstance(made, tuple) else made for made in (first, again)]
    one, other = (net.state_dict() for net in nets)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_net_takes_a_checkpoints_tensors_as_its_own_and_in_its_types() -> None:
    net = nn.BatchNorm1d(3).eval()
    state = net.state_dict() | {
        "weight": torch.tensor([1.0, 2, 3]),
        "bias": torch.tensor([1.0, 2, 3], dtype=torch.half),
        "running_mean": torch.arange(6.0)[::2],
    }
    fill(net, state)
    assert net.weight.data_ptr() == state["weight"].data_ptr()
    assert net.weight.requires_grad
    assert net.bias.dtype == torch.float32
    assert net.bias.tolist() == [1, 2, 3]
    assert net.running_mean is not None
    assert net.running_mean.is_contiguous()
    assert net.running_mean.tolist() == [0, 2, 4]
    for wrong in (state | {"more": torch.ones(1)}, {"weight": torch.ones(3)}):
        with pytest.raises(RuntimeError, match="Error"):
            fill(net, wrong)


def test_a_clip_of_halves_is_that_of_the_same_values_in_float32(
    checkpoints: Path, tmp_path: Path
) -> None:
    state = state_of(Weights(checkpoints).load("ViT-B-32.pt"))
    nets = []
    for change in (Tensor.half, lambda t: t.half().float()):
        torch.save({n: change(t) for n, t in state.items()}, tmp_path / "a.pt")
        nets.append(clip.load(Weights(tmp_path), "a.pt"))
    pairs = zip(*(net.state_dict().items() for net in nets), strict=True)
    assert all(
        n == m and torch.equal(a, b) and a.dtype == torch.float32 for (n, a), (m, b) in pairs
    )
    mask = nets[0].attn_mask
    assert torch.equal(mask, torch.full(mask.shape, -torch.inf).triu(1))
    assert not any(t.is_meta for t in (*nets[0].parameters(), *nets[0].buffers()))
