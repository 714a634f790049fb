"""The outputs of a shard, batch after batch, as a table and arrays."""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from d2m_hpc.config import Config
from d2m_hpc.errors import ShardError
from d2m_hpc.worker.batch import Outputs, join

TYPES = {"face-boxes": pa.list_(pa.list_(pa.float32()))}
"""Of columns that their values alone do not tell: a shard without faces has the same type."""


class Rows(Protocol):
    """What is written as a pair."""

    def features(self) -> dict[str, NDArray[Any]]: ...

    def table(self) -> pa.Table: ...


class Table:
    """The outputs of a shard, batch after batch."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.parts: list[Outputs] = []

    def add(self, outputs: Outputs) -> None:
        self.parts.append(outputs)

    @property
    def rows(self) -> int:
        return sum(len(part.keys) for part in self.parts)

    def features(self) -> dict[str, NDArray[Any]]:
        """Each feature [rows, ...], under the name that it has in the npz."""
        config, dtype = self.config, np.dtype(self.config.feature_dtype)
        return {
            config.renamed(name): _narrowed(name, [p.features[name] for p in self.parts], dtype)
            for name in config.postprocess_features
        }

    def table(self) -> pa.Table:
        """`key`, the columns asked for, the additional fields; a row a sample."""
        config, parts = self.config, self.parts
        columns = {"key": pa.array([k for p in parts for k in p.keys], pa.string())}
        for name in config.postprocess_columns:
            values = [p.columns[name] for p in parts]
            columns[config.renamed(name)] = _column(name, join(values) if values else [])
        for name in config.carried:
            columns[name] = _field([v for p in parts for v in p.fields[name]])
        return pa.table(columns)


def _narrowed(name: str, parts: list[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A feature's batches as one array."""
    if not parts:
        return np.zeros((0, 0), dtype)
    if odd := [p.dtype for p in parts if p.dtype.kind not in "fiub"]:
        raise ShardError(f"feature {name!r} is made of {odd[0]}; valid are numbers")
    with np.errstate(over="ignore"):
        joined = np.concatenate(parts, dtype=dtype, casting="unsafe")
    if not np.isfinite(joined).all():
        raise ShardError(
            f"feature {name!r} has values that {dtype} cannot hold; set feature_dtype: float32"
        )
    return joined


def _column(name: str, values: Any) -> pa.Array:
    """Numbers as float32 or integers, nested lists of numbers as nested lists of float32."""
    try:
        array = _typed(name, values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ShardError(f"column {name!r} cannot be written: {error}") from None
    numbers = array
    while pa.types.is_list(numbers.type):
        numbers = numbers.flatten()
    if pa.types.is_floating(numbers.type) and not _all_finite(numbers):
        raise ShardError(f"column {name!r} has values that float32 cannot hold, such as NaN")
    return array


def _all_finite(numbers: pa.Array) -> bool:
    finite: bool = pc.all(pc.is_finite(numbers), min_count=0).as_py()
    return finite


def _typed(name: str, values: Any) -> pa.Array:
    if isinstance(values, np.ndarray):
        if values.dtype.kind == "f":
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
        if values.ndim == 1:
            return pa.array(values)
        values = values.tolist()
    return pa.array(values, TYPES.get(name) or _float32(pa.array(values).type))


def _float32(kind: pa.DataType) -> pa.DataType:
    """A type with its float64 narrowed, and float32 where there was nothing to tell it by."""
    if pa.types.is_list(kind):
        return pa.list_(_float32(kind.value_type))
    if pa.types.is_null(kind):
        return pa.float32()
    return pa.float32() if pa.types.is_float64(kind) else kind


def _field(values: list[Any]) -> pa.Array:
    """JSON values as they are, or as JSON texts where no type of a parquet holds them all."""
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return _json_texts(values)
    if _has_empty_struct(array.type):
        return _json_texts(values)
    return array.cast(pa.string()) if pa.types.is_null(array.type) else array


def _json_texts(values: list[Any]) -> pa.Array:
    texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    return pa.array(texts, pa.string())


def _has_empty_struct(kind: pa.DataType) -> bool:
    """A parquet has no type for the object `{}`."""
    if pa.types.is_struct(kind) and not kind.num_fields:
        return True
    return any(_has_empty_struct(kind.field(i).type) for i in range(kind.num_fields))
