"""Copy between host and device without waiting before the values are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from d2m_hpc.models.blocks import Reused, like


def each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor changed that lies in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(each(part, change) for part in value)
    if isinstance(value, dict):  # outputs of transformers are dicts of a type of their own
        return type(value)({key: each(part, change) for key, part in value.items()})
    return value


_small: list[Tensor] = []
"""Page-locked copies that a GPU may still read."""
_page_locked: dict[torch.device, Reused] = {}


def page_locked(device: torch.device) -> Reused:
    """Memory of the host from and to which a GPU copies without holding up the host."""
    return _page_locked.setdefault(device, Reused(0, device))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; the host goes on at once, and the device computes in turn."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = like(tensor, page_locked(device)).copy_(tensor)
        _small.append(tensor)
    return tensor.to(device, non_blocking=True)


def conv_layout(device: torch.device) -> torch.memory_format:
    """How images and the weights of convolutions lie in memory.

    Tensor cores read channels last. On the CPU that gains a tenth in float32, and sums in an order
    that takes pictures of one colour away from the reference's descriptors, by 4e-4.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def cast_early(images: Tensor) -> Tensor:
    """Images as autocast would cast them for the first convolution, to hold half of the memory."""
    kind = images.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return images
    return images.to(torch.get_autocast_dtype(kind))


class CudaCopies:
    """Copies to and from a device; this class alone knows of streams, which the CPU has none of.

    The two ends of a copy must be kept until a mark that is set afterwards has been reached: their
    memory is used again as soon as they are given up.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copying: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, value: Any) -> Any:
        """The value on the device, copied while that still computes what it was given before.

        Kernels launched after this wait for the copy, the host does not.
        """
        if self._copying is None:
            return each(value, lambda tensor: tensor.to(self.device))
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copying):
            sent = each(value, lambda tensor: tensor.to(self.device, non_blocking=True))
        computing.wait_stream(self._copying)
        return sent

    def fetch(self, value: Any) -> Any:
        """The value on the host, there once a mark that is set afterwards has been reached."""
        if self._copying is None:
            return each(value, lambda tensor: tensor.to("cpu"))
        return each(value, self._fetched)

    def _fetched(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor
        there = like(tensor, page_locked(self.device))
        return there.copy_(tensor, non_blocking=True)

    def kept(self, value: Any) -> Any:
        """What was fetched, in memory that is not page-locked, as there is little of that."""
        is_read = isinstance(value, list) and not any(isinstance(v, Tensor) for v in value)
        return value if self._copying is None or is_read else each(value, Tensor.clone)

    def mark(self) -> Callable[[], None]:
        """Mark what was launched so far; the answer waits until all of it is done.

        The answer raises the `torch.AcceleratorError` of a kernel that failed.
        """
        if self._copying is None:
            return lambda: None
        # Blocking, the host sleeps rather than spins: the decode threads need the cores.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        small = _small.copy()
        _small.clear()

        def wait() -> None:
            event.synchronize()
            small.clear()

        return wait
