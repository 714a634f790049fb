"""Outputs to one npz and one parquet, committed so that readers see both or none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from d2m_hpc.config import Config
from d2m_hpc.errors import ShardError
from d2m_hpc.outputs import METADATA, OutputDir
from d2m_hpc.state.manifest import Record
from d2m_hpc.state.rundir import fsync_dir, make_folder
from d2m_hpc.worker.batch import Outputs, join

TYPES = {"face-boxes": pa.list_(pa.list_(pa.float32()))}
"""Of columns that their values alone do not tell: a shard without faces has the same type."""
VERSIONED = ("d2m_hpc", "torch", "torchvision", "open_clip_torch", "timm", "transformers")


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
        for name in config.additional_fields:
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


def versions() -> dict[str, str]:
    """Of the packages that make the values."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _owned(path: str, flags: int) -> int:
    """Not world-writable, whatever the umask."""
    return os.open(path, flags, 0o644)


@contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    """A new file that is on disk when the block ends."""
    with open(path, "wb", opener=_owned) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_pair(table: Table, record: Record, folder: Path) -> tuple[Path, Path]:
    """Write both files in a folder, durably, and read them back; completes the record's hashes.

    Raises:
        ShardError: what was read back is not what was written.
    """
    npz, parquet = folder / f"{record.shard}.npz", folder / f"{record.shard}.parquet"
    with _durable(npz) as file:
        np.savez(file, **table.features())  # type: ignore[arg-type]
    record.npz_sha256 = _sha256(npz)
    rows = table.table()
    note = json.dumps({**record.to_dict(), "versions": versions()})
    with _durable(parquet) as file:
        pq.write_table(rows.replace_schema_metadata({METADATA: note}), file, compression="zstd")
    record.parquet_sha256 = _sha256(parquet)
    _check(npz, parquet, record)
    return npz, parquet


def _check(npz: Path, parquet: Path, record: Record) -> None:
    """A disk that is full or lying is found here, before anyone sees the files."""
    read: object
    try:
        read = sorted(_lengths(npz, parquet))
    except zipfile.BadZipFile as error:
        read = error
    if read != [record.rows]:
        raise ShardError(
            f"{npz.parent}: read back {read}, wrote {record.rows} rows; is the disk full?"
        )


def _lengths(npz: Path, parquet: Path) -> set[int]:
    """Rows of the parquet and of every array; reading an array to its end checks its CRC."""
    with np.load(npz) as arrays:
        lengths = {len(arrays[name]) for name in arrays.files}
    return lengths | {pq.read_metadata(parquet).num_rows}


class Committer:
    """The only writer into the output folder."""

    def __init__(self, output: OutputDir, scratch: Path) -> None:
        """
        Args:
            scratch: where files are written before they are sent to an object store.
        """
        self.output = output
        # On the outputs' filesystem, so that a rename commits; their readers list no folders.
        self.staging = Path(output.path(".d2m-tmp")) if output.is_local else scratch
        output.make()

    def commit(self, table: Table, record: Record) -> None:
        """Publish a shard's pair: the npz first, the parquet last.

        A parquet in its place is a finished shard; until then there is none, also where an older
        pair is replaced.

        Raises:
            ShardError: the values cannot be written, or the disk or store does not take them.
        """
        self.clean(record.shard)
        folder = self.staging / f"{record.shard}.{record.task}"
        try:
            make_folder(folder)
            npz, parquet = write_pair(table, record, folder)
            publish = self._rename if self.output.is_local else self._upload
            publish(npz, parquet)
        except OSError as error:
            where = f"{self.output.url}: {record.shard} cannot be written"
            raise ShardError(f"{where}: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _rename(self, npz: Path, parquet: Path) -> None:
        folder = Path(self.output.root)
        if (folder / parquet.name).exists():
            (folder / parquet.name).unlink()
            fsync_dir(folder)
        os.replace(npz, folder / npz.name)
        fsync_dir(folder)
        os.replace(parquet, folder / parquet.name)
        fsync_dir(folder)

    def _upload(self, npz: Path, parquet: Path) -> None:
        """An object appears whole or not at all."""
        fs, final = self.output.fs, self.output.path(parquet.name)
        if fs.exists(final):
            fs.rm_file(final)
        fs.put_file(str(npz), self.output.path(npz.name))
        fs.put_file(str(parquet), final)

    def clean(self, stem: str) -> None:
        """Remove what a killed attempt at this shard left; call it while its lease is held."""
        for left in self.staging.glob("*.*") if self.staging.is_dir() else ():
            if left.name.rpartition(".")[0] == stem:
                shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        """Drop the staging folder when nobody uses it."""
        with suppress(OSError):
            self.staging.rmdir()
