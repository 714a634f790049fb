"""Compute the derived columns of a shard from its stored features and columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from d2m_hpc.config import Config
from d2m_hpc.config.derive import (
    Clusters,
    Derivation,
    Duplicates,
    HeadScores,
    Nearest,
    NegClipLoss,
    NormSim,
    SqlExpression,
)
from d2m_hpc.errors import ShardError
from d2m_hpc.models import precision
from d2m_hpc.models.family import Use
from d2m_hpc.models.weights import weights_dir
from d2m_hpc.run.derived import evaluated
from d2m_hpc.run.pair import Contents
from d2m_hpc.run.values import arrow_type
from d2m_hpc.worker.write.extend import Derived

CELLS = 1 << 25
"""Cosines that are in memory at once."""
_Columns = dict[str, Any]


@dataclass(frozen=True)
class _Stored:
    """The stored values of a shard, and the derived columns so far.

    Attributes:
        names: the features' names in the npz, by those in the config.
    """

    stem: str
    table: pa.Table
    features: Mapping[str, NDArray[Any]]
    names: Mapping[str, str]
    device: torch.device

    def vectors(self, feature: str) -> Tensor:
        """float32 [rows, D]; raise `ShardError` where the npz has no such feature."""
        found = self.features.get(self.names[feature])
        if found is None or len(found) != len(self.table):
            raise ShardError(f"{self.stem}: the npz has no {feature!r} of each row; see d2m verify")
        return torch.from_numpy(found.reshape(len(found), -1)).to(self.device).float()

    def unit(self, feature: str) -> Tensor:
        """The vectors divided by their lengths."""
        return F.normalize(self.vectors(feature), dim=1)


class Deriver:
    """Makes the derived columns of a run's shards.

    Args:
        kept: finds the file of the first step, if there is one, by the entry's name.
    """

    def __init__(
        self, config: Config, kept: Callable[[str], Path | None], device: torch.device
    ) -> None:
        precision.use_full_float32()
        self._config, self._device = config, device
        self._names = {name: config.renamed(name) for name in config.postprocess_features}
        self._folder = weights_dir(config.weights_dir)
        self._kept = cache(lambda name: _Kept(kept(name), device))
        self._heads: dict[str, Any] = {}

    def reads(self, names: Sequence[str]) -> set[str]:
        """The features in the npz that some entries read."""
        read = (self._config.derive[name].reads.values() for name in names)
        return {self._names[feature] for features in read for feature in features}

    def __call__(self, stem: str, before: Contents, lacked: Sequence[str]) -> Derived:
        """Extend a pair.

        Args:
            lacked: names of the entries that it lacks, or has by other values.

        Raises:
            ShardError: a value cannot be computed.
        """
        config, table = self._config, before.table
        made = table.select(config.columns).replace_schema_metadata(None)
        for name, entry in config.derive.items():
            types = entry.columns(name)
            if name in lacked:
                stored = _Stored(stem, made, before.features, self._names, self._device)
                with _named(name):
                    found = self._columns(name, entry, stored) if len(table) else {}
                    arrays = {c: _typed(c, found.get(c), kind) for c, kind in types.items()}
            else:
                arrays = {column: table[column] for column in types}
            for column, values in arrays.items():
                made = made.append_column(column, values)
        return Derived(before.record, made)

    @torch.no_grad()
    def _columns(self, name: str, entry: Derivation, stored: _Stored) -> _Columns:
        if isinstance(entry, HeadScores):
            return self._scores(name, entry, stored)
        try:
            return MAKERS[type(entry)](name, entry, stored, self._kept(name))
        except RuntimeError as error:
            if "shape" not in str(error):
                raise
            what = "its vectors have another length than those of the first step"
            raise ShardError(f"{stored.stem}: {what}; see d2m verify") from error

    def _scores(self, name: str, entry: HeadScores, stored: _Stored) -> _Columns:
        if name not in self._heads:
            use = Use(name, self._folder, frozenset())
            self._heads[name] = entry.family.build(use, self._device)
        found = self._heads[name](stored.vectors(entry.family.on))
        return dict(zip(entry.columns(name), map(_values, found.values()), strict=True))


class _Kept:
    """The arrays that a first step has kept, each read when it is asked for."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self._arrays = np.load(path) if path else {}
        self._device, self._tensors = device, dict[str, Tensor]()

    def __getitem__(self, name: str) -> NDArray[Any]:
        found: NDArray[Any] = self._arrays[name]
        return found

    def tensor(self, name: str) -> Tensor:
        """An array on the device, in float32."""
        if name not in self._tensors:
            self._tensors[name] = torch.from_numpy(self[name]).to(self._device).float()
        return self._tensors[name]


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Have an error name the entry of `derive` that it is of."""
    try:
        yield
    except ShardError as error:
        raise ShardError(f"derive.{name}: {error}") from error


def _typed(column: str, values: Any, kind: str) -> pa.Array:
    wanted = arrow_type(kind)
    if isinstance(values, pa.ChunkedArray):
        return values
    array = pa.array([] if values is None else values)
    if pa.types.is_floating(array.type) and not np.isfinite(array.drop_null().to_numpy()).all():
        raise ShardError(f"column {column!r} has values that are not finite")
    return array.cast(wanted)


def _values(tensor: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = tensor.cpu().numpy()
    return found


def nearest(vectors: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, the place of the reference with the largest product, and the product."""
    size = max(1, CELLS // len(reference))
    found = [(part @ reference.T).max(dim=1) for part in torch.split(vectors, size)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def _nearest(name: str, entry: Clusters | Nearest, stored: _Stored, kept: _Kept) -> _Columns:
    place, cosine = nearest(stored.unit(entry.feature), kept.tensor("vectors"))
    return {name: _values(place), f"{name}-similarity": _values(cosine)}


def _duplicates(name: str, entry: Duplicates, stored: _Stored, kept: _Kept) -> _Columns:
    found = kept[stored.stem]
    return {name: found >= np.float32(entry.threshold), f"{name}-similarity": found}


def _normsim(name: str, entry: NormSim, stored: _Stored, kept: _Kept) -> _Columns:
    """NormSim_p(x) = ||F x||_p, of unit vectors (arXiv 2405.19547, section 3.2)."""
    vectors, reference = stored.unit(entry.feature), kept.tensor("vectors")
    if entry.norm == "inf":
        return {name: _values(nearest(vectors, reference)[1])}
    size = max(1, CELLS // len(reference))
    found = [(part @ reference.T).norm(dim=1) for part in torch.split(vectors, size)]
    return {name: _values(torch.cat(found))}


def _negcliploss(name: str, entry: NegClipLoss, stored: _Stored, kept: _Kept) -> _Columns:
    """The cosine less tau/2 of the mean, over batches, of both log sums of exp(cosine/tau).

    So it is in arXiv 2405.19547, section 3.1. A batch is a fixed sample of the run and the row; a
    row that is in the sample counts once.
    """
    sides = {"image": stored.unit(entry.image), "text": stored.unit(entry.text)}
    own = (sides["image"] * sides["text"]).sum(dim=1) / entry.temperature
    total = torch.zeros_like(own)
    for batch in range(entry.batches):
        ours = np.flatnonzero(kept[f"stem{batch}"] == stored.stem)
        rows = kept[f"row{batch}"][ours]
        for side, other in (("image", "text"), ("text", "image")):
            against = kept.tensor(f"{other}{batch}")
            total += _log_sums(sides[side], against, own, entry.temperature, (rows, ours))
    return {name: _values(entry.temperature * (own - total / (2 * entry.batches)))}


def _log_sums(
    vectors: Tensor,
    against: Tensor,
    own: Tensor,
    temperature: float,
    same: tuple[NDArray[Any], NDArray[Any]],
) -> Tensor:
    """log(exp(own) + sum of exp(cosine/tau)) for each row.

    Args:
        same: rows, and their places in the batch.
    """
    size, found = max(1, CELLS // len(against)), []
    rows, places = map(torch.from_numpy, same)
    for start in range(0, len(vectors), size):
        cosines = vectors[start : start + size] @ against.T / temperature
        within = (rows >= start) & (rows < start + size)
        cosines[rows[within] - start, places[within]] = -torch.inf
        found.append(cosines.logsumexp(dim=1))
    return torch.logaddexp(torch.cat(found), own)


def _sql(name: str, entry: SqlExpression, stored: _Stored, kept: _Kept) -> _Columns:
    return {name: evaluated(entry.expression, entry.type, stored.table)}


MAKERS: Mapping[type[Derivation], Callable[..., _Columns]] = {
    Clusters: _nearest,
    Duplicates: _duplicates,
    Nearest: _nearest,
    NegClipLoss: _negcliploss,
    NormSim: _normsim,
    SqlExpression: _sql,
}
