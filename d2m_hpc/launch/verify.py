"""Every output against its record."""

from __future__ import annotations

import hashlib
import io
import random
import zipfile
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2m_hpc.config import Config
from d2m_hpc.errors import D2MError
from d2m_hpc.launch.standing import standings
from d2m_hpc.launch.uncollected import uncollected
from d2m_hpc.outputs import OutputDir
from d2m_hpc.state.manifest import Manifest, Outcome
from d2m_hpc.state.rundir import RunDir


@dataclass(frozen=True)
class Fault:
    """Something wrong with one file of the output."""

    file: str
    what: str


@dataclass
class Report:
    """What was checked, and what was found.

    Attributes:
        checked: how many shards' files were looked at.
        done: how many are done on record.
        faults: what is wrong with files.
        shards: of the run, done or not.
        unfinished: how many are not done; what is removed or failed since counts.
    """

    checked: int
    done: int
    faults: list[Fault]
    shards: int
    unfinished: int


def verify(run: RunDir, config: Config, sample: int | None = None, seed: int = 0) -> Report:
    """Check every finished shard's files, and that the folder holds no others.

    Args:
        sample: the files of so many shards only, drawn at random.
        seed: of the draw; the same one draws the same of the same shards.
    """
    output = OutputDir(config.output_metadata_dir)
    with uncollected():
        manifest = Manifest.load(run)
        found = standings(run, config, manifest)
    done = manifest.done
    stems = sorted(done)
    if sample is not None and sample < len(stems):
        stems = sorted(random.Random(seed).sample(stems, sample))
    carried = config.carried
    faults = [f for stem in stems for f in check_shard(output, stem, done[stem], carried)]
    for suffix in (".npz", ".parquet"):
        strays = sorted(output.stems(suffix) - done.keys())
        faults += [Fault(f"{s}{suffix}", "has no record; run d2m-submit again") for s in strays]
    return Report(len(stems), len(done), faults, len(found.stems), len(found.unfinished))


def check_shard(
    output: OutputDir, stem: str, record: Outcome, carried: Collection[str] = ()
) -> list[Fault]:
    """What is wrong with one shard's pair.

    Args:
        record: what its newest record says.
        carried: columns with the samples' own values, which may be anything.
    """
    faults = []
    for suffix, sha256 in ((".parquet", record.parquet_sha256), (".npz", record.npz_sha256)):
        name = f"{stem}{suffix}"
        try:
            data = output.read(name)
        except FileNotFoundError:
            faults.append(Fault(name, "is missing"))
            continue
        except OSError as error:
            faults.append(Fault(name, f"cannot be read: {error}"))
            continue
        problems = _problems(data, suffix, record.rows, carried)
        if hashlib.sha256(data).hexdigest() != sha256:
            problems.append(f"has another sha256 than its record ({sha256[:12]}...)")
        faults += [Fault(name, p) for p in problems]
    if faults and _is_replaced(output, stem, record):
        why = "has replaced the pair that its record tells of; run d2m-submit again"
        return [Fault(f"{stem}.parquet", why)]
    return faults


def _is_replaced(output: OutputDir, stem: str, record: Outcome) -> bool:
    """A task was killed after it committed a pair anew, and before it wrote the record."""
    try:
        own = output.record(stem)
    except D2MError:
        return False
    return own is not None and own.order > record.order


def _problems(data: bytes, suffix: str, rows: int, carried: Collection[str]) -> list[str]:
    try:
        if suffix == ".npz":
            return _check_npz(data, rows)
        return _check_parquet(data, rows, carried)
    except Exception as error:  # the libraries raise whatever a damaged byte makes them trip over
        return [f"cannot be read: {str(error) or type(error).__name__}"]


def _check_parquet(data: bytes, rows: int, carried: Collection[str]) -> list[str]:
    # Arrow's threads would hold on to `data`, and abort a process that ends before they let go.
    with pq.ParquetFile(io.BytesIO(data), pre_buffer=False) as file:
        table = file.read(use_threads=False)
    problems = [f"has {table.num_rows} rows, its record {rows}"] if table.num_rows != rows else []
    for name in table.column_names:
        bad = 0 if name in carried else _non_finite(table[name])
        problems += [f"column {name!r} has {bad} values that are not finite"] if bad else []
    return problems


def _non_finite(column: pa.ChunkedArray) -> int:
    """NaNs and infinities among numbers or lists of them; a null is neither."""
    while pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    if not pa.types.is_floating(column.type):
        return 0
    bad: int = pc.sum(pc.invert(pc.is_finite(column)), min_count=0).as_py()
    return bad


def _check_npz(data: bytes, rows: int) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if broken := archive.testzip():
            return [f"array {broken!r} fails its CRC"]
    with np.load(io.BytesIO(data)) as arrays:
        loaded = {name: arrays[name] for name in arrays.files}
    problems = []
    for name, array in loaded.items():
        if len(array) != rows:
            problems.append(f"array {name!r} has {len(array)} rows, its record {rows}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            problems.append(f"array {name!r} has values that are not finite")
    return problems
