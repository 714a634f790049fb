"""Collect a shard's outputs, batch after batch, as a table and arrays."""

from __future__ import annotations

import sys
from collections.abc import Container
from functools import cache
from importlib.abc import MetaPathFinder
from threading import get_ident
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError, ShardError
from d2m_hpc.models.types import leaf
from d2m_hpc.run import values as fields
from d2m_hpc.run.records import Rejection
from d2m_hpc.run.schema import Schema, Shape
from d2m_hpc.stopping import is_own_process
from d2m_hpc.worker.batch import Outputs, join, take

VALID = (
    "valid are numbers, booleans, texts, bytes, times and lists of these; return json.dumps of a "
    "dict, or a column for each of its keys"
)
CONVERTED = ("", "bool", "string", "float32")
"""Types to which Arrow converts no values that would change."""


class _NoPandas(MetaPathFinder):
    """Find no pandas for the thread that made this; custom code in others may import it now."""

    def __init__(self) -> None:
        self._thread = get_ident()

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "pandas" and get_ident() == self._thread:
            raise ImportError(name)


@cache
def _spare_pandas() -> None:
    """Have pyarrow find no pandas when the first array is made, for which it would import that.

    It asks once, whether it is given pandas' own types, and again when pandas is asked for. A
    custom file's outputs that are of these types are known: pandas is loaded then. A process of
    the user's own, which may load pandas later, is left as it is.
    """
    if "pandas" not in sys.modules and is_own_process():
        sys.meta_path.insert(0, absent := _NoPandas())
        pa.array([0])
        sys.meta_path.remove(absent)


