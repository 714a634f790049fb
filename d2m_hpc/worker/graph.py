"""Models in dependency order, on one device, under one autocast."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError, D2MError, ShardError
from d2m_hpc.models import weights
from d2m_hpc.models.loading import Weights
from d2m_hpc.models.registry import ModelSpec, in_order
from d2m_hpc.state.manifest import Rejection
from d2m_hpc.worker.batch import Batch, Input, Outputs, count, join, non_finite, put, take
from d2m_hpc.worker.toolbox import Post, Toolbox

log = logging.getLogger(__name__)


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype; None for none. `auto` is float16 on CUDA and off on the CPU."""
    if amp == "auto":
        return torch.float16 if device.type == "cuda" else None
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "off": None}[amp]


class Graph:
    """All models of a config.

    Args:
        device: where the built-in models run; a custom model is given `config.device`, as in the
            seed program, or "cpu".
    """

    def __init__(self, config: Config, toolbox: Toolbox, device: torch.device) -> None:
        self.toolbox = toolbox
        self.device = device
        self.dtype = amp_dtype(config.amp, device)
        folder = Weights(weights.weights_dir(config.weights_dir))
        as_given = config.device if device.type == "cuda" else "cpu"
        self.models = {
            name: self._build(toolbox.specs[name], folder, as_given)
            for name in in_order(toolbox.specs)
        }

    def _build(self, spec: ModelSpec, folder: Path | Weights, as_given: int | str) -> Any:
        try:
            if not spec.target:
                return self.toolbox.classes[spec.name](as_given)
            return _import(spec.target)(self.device, folder)
        except (D2MError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise ConfigError("models", [f"{spec.name!r} cannot be built: {what}"]) from error

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Outputs:
        """
        Raises:
            ShardError: a model or postprocessor failed.
        """
        inputs = self._finished(batch)
        cache: dict[str, Any] = {}
        recomputed: set[int] = set()
        rejected: dict[int, str] = {}
        for name in self.models:
            arguments = self._arguments(name, inputs, cache)
            output = self._run(name, arguments, self.dtype)
            bad = [i for i in non_finite(output) if i not in rejected]
            if bad and self.dtype:
                output = self._again_in_float32(name, arguments, output, bad)
                recomputed.update(bad)
                bad = [i for i in non_finite(output) if i not in rejected]
            rejected |= {i: f"{name} gives a value that is not finite" for i in bad}
            cache[name] = output
        outputs = self._collect(batch, cache, rejected)
        outputs.recomputed = len(recomputed)
        return outputs

    def _place(self, spec: ModelSpec) -> torch.device:
        return self.device if spec.to_device else torch.device("cpu")

    def _finished(self, batch: Batch) -> dict[tuple[Input, torch.device], Any]:
        """Every input where some model wants it, copied and finished once."""
        wanted = {(i, self._place(s)) for s in self.toolbox.specs.values() for i in s.inputs}
        made = self.toolbox.preprocessors
        return {(i, place): made[i[1]].finish(_move(batch.inputs[i], place)) for i, place in wanted}

    def _arguments(
        self, name: str, inputs: dict[tuple[Input, torch.device], Any], cache: dict[str, Any]
    ) -> list[Any]:
        spec = self.toolbox.specs[name]
        own = [inputs[i, self._place(spec)] for i in spec.inputs]
        return own + [cache[d] for d in spec.dependencies]

    def _run(self, name: str, arguments: list[Any], dtype: torch.dtype | None) -> Any:
        """One model on some rows; out of memory, on halves of them."""
        try:
            with self._autocast(dtype):
                return _outputs(self.models[name](*arguments), arguments)
        except torch.OutOfMemoryError:
            rows = count(arguments[0])
            if rows < 2:
                raise
        except Exception as error:
            raise ShardError(f"{name!r} raised {type(error).__name__}: {error}") from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("%s: out of memory on %d rows; running halves", name, rows)
        halves = (range(rows // 2), range(rows // 2, rows))
        parts = [self._run(name, [take(a, half) for a in arguments], dtype) for half in halves]
        return join(parts)

    def _autocast(self, dtype: torch.dtype | None) -> Any:
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def _again_in_float32(
        self, name: str, arguments: list[Any], output: Any, rows: list[int]
    ) -> Any:
        log.warning("%s: %d rows are not finite; running them again in float32", name, len(rows))
        again = self._run(name, [take(a, rows) for a in arguments], None)
        # What overflowed in half precision would do so again in a tensor of it.
        return put(_widened(output), rows, again)

    def _collect(self, batch: Batch, cache: dict[str, Any], rejected: dict[int, str]) -> Outputs:
        made = self.toolbox
        columns = {k: self._post(k, p, cache, batch) for k, p in made.columns.items()}
        features = {k: self._post(k, p, cache, batch) for k, p in made.features.items()}
        for name, value in (*columns.items(), *features.items()):
            bad = {i: f"{name} is not finite" for i in non_finite(value)}
            rejected = {**bad, **rejected}
        outputs = Outputs(
            batch.keys, columns, {k: np.asarray(v) for k, v in features.items()}, batch.fields
        )
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

    def _post(self, name: str, post: Post, cache: dict[str, Any], batch: Batch) -> Any:
        try:
            value = post(cache)
        except Exception as error:
            raise ShardError(f"{name!r} raised {type(error).__name__}: {error}") from error
        if _rows(value) != len(batch.keys):
            raise ShardError(
                f"{name!r} made {_shape(value)} for a batch of {len(batch.keys)} samples; "
                "valid is one item a sample"
            )
        return _host(value)


def _import(target: str) -> Any:
    from importlib import import_module

    module, name = target.split(":")
    return getattr(import_module(f"d2m_hpc.models.{module}"), name)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_move(part, device) for part in value)
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _outputs(output: Any, arguments: Sequence[Any]) -> Any:
    """A list of several outputs as a tuple; a list of rows stays one."""
    if not isinstance(output, list) or not all(isinstance(x, Tensor) for x in output):
        return output
    several = bool(output) and all(_rows(x) == count(arguments[0]) for x in output)
    return tuple(output) if several else output


def _widened(value: Any) -> Any:
    """Half precision as float32."""
    if isinstance(value, tuple):
        return tuple(map(_widened, value))
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _rows(value: Any) -> int | None:
    """The number of items; None for a single value, a tensor without axes too."""
    try:
        return len(value)
    except TypeError:
        return None


def _host(value: Any) -> Any:
    """A tensor as an array, half precision widened; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()


def _shape(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a tensor of shape {list(shape)}"
    return f"{len(value)} items" if hasattr(value, "__len__") else type(value).__name__
