"""ONNX nets run by onnxruntime, on the device that torch uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

ROWS = 64
"""Images that a net is given at once on the CPU, where it may not take a whole batch's memory."""


def providers(device: torch.device) -> list[Any]:
    """CUDA's where the device and the installed onnxruntime have it, and the CPU's."""
    cpu = "CPUExecutionProvider"
    if (
        device.type != "cuda"
        or "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    ):
        return [cpu]
    return [("CUDAExecutionProvider", {"device_id": device.index or 0}), cpu]


def options(threads: int) -> onnxruntime.SessionOptions:
    """Of a net that computes on so many cores; without bounds it takes all of the machine's."""
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads, made.inter_op_num_threads = threads, 1
    # Threads that spin while they wait would take the cores from those that decode.
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return made


class OnnxNet:
    """A net with one input of images.

    Args:
        input_name: of its input; may be empty.

    Raises:
        ValueError: it has no such input.
    """

    def __init__(self, path: Path, device: torch.device, input_name: str = "") -> None:
        threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            str(path), sess_options=options(threads), providers=providers(device)
        )
        self.outputs = [output.name for output in self.session.get_outputs()]
        given = {each.name: each for each in self.session.get_inputs()}
        if len(given) > 1:
            raise ValueError(f"it takes {', '.join(given)}; valid is a net that takes images alone")
        self.input_name = input_name or next(iter(given))
        if self.input_name not in given:
            raise ValueError(f"it has no input {input_name!r}, but {', '.join(given)}")
        is_cuda = "CUDAExecutionProvider" in self.session.get_providers()
        self.device = device if is_cuda else torch.device("cpu")
        found = given[self.input_name]
        self.type = {"tensor(uint8)": torch.uint8, "tensor(float16)": torch.float16}.get(
            found.type, torch.float32
        )
        rows = found.shape[0] if found.shape else None
        self.fixed = rows if isinstance(rows, int) else 0

    def __call__(self, pixels: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Run the net on a batch, in the parts that it takes.

        Args:
            names: of outputs, of which each has a row an image.
        """
        pixels = pixels.to(self.device, self.type).contiguous()
        parts = [self._run(part, names) for part in self._parts(pixels)]
        return {
            name: torch.cat([part[i] for part in parts])[: len(pixels)]
            for i, name in enumerate(names)
        }

    def _parts(self, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        rows = self.fixed or (ROWS if self.device.type == "cpu" else len(pixels))
        for part in pixels.split(rows):  # type: ignore[no-untyped-call]
            missing = max(0, self.fixed - len(part))
            yield torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part

    def _run(self, part: torch.Tensor, names: Sequence[str]) -> list[torch.Tensor]:
        """Bound to torch's memory of the images, so that none is copied to the host and back."""
        kind, index = part.device.type, part.device.index or 0
        if kind == "cuda":
            torch.cuda.current_stream(part.device).synchronize()  # onnxruntime has another stream
        binding = self.session.io_binding()
        numpy_type = np.dtype(str(part.dtype).removeprefix("torch."))
        shape, address = list(part.shape), part.data_ptr()
        binding.bind_input(self.input_name, kind, index, numpy_type, shape, address)
        for name in names:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        return [torch.from_numpy(value.numpy()) for value in binding.get_outputs()]