class Table:
    """A shard's outputs, batch after batch, in the run's types."""

    def __init__(self, config: Config, schema: Schema | None = None) -> None:
        self.config = config
        self.schema = schema or Schema.of(config)
        self.parts: list[Outputs] = []
        self._fields: dict[str, pa.Array] | None = None

    def add(self, outputs: Outputs) -> None:
        _spare_pandas()
        self.parts.append(outputs)

    @property
    def rows(self) -> int:
        return sum(len(part.keys) for part in self.parts)

    def settle(self) -> list[Rejection]:
        """Find the fields' types; drop and return rows with a value that does not fit.

        Raises:
            ShardError: a row was dropped, and `warn_and_continue` is false.
        """
        made: dict[str, pa.Array] = {}
        reasons: dict[int, str] = {}
        for name in self.config.carried:
            values = [value for part in self.parts for value in part.fields[name]]
            if kind := self.schema.field(name, values):
                made[name], bad = fields.column(name, kind, values)
                reasons = {**bad, **reasons}
        keys = [key for part in self.parts for key in part.keys]
        if reasons:
            left = [row for row in range(len(keys)) if row not in reasons]
            made = {name: array.take(pa.array(left, pa.int64())) for name, array in made.items()}
            self._drop(reasons)
        self._fields = made
        rejected = [Rejection(keys[row], reason) for row, reason in sorted(reasons.items())]
        if rejected and not self.config.warn_and_continue:
            key, reason = rejected[0]
            raise ShardError(f"sample {key!r}: {reason} (warn_and_continue: true goes on)")
        return rejected

    def _drop(self, rows: Container[int]) -> None:
        start = 0
        for part in self.parts:
            count = len(part.keys)
            keep = [i for i in range(count) if start + i not in rows]
            start += count
            part.keys = take(part.keys, keep)
            for values in (part.columns, part.features, part.fields):
                values.update({name: take(value, keep) for name, value in values.items()})

    @property
    def undecided(self) -> list[str]:
        """Fields, columns and features whose type or shape neither shard nor run tells yet."""
        config, schema = self.config, self.schema
        return [
            *(n for n in config.carried if not schema.field(n)),
            *(
                n
                for n in config.postprocess_columns
                if not (schema.column(n) or self._column(n)[1])
            ),
            *(n for n in config.postprocess_features if schema.shape(n, self._shape(n)) is None),
        ]

    def require_declared(self) -> None:
        """
        Raises:
            ShardError: a column is not of the type that its model declares.
            ConfigError: a feature has another shape, which no sample decides.
        """
        for name in self.schema.columns.keys() & {*self.config.postprocess_columns}:
            self._column(name)
        for name in self.schema.shapes.keys() & {*self.config.postprocess_features}:
            found, shape = self._shape(name), self.schema.shapes[name]
            if found not in (None, shape):
                told = f"{[*(found or ())]}, and its model declares {[*shape]}"
                mistake = f"feature {name!r} has rows of shape {told}; mend its declaration or code"
                raise ConfigError("models", [mistake])

    def features(self) -> dict[str, NDArray[Any]]:
        """Each feature [rows, ...], by its name in the npz."""
        config, dtype = self.config, np.dtype(self.config.feature_dtype)
        return {
            config.renamed(name): self._feature(name, dtype) for name in config.postprocess_features
        }

    def _shape(self, name: str) -> Shape | None:
        return next((tuple(p.features[name].shape[1:]) for p in self.parts if p.keys), None)

    def _feature(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        found = self._shape(name)
        shape = self.schema.shape(name, found)
        if found is None:
            return np.zeros((0, *((0,) if shape is None else shape)), dtype)
        if shape != found:
            raise ShardError(
                f"feature {name!r} has rows of shape {[*found]}, other shards of the run of "
                f"{[*(shape or ())]}; a feature has one shape"
            )
        return _narrowed(name, [p.features[name] for p in self.parts if p.keys], dtype)

    def table(self) -> pa.Table:
        """The columns `key`, those of the config, and the additional fields; a row for each
        sample."""
        config, parts = self.config, self.parts
        if self._fields is None and (odd := self.settle()):
            raise ShardError(f"sample {odd[0].key!r}: {odd[0].reason}")
        columns = {"key": pa.array([k for p in parts for k in p.keys], pa.string())}
        for name in config.postprocess_columns:
            columns[config.renamed(name)] = self._column(name)[0]
        made = self._fields or {}
        for name in config.carried:
            if name not in made:
                made[name] = pa.nulls(self.rows, fields.arrow_type(self.schema.settled(name)))
            columns[name] = made[name]
        return pa.table(columns)

    def _column(self, name: str) -> tuple[pa.Array, bool]:
        """A column, and whether its type is known; raises `ShardError` for values of another
        type."""
        values = [p.columns[name] for p in self.parts if p.keys]
        given = join(values) if values else []
        try:
            array, is_told = _typed(given, self.schema, name)
        except pa.ArrowException as error:
            what = f"column {name!r} cannot be written: {error}"
            if not self.schema.column(name):  # by no type that it should have
                what += f"; its first value is of {_described(given)}; {VALID}"
            raise ShardError(what) from None
        _require_finite(name, array)
        return array, is_told


def _typed(given: Any, schema: Schema, name: str) -> tuple[pa.Array, bool]:
    kind = schema.column(name)
    if leaf(kind) not in CONVERTED and isinstance(given, list):
        # First by the values' own type: Arrow would silently cut 5.5 to the integer 5, and a time
        # to a date.
        array, kind = _array(given, None), ""
    else:
        array = _array(given, fields.arrow_type(kind) if kind else None)
    if not (_is_void(array.type) or (found := fields.name_of(array.type))):
        raise ShardError(f"column {name!r} has values of {array.type}; {VALID}")
    kind = kind or schema.column(name, "" if _is_void(array.type) else found)
    wanted = fields.arrow_type(kind) if kind else _float32(array.type)
    if array.type == wanted:
        return array, bool(kind)
    if _is_void(array.type):
        return pa.array(array.to_pylist(), wanted), bool(kind)
    if not (_are_numbers(array.type) and _are_numbers(wanted)):
        rest = "its model declares" if name in schema.columns else "the rest of the run has"
        raise ShardError(
            f"column {name!r} is {array.type} here, and {rest} {kind}; a column has one type"
        )
    return array.cast(wanted), True


WHOLE = tuple(
    f"{sign}int{bits}{'>' * n}" for sign in ("", "u") for bits in (8, 16, 32, 64) for n in range(4)
)


def _array(given: Any, wanted: pa.DataType | None) -> pa.Array:
    """Numbers as float32 or integers, nested lists of numbers as nested lists of float32."""
    if isinstance(given, np.ndarray):
        if given.dtype.kind == "f":
            with np.errstate(over="ignore"):
                given = given.astype(np.float32)
        if given.ndim == 1:
            return pa.array(given)
        given = given.tolist()
    if wanted is not None:
        return pa.array(given, wanted)
    array = pa.array(given)
    return array if _is_void(array.type) else array.cast(_float32(array.type), safe=False)


def _described(given: Any) -> str:
    """The type of a column's first value."""
    value = next((value for value in given if value is not None), None)
    return str(getattr(value, "dtype", type(value).__name__))


def _is_void(kind: pa.DataType) -> bool:
    """Whether a type is that of nulls and empty lists alone."""
    while pa.types.is_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_null(kind))


def _are_numbers(kind: pa.DataType) -> bool:
    while pa.types.is_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _narrowed(name: str, parts: list[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A feature's batches as one array."""
    if odd := [p.dtype for p in parts if p.dtype.kind not in "fiub"]:
        raise ShardError(f"feature {name!r} is made of {odd[0]}; valid are numbers")
    with np.errstate(over="ignore"):
        joined = np.concatenate(parts, dtype=dtype, casting="unsafe")
    if not np.isfinite(joined).all():
        raise ShardError(
            f"feature {name!r} has values that {dtype} cannot hold; set feature_dtype: float32"
        )
    return joined


def _require_finite(name: str, numbers: pa.Array) -> None:
    while pa.types.is_list(numbers.type):
        numbers = numbers.flatten()
    is_float = pa.types.is_floating(numbers.type)
    if is_float and not pc.all(pc.is_finite(numbers), min_count=0).as_py():
        raise ShardError(f"column {name!r} has values that float32 cannot hold, such as NaN")


def _float32(kind: pa.DataType) -> pa.DataType:
    """A type with floats as float32, and float32 in place of no type."""
    if pa.types.is_list(kind):
        return pa.list_(_float32(kind.value_type))
    if pa.types.is_null(kind):
        return pa.float32()
    return pa.float32() if pa.types.is_floating(kind) else kind
