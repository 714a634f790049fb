from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from d2m_hpc.models import onnx_header
from d2m_hpc.models.headers import fault, shapes

NET = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))
TOLD = {name: tuple(tensor.shape) for name, tensor in NET.state_dict().items()}


@pytest.mark.parametrize(
    "content",
    [
        NET.state_dict(),
        {"epoch": 3, "optimizer": torch.optim.Adam, "state_dict": NET.state_dict()},
        {name: nn.Parameter(tensor.float()) for name, tensor in NET.state_dict().items()},
    ],
)
def test_shapes_in_a_file_of_torch_are_known_without_torch(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "net.pt")
    assert shapes(tmp_path / "net.pt") == TOLD


def test_shapes_of_other_formats_are_in_the_order_of_layers(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.ones(2, 3) for i in (0, 2, 10)}
    save_file(state, tmp_path / "net.safetensors")
    assert [*shapes(tmp_path / "net.safetensors")] == [*state]
    np.savez_compressed(tmp_path / "net.npz", coefs_10=np.ones((2, 3)), coefs_9=np.ones((4, 2)))
    assert shapes(tmp_path / "net.npz") == {"coefs_9": (4, 2), "coefs_10": (2, 3)}


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('run')",))


def test_what_only_torch_reads_is_left_to_it_and_nothing_of_it_is_run(tmp_path: Path) -> None:
    for content in (NET, {"x": _Evil()}, [1]):
        torch.save(content, tmp_path / "net.pt")
        assert shapes(tmp_path / "net.pt") == {}
    torch.save(NET.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert shapes(tmp_path / "old.pt") == {}


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net.npz"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_file_that_is_cut_is_told(name: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "net.npz":
        np.savez(path, coef_=np.ones((3, 300)))
    else:
        state = {"weight": torch.ones(30, 30)}
        save_file(state, path) if name == "net.safetensors" else torch.save(state, path)
    assert fault(path) == ""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    assert ("is cut" if part else "is empty") in fault(path)
    assert "\n" not in fault(path)
    with pytest.raises(ValueError, match="copy or fetch it again"):
        shapes(path)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
        (b"<!doctype html><title>Sign in</title>", "is a web page"),
    ],
)
def test_what_came_in_place_of_a_checkpoint_is_told(data: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(data)
    assert told in fault(tmp_path / "net.pth")
    (tmp_path / "page.html").write_bytes(data)
    assert fault(tmp_path / "page.html") == fault(tmp_path / "none.pt") == ""


@pytest.mark.parametrize("data", [b"", b"no net", b"\x0a" + b"\xff" * 20, b"\x3a\x05\x01", b"{}"])
def test_a_file_that_is_no_onnx_is_told(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(data)
    with pytest.raises(ValueError, match="is cut, or no ONNX file"):
        onnx_header.read(tmp_path / "net.onnx")
