"""Record what a net launches for a batch, and launch it again as one (CUDA graphs)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from d2m_hpc.models.transfer import each

log = logging.getLogger(__name__)

AFTER = 2
"""Runs of a shape before it is recorded: weights are cast and the fastest kernels found by then,
and a shape that comes once is not worth the memory."""
MOST = 64
"""Shapes recorded at most. The texts of all models have some forty."""
LARGE = 64 << 20
"""Bytes of inputs for which what earlier runs used is given back first, as the recorded function
uses memory of its own: it would hold the same twice."""


class Runner(Protocol):
    """Run a function on tensors; `key` says which function it is, from batch to batch."""

    def __call__(self, key: Hashable, function: Callable[..., Any], *given: Tensor) -> Any: ...


def as_it_is(key: Hashable, function: Callable[..., Any], *given: Tensor) -> Any:
    """Run it, and record nothing."""
    return function(*given)


def image_forward(net: nn.Module, run: Runner) -> Callable[..., Any]:
    """An image net's forward as it is now, run by `run`."""
    return partial(run, (id(net), "image"), net.forward)


class CudaGraphs:
    """Runs functions as CUDA graphs, one for each shape that comes often.

    A net of PyTorch's is launched kernel by kernel, by a thread that waits for the interpreter's
    lock at each: beside 16 threads that decode, the launches took longer than the kernels. A graph
    is one launch. It computes in the same kernels, on inputs that are copied to where it was
    recorded, and what it gives is copied from there, as the next one uses the same memory.

    Only between `start` and `stop`: a graph reads the weights where autocast's copies lay. A
    function may look at shapes, never at values; one that does cannot be recorded, and runs as it
    is. So does everything on a CPU.
    """

    def __init__(self, device: torch.device, allowed: bool = True) -> None:
        self._device = device
        self._on = False
        self._allowed = allowed and device.type == "cuda"
        self._seen: Counter[Hashable] = Counter()
        self._made: dict[Hashable, _Recorded | None] = {}
        self._pool: Any = None

    def start(self) -> None:
        self._on = self._allowed

    def stop(self) -> None:
        """Forget what was recorded, and record nothing until the next start."""
        self._on = False
        self._made.clear()
        self._seen.clear()

    def run(self, key: Hashable, function: Callable[..., Any], *given: Tensor) -> Any:
        """What the function gives for these tensors, recorded or not."""
        if not self._on:
            return function(*given)
        kind = self._device.type
        mixed = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        full = (key, mixed, *((t.shape, t.stride(), t.dtype) for t in given))
        if full not in self._made:
            self._seen[full] += 1
            if not self._allowed or self._seen[full] <= AFTER or len(self._made) >= MOST:
                return function(*given)
            self._made[full] = self._record(function, given)
        made = self._made[full]
        return function(*given) if made is None else made(*given)

    @property
    def has_recorded(self) -> bool:
        return any(self._made.values())

    def give_up(self) -> bool:
        """Free the memory of all that was recorded, and record no more; whether there was any."""
        had = self.has_recorded
        self._allowed = False
        self.stop()
        return had

    def _record(self, function: Callable[..., Any], given: tuple[Tensor, ...]) -> _Recorded | None:
        if sum(tensor.nbytes for tensor in given) > LARGE:
            torch.cuda.empty_cache()
        for _ in range(2):
            if not self.has_recorded:  # a pool in which nothing is recorded any more takes no more
                self._pool = torch.cuda.graph_pool_handle()
            try:
                return _Recorded(function, given, self._pool)
            except torch.OutOfMemoryError:
                pass
            except Exception as error:
                # A device that failed says so again, at the next kernel.
                why = str(error).partition("\n")[0]  # the rest is advice on how to debug kernels
                log.info("a net runs as it is, as its launches cannot be recorded: %s", why)
                return None
            torch.cuda.empty_cache()  # which is not done by itself while launches are recorded
        log.info("too little memory to record more of what the models launch")
        self._allowed = False
        return None


class _Recorded:
    """A function's kernels for inputs of one shape."""

    def __init__(self, function: Callable[..., Any], given: tuple[Tensor, ...], pool: Any) -> None:
        self._inputs = [tensor.clone() for tensor in given]
        self._graph = torch.cuda.CUDAGraph()
        stream: Any = torch.cuda.Stream(given[0].device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(given[0].device))
        with torch.cuda.stream(stream):
            # Other threads may page-lock memory meanwhile.
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self._outputs = function(*self._inputs)
            finally:
                self._graph.capture_end()

    def __call__(self, *given: Tensor) -> Any:
        for own, tensor in zip(self._inputs, given, strict=True):
            own.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return each(self._outputs, Tensor.clone)
