"""What a net's operations cost at the least: their arithmetic, or the bytes that they move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FLOAT32_SHARE = 1 / 15
"""Of the half-precision ceiling: an H100 does 67 and 990 TFLOP/s by its data sheet."""
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Ceiling:
    """What a device can do at the most.

    Attributes:
        flops: a second, in large half-precision matrix products; two for a multiplication with its
            addition.
        bandwidth: bytes a second, read and written.
    """

    flops: float
    bandwidth: float


@dataclass
class Cost:
    """Operations, bytes and launches of what ran within `Counting`.

    Attributes:
        seconds: at the least: of each operation its arithmetic's or its bytes' time, whichever is
            the longer, one operation after the other (Williams et al., 2009,
            doi:10.1145/1498765.1498785).
    """

    ceiling: Ceiling
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    operations: int = 0
    by_name: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, flops: float, moved: float, half: bool) -> None:
        rate = self.ceiling.flops * (1.0 if half else FLOAT32_SHARE)
        seconds = max(flops / rate, moved / self.ceiling.bandwidth)
        self.flops += flops
        self.bytes += moved
        self.seconds += seconds
        self.operations += 1
        self.by_name[name] = self.by_name.get(name, 0.0) + seconds


class Counting(TorchDispatchMode):
    """Count the operations on a device within the context.

    Compiled nets run no such operations: only nets as they are can be counted.

        >>> with Counting(Ceiling(790e12, 3.0e12), torch.device("cpu")) as cost:
        ...     _ = torch.ones(1000, 1000) @ torch.ones(1000, 1000)
        >>> cost.flops
        2000000000.0
    """

    def __init__(self, ceiling: Ceiling, device: torch.device) -> None:
        super().__init__()
        self._cost, self._device = Cost(ceiling), device

    def __enter__(self) -> Cost:  # type: ignore[override]
        super().__enter__()
        return self._cost

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        given = list(self._tensors((args, kwargs)))
        outputs = list(self._tensors(made))
        name = function._schema.name.removeprefix("aten::")
        if not outputs or "empty" in name or _is_view(function, given, outputs):
            return made
        moved = sum(map(_touched, [*given, *outputs]))
        if name in ("embedding", "index", "index_select"):  # not the whole table
            moved = 2 * sum(map(_touched, outputs))
        counter = flop_registry.get(function._overloadpacket)
        flops = counter(*args, **(kwargs or {}), out_val=made) if counter else 0
        self._cost.add(name, float(flops), moved, outputs[0].dtype in HALF)
        return made

    def _tensors(self, value: Any) -> Iterator[Tensor]:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device.type:
                yield leaf


def _is_view(function: Any, given: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether nothing is moved: the outputs lie in memory of the inputs, and nothing is written."""
    if function._schema.is_mutable:
        return False
    places = {t.untyped_storage().data_ptr() for t in given}
    return all(t.untyped_storage().data_ptr() in places for t in outputs)


def _touched(tensor: Tensor) -> int:
    """Bytes: what is repeated by a stride of 0 lies in memory once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()
