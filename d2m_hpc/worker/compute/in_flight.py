"""Batches that are still being computed, and the reading of their outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2m_hpc.errors import OutputError, ShardError
from d2m_hpc.models import custom
from d2m_hpc.models.inputs import Input
from d2m_hpc.run.records import Rejection
from d2m_hpc.worker.batch import Batch, Outputs, each_part, flagged, join, non_finite, put, take
from d2m_hpc.worker.compute.resolve import Postprocessor, Toolbox

log = logging.getLogger(__name__)


Computed = tuple[dict[str, Any], dict[str, tuple[Tensor, ...]]]
"""Outputs by model, and by model the rows that are not finite, as `batch.flags` gives them."""


@dataclass
class Pending:
    """All models' outputs of some rows, on their way to the host.

    Attributes:
        parts: of consecutive rows; valid after `wait`.
        sent: what the models compute from, kept until `wait` returns.
        wait: returns when all outputs have arrived.
        on_host: turns a model's output into the form for columns and dependents.
    """

    parts: list[Computed]
    sent: list[Any]
    wait: Callable[[], None]
    on_host: Callable[[str, Any], Any]

    def read(self) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """Outputs by model; and the rows that are not finite, by models with such rows.

        Valid after `wait`.
        """
        self.sent.clear()
        outputs, flags = join(self.parts)
        bad = {name: flagged(parts) for name, parts in flags.items()}
        values = {name: self.on_host(name, value) for name, value in outputs.items()}
        return values, {name: rows for name, rows in bad.items() if rows}


class Compute(Protocol):
    """Run all models on some inputs, those named in `precise` in float32."""

    def __call__(self, inputs: Mapping[Input, Any], precise: Collection[str]) -> Pending: ...


class InFlight:
    """A batch that is being computed.

    Args:
        compute: computes rows again.
        mixed: models run in half precision, in which rows can overflow.
        alone: within it, outputs that have arrived are read.
    """

    def __init__(
        self,
        batch: Batch,
        toolbox: Toolbox,
        compute: Compute,
        mixed: bool,
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._batch, self._toolbox = batch, toolbox
        self._compute, self._mixed, self._alone = compute, mixed, alone
        self._pending = compute(batch.inputs, ())

    @torch.no_grad()
    def outputs(self) -> Outputs:
        """Wait for the batch's outputs; raise `ShardError` where a model or postprocessor
        failed."""
        self._pending.wait()
        with self._alone():
            return self._read()

    def _read(self) -> Outputs:
        cache, bad = self._pending.read()
        recomputed: list[int] = []
        if bad and self._mixed:
            recomputed = sorted(set().union(*bad.values()))
            cache, bad = self._again(cache, bad, recomputed)
        rejected: dict[int, str] = {}
        for name, rows in bad.items():
            for row in rows:
                rejected.setdefault(row, f"{name} gives a value that is not finite")
        outputs = self._collect(cache, rejected)
        outputs.recomputed = len(recomputed)
        return outputs

    def _again(
        self, cache: dict[str, Any], bad: dict[str, list[int]], rows: list[int]
    ) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """Compute rows again, in float32 where they overflowed; a mended output may show the next
        model's overflow."""
        log.warning(
            "%s: %d rows are not finite; running them again in float32", ", ".join(bad), len(rows)
        )
        inputs = {name: take(value, rows) for name, value in self._batch.inputs.items()}
        precise: set[str] = set()
        while not bad.keys() <= precise:
            precise |= bad.keys()
            pending = self._compute(inputs, precise)
            pending.wait()
            again, bad = pending.read()
        # A tensor of half precision would overflow again.
        mended = {name: put(_widened(value), rows, again[name]) for name, value in cache.items()}
        return mended, {name: [rows[i] for i in found] for name, found in bad.items()}

    def _collect(self, cache: dict[str, Any], rejected: dict[int, str]) -> Outputs:
        made, batch = self._toolbox, self._batch
        columns = {k: self._post(k, p, cache) for k, p in made.columns.items()}
        features = {k: self._post(k, p, cache) for k, p in made.features.items()}
        for name, value in (*columns.items(), *features.items()):
            bad = {i: f"{name} is not finite" for i in non_finite(value)}
            rejected = {**bad, **rejected}
        arrays = {k: _feature(k, v) for k, v in features.items()}
        outputs = Outputs(batch.keys, columns, arrays, batch.fields)
        if not rejected:
            return outputs
        keep = [i for i in range(len(batch.keys)) if i not in rejected]
        return Outputs(
            keys=take(batch.keys, keep),
            columns={k: take(v, keep) for k, v in outputs.columns.items()},
            features={k: take(v, keep) for k, v in outputs.features.items()},
            fields={k: take(v, keep) for k, v in batch.fields.items()},
            rejections=[Rejection(batch.keys[i], rejected[i]) for i in sorted(rejected)],
        )

    def _post(self, name: str, post: Postprocessor, cache: dict[str, Any]) -> Any:
        of = f" of {model!r}" if (model := custom.source(post)) else ""
        try:
            value = post(cache)
        except Exception as error:
            what = f"raised {custom.described(error)}"
            if isinstance(error, KeyError) and isinstance(given := cache.get(model), dict):
                what += f"; the outputs{of} are {', '.join(map(repr, given))}"
            raise OutputError(f"{name!r} {what}") from error
        if row_count(value) != len(self._batch.keys):
            raise OutputError(
                f"{name!r} made {_shape(value)}{of} for a batch of {len(self._batch.keys)} "
                "samples; valid is one item a sample"
            )
        return _array(value)


def _widened(value: Any) -> Any:
    """Half precision as float32."""
    if isinstance(value, tuple | dict):
        return each_part(_widened, value)
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def row_count(value: Any) -> int | None:
    """The number of items; None for a single value, a tensor without axes, and several outputs."""
    try:
        return None if isinstance(value, tuple | dict) else len(value)
    except TypeError:
        return None


def _feature(name: str, value: Any) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError:
        raise ShardError(f"feature {name!r} has rows of different lengths; valid is one") from None


def _array(value: Any) -> Any:
    """A tensor as an array, half precision widened; any other value as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()


def _shape(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a tensor of shape {list(shape)}"
    kind = type(value).__name__
    return f"{kind} of {len(value)} items" if hasattr(value, "__len__") else kind
