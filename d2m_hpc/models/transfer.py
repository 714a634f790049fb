"""Copy between host and device without waiting before the values are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor changed that lies in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(each(part, change) for part in value)
    if isinstance(value, dict):  # outputs of transformers are dicts of a type of their own
        return type(value)({key: each(part, change) for key, part in value.items()})
    return value


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; the host goes on at once, and the device computes in turn."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # only from such memory does a copy not hold up the host
    return tensor.to(device, non_blocking=True)


def conv_layout(device: torch.device) -> torch.memory_format:
    """How images and the weights of convolutions lie in memory.

    Tensor cores read channels last. On the CPU that gains nothing and sums in an order that takes
    pictures of one colour away from the reference's descriptors, by 4e-4.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


class CudaCopies:
    """Copies to and from a device; this class alone knows of streams, which the CPU has none of."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copying: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, value: Any) -> Any:
        """The value on the device, copied while that still computes what it was given before.

        Kernels launched after this wait for the copy, the host does not. Pinned memory must hold
        the value until a mark that is set afterwards has been reached.
        """
        if self._copying is None:
            return each(value, lambda tensor: tensor.to(self.device))
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copying):
            sent = each(value, lambda tensor: tensor.to(self.device, non_blocking=True))
        computing.wait_stream(self._copying)
        # `record_stream` keeps the allocator from giving this memory to the next copy too early.
        each(sent, lambda tensor: _used_by(tensor, computing))
        return sent

    def fetch(self, value: Any) -> Any:
        """The value on the host, there once a mark that is set afterwards has been reached."""
        return each(value, lambda tensor: tensor.to("cpu", non_blocking=True))

    def mark(self) -> Callable[[], None]:
        """Mark what was launched so far; the answer waits until all of it is done.

        The answer raises the `torch.AcceleratorError` of a kernel that failed.
        """
        if self._copying is None:
            return lambda: None
        # Blocking, the host sleeps rather than spins: the decode threads need the cores.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize


def _used_by(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor
