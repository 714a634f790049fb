"""Every output against its record."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2m_hpc.config import Config
from d2m_hpc.outputs import OutputDir
from d2m_hpc.state.manifest import Manifest, Record
from d2m_hpc.state.rundir import RunDir


@dataclass(frozen=True)
class Fault:
    """Something wrong with one file of the output."""

    file: str
    what: str


@dataclass
class Report:
    checked: int
    faults: list[Fault]


def verify(run: RunDir, config: Config) -> Report:
    """Check every finished shard's files, and that the folder holds no others."""
    output = OutputDir(config.output_metadata_dir)
    done = Manifest.load(run).done
    faults = [f for stem in sorted(done) for f in check_shard(output, done[stem])]
    for suffix in (".npz", ".parquet"):
        strays = sorted(output.stems(suffix) - done.keys())
        faults += [Fault(f"{s}{suffix}", "has no record; run d2m-submit again") for s in strays]
    return Report(len(done), faults)


def check_shard(output: OutputDir, record: Record) -> list[Fault]:
    """What is wrong with one shard's pair."""
    faults = []
    for suffix, sha256, check in (
        (".parquet", record.parquet_sha256, _check_parquet),
        (".npz", record.npz_sha256, _check_npz),
    ):
        name = f"{record.shard}{suffix}"
        try:
            with output.fs.open(output.path(name), "rb") as file:
                data = file.read()
        except FileNotFoundError:
            faults.append(Fault(name, "is missing"))
            continue
        problems = check(data, record.rows)
        if hashlib.sha256(data).hexdigest() != sha256:
            problems.append(f"has another sha256 than its record ({sha256[:12]}...)")
        faults += [Fault(name, p) for p in problems]
    return faults


def _check_parquet(data: bytes, rows: int) -> list[str]:
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError) as error:
        return [f"cannot be read: {error}"]
    problems = [f"has {table.num_rows} rows, its record {rows}"] if table.num_rows != rows else []
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_floating(column.type):
            bad = len(column) - pc.sum(pc.is_finite(column.drop_null())).as_py()
            problems += [f"column {name!r} has {bad} values that are not finite"] if bad else []
    return problems


def _check_npz(data: bytes, rows: int) -> list[str]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if broken := archive.testzip():
                return [f"array {broken!r} fails its CRC"]
        with np.load(io.BytesIO(data)) as arrays:
            loaded = {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        return [f"cannot be read: {error}"]
    problems = []
    for name, array in loaded.items():
        if len(array) != rows:
            problems.append(f"array {name!r} has {len(array)} rows, its record {rows}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            problems.append(f"array {name!r} has values that are not finite")
    return problems
