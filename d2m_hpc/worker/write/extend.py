"""A finished pair and what it lacked, as the pair that the whole config would have made.

Rows are matched by key: those of the new pair are the ones that both have, in the tar's order. The
n-th row of a key is the same sample in both, where a tar has the key several times.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from d2m_hpc.config import Config
from d2m_hpc.errors import ShardError
from d2m_hpc.run.manifest import Record, Rejection
from d2m_hpc.run.outputs import METADATA, OutputDir
from d2m_hpc.storage.texts import fit
from d2m_hpc.worker.write.table import Table


@dataclass(frozen=True)
class Pair:
    """A finished shard's files, read and checked.

    Attributes:
        arrays: the npz; [rows, ...] each.
    """

    record: Record
    table: pa.Table
    arrays: dict[str, NDArray[Any]]

    @classmethod
    def read(cls, output: OutputDir, stem: str) -> Pair:
        """
        Raises:
            ShardError: a file cannot be read, or the npz is not the parquet's.
        """
        try:
            table, npz = _table(output.read(f"{stem}.parquet")), output.read(f"{stem}.npz")
            record = Record.from_dict(json.loads(table.schema.metadata[METADATA]))
            if (found := hashlib.sha256(npz).hexdigest()) != record.npz_sha256:
                raise ShardError(f"the npz has the sha256 {found}, not {record.npz_sha256}")
            with np.load(io.BytesIO(npz)) as arrays:
                return cls(record, table, {name: arrays[name] for name in arrays.files})
        except Exception as error:  # the libraries raise whatever a damaged byte makes them trip on
            raise ShardError(
                f"{output.path(stem)}: this finished pair cannot be extended: "
                f"{str(error) or type(error).__name__}; {_again(stem)}"
            ) from error


def _table(parquet: bytes) -> pa.Table:
    # Arrow's threads would hold on to the bytes, and abort a process that ends before they let go.
    options = {"pre_buffer": False, "page_checksum_verification": True}
    with pq.ParquetFile(io.BytesIO(parquet), **options) as file:
        return file.read(use_threads=False)


def _again(stem: str) -> str:
    return f"delete {stem}.parquet to have the shard computed whole by the next submit"


class Extended:
    """A finished pair with what it lacked; it is written as a `Table` is.

    Attributes:
        rows: how many both have.
        rejections: every sample that one of them rejected, with the first reason.
    """

    def __init__(
        self, config: Config, before: Pair, lacked: Table, rejected: Sequence[Rejection]
    ) -> None:
        """
        Args:
            lacked: what the config that `growth.only_new` gives made of the same tar.
            rejected: the samples that it rejected.

        Raises:
            ShardError: the two are not of the same samples.
        """
        self._config, self._before, self._lacked = config, before, lacked
        old: list[str] = before.table["key"].to_pylist()
        new = [key for part in lacked.parts for key in part.keys]
        _require_same_samples(before.record, old, new, rejected)
        place = {name: row for row, name in enumerate(_numbered(old))}
        shared = [(place[name], row) for row, name in enumerate(_numbered(new)) if name in place]
        self._old_rows, self._new_rows = [pair[0] for pair in shared], [pair[1] for pair in shared]
        self.rows = len(shared)
        known = {fit(rejection.key) for rejection in before.record.rejections}
        fresh = [r for r in rejected if fit(r.key) not in known]
        self.rejections = before.record.rejections + fresh

    @property
    def undecided(self) -> list[str]:
        """As a `Table`'s, of what is new."""
        return self._lacked.undecided

    def features(self) -> dict[str, NDArray[Any]]:
        """As a `Table`'s; kept ones are the old npz's values, to the bit."""
        part = self._lacked.config
        made = self._lacked.features()
        new = {n: made[part.renamed(n)][self._new_rows] for n in part.postprocess_features}
        names = {name: self._config.renamed(name) for name in self._config.postprocess_features}
        return {
            out: new[name] if name in new else self._before.arrays[out][self._old_rows]
            for name, out in names.items()
        }

    def table(self) -> pa.Table:
        """As a `Table`'s; kept columns have the old parquet's values and types."""
        config, part = self._config, self._lacked.config
        made = self._lacked.table().take(pa.array(self._new_rows, pa.int64()))
        kept = self._before.table.take(pa.array(self._old_rows, pa.int64()))
        new = {config.renamed(name): made[part.renamed(name)] for name in part.postprocess_columns}
        new |= {name: made[name] for name, _ in part.asked_fields if name != "key"}
        names = ["key", *map(config.renamed, config.postprocess_columns), *config.carried]
        columns = {name: new[name] if name in new else kept[name] for name in names}
        return pa.table({name: values.combine_chunks() for name, values in columns.items()})


def _numbered(keys: Iterable[str]) -> list[tuple[str, int]]:
    """Each key with how often it stood before."""
    seen: Counter[str] = Counter()
    numbered = []
    for key in keys:
        numbered.append((key, seen[key]))
        seen[key] += 1
    return numbered


def _require_same_samples(
    record: Record, old: Sequence[str], new: Sequence[str], rejected: Sequence[Rejection]
) -> None:
    """
    Raises:
        ShardError: the tar has changed, or which of several samples of one key a row is of cannot
            be told.
    """
    # Keys of rejections are on record as `fit` leaves them.
    rows, rows_now = Counter(map(fit, old)), Counter(map(fit, new))
    samples = rows + Counter(fit(r.key) for r in record.rejections)
    samples_now = rows_now + Counter(fit(r.key) for r in rejected)
    again = _again(record.shard)
    # What never was a row is left out: which odd members of a tar count as rejections depends on
    # what is computed, and on the version.
    others = {*(samples - samples_now), *(samples_now - samples)}
    if changed := sorted(key for key in others if rows[key] or rows_now[key]):
        raise ShardError(
            f"{record.shard}: the tar has other samples than when its finished pair was made "
            f"({', '.join(map(repr, changed[:3]))}); {again}"
        )
    for key, count in samples.items():
        fewest = min(rows[key], rows_now[key])
        if count > 1 and 0 < fewest < count:
            raise ShardError(
                f"{record.shard}: {count} samples have the key {key!r} and some are rejected, "
                f"which ones the finished pair does not tell; {again}"
            )


def carry_over(before: Record, now: Record) -> None:
    """What an extended pair's record has of the one before; says so where its tar has changed.

    The tar stays the one that the kept columns were computed from, so that it is told later too.
    """
    now.recomputed += before.recomputed
    known, found = (before.tar_size, before.tar_mtime_ns), (now.tar_size, now.tar_mtime_ns)
    if not before.tar_size or known == found:
        return
    how = "its time is another"
    if before.tar_size != now.tar_size:
        how = f"it had {before.tar_size:,} bytes, and has {now.tar_size:,}"
    now.notices.append(
        f"the tar was replaced or touched since the kept columns were computed ({how}); "
        "`d2m-submit --recompute-changed` computes such shards whole"
    )
    now.tar_size, now.tar_mtime_ns = known
