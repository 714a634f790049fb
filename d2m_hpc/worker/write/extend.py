"""Merge a finished pair with added columns into the pair that the whole config would have made.

Rows are matched by key, and stay in the tar's order; a row that either lacks is left out. The n-th
row of a repeated key is the same sample in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from d2m_hpc.config import Config
from d2m_hpc.errors import ShardError
from d2m_hpc.run.pair import AGAIN, Contents
from d2m_hpc.run.records import Record, Rejection
from d2m_hpc.storage.texts import fit
from d2m_hpc.worker.write.table import Table


class Extended:
    """A finished pair with added columns, written like a `Table`.

    Attributes:
        rows: the number of rows that both have.
        rejections: samples that were rejected before or now, with the first reason.

    Args:
        lacked: the outputs of the config that `extension.only_new` gives, of the same tar.
        rejected: the samples that were rejected for these outputs.

    Raises:
        ShardError: the two have different samples.
    """

    def __init__(
        self, config: Config, before: Contents, lacked: Table, rejected: Sequence[Rejection]
    ) -> None:
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
        """Like a `Table`'s, for the added columns and features."""
        return self._lacked.undecided

    def features(self) -> dict[str, NDArray[Any]]:
        """Like a `Table`'s; the old npz's features are kept to the bit."""
        part = self._lacked.config
        made = self._lacked.features()
        new = {n: made[part.renamed(n)][self._new_rows] for n in part.postprocess_features}
        names = {name: self._config.renamed(name) for name in self._config.postprocess_features}
        return {
            out: new[name] if name in new else self._before.features[out][self._old_rows]
            for name, out in names.items()
        }

    def table(self) -> pa.Table:
        """Like a `Table`'s; the old parquet's columns keep their values and types."""
        config, part = self._config, self._lacked.config
        made = self._lacked.table().take(pa.array(self._new_rows, pa.int64()))
        kept = self._before.table.take(pa.array(self._old_rows, pa.int64()))
        new = {config.renamed(name): made[part.renamed(name)] for name in part.postprocess_columns}
        new |= {name: made[name] for name, _ in part.asked_fields if name != "key"}
        columns = {name: new[name] if name in new else kept[name] for name in config.columns}
        return pa.table({name: values.combine_chunks() for name, values in columns.items()})


@dataclass(frozen=True)
class Derived:
    """A finished pair with derived columns: a parquet in place of the pair's, whose npz stays.

    Attributes:
        before: the pair's record.
    """

    before: Record
    made: pa.Table

    @property
    def undecided(self) -> list[str]:
        """No type is."""
        return []

    @property
    def rows(self) -> int:
        return len(self.made)

    def table(self) -> pa.Table:
        return self.made


Rows = Table | Extended | Derived
"""Outputs that can be written as a pair."""


def _numbered(keys: Iterable[str]) -> list[tuple[str, int]]:
    """Pair each key with the number of its earlier occurrences."""
    seen: Counter[str] = Counter()
    numbered = []
    for key in keys:
        numbered.append((key, seen[key]))
        seen[key] += 1
    return numbered


def _require_same_samples(
    record: Record, old: Sequence[str], new: Sequence[str], rejected: Sequence[Rejection]
) -> None:
    """Raise a `ShardError` for a changed tar, or a repeated key with some samples rejected."""
    # Keys of rejections are on record as `fit` leaves them.
    rows, rows_now = Counter(map(fit, old)), Counter(map(fit, new))
    samples = rows + Counter(fit(r.key) for r in record.rejections)
    samples_now = rows_now + Counter(fit(r.key) for r in rejected)
    advice = AGAIN.format(record.shard)
    # Keys without any row do not count: models and versions differ in the odd members that they
    # reject.
    others = {*(samples - samples_now), *(samples_now - samples)}
    if changed := sorted(key for key in others if rows[key] or rows_now[key]):
        raise ShardError(
            f"{record.shard}: the tar has other samples than when its finished pair was made "
            f"({', '.join(map(repr, changed[:3]))}); {advice}"
        )
    for key, count in samples.items():
        fewest = min(rows[key], rows_now[key])
        if count > 1 and 0 < fewest < count:
            raise ShardError(
                f"{record.shard}: {count} samples have the key {key!r} and some are rejected, "
                f"which ones the finished pair does not tell; {advice}"
            )


def carry_over(before: Record, now: Record) -> None:
    """Copy the old pair's facts to the extended pair's record; add a notice if the tar changed.

    Sizes and times stay those of the kept columns' files, so that later looks see the change too.
    """
    now.recomputed += before.recomputed
    now.texts |= before.texts
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
