"""First steps of derived columns: what is found in a sample, or in all, of a run's features."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from d2m_hpc.config import Config
from d2m_hpc.config.derive import Clusters, Derivation, Duplicates, NegClipLoss, Referring
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.run.pair import Pair
from d2m_hpc.worker.derive import CELLS, nearest

POOL = 4
"""How many times as many rows as are drawn the shards have that they are drawn from."""
PER_CLUSTER = 256
_Arrays = dict[str, NDArray[Any]]
_Some = tuple[list[NDArray[Any]], NDArray[Any], NDArray[Any]]


class FirstSteps:
    """Does the first step of one entry after the other.

    Args:
        pairs: the finished pairs, each with its number of rows.
    """

    def __init__(
        self, config: Config, pairs: Sequence[tuple[Pair, int]], device: torch.device
    ) -> None:
        self._config, self._device = config, device
        self._pairs = [(pair, rows) for pair, rows in pairs if rows]
        self._rows = sum(rows for _, rows in self._pairs)

    @torch.no_grad()
    def __call__(self, name: str, entry: Derivation, kept: Mapping[str, Path]) -> _Arrays:
        """The arrays to keep.

        Args:
            kept: the files of earlier entries.

        Raises:
            ConfigError: the run, or a file, does not have what the entry needs.
            D2MError: a pair cannot be read, or no pair has rows.
        """
        if isinstance(entry, Referring):
            return self._reference(name, entry)
        if not self._rows:
            what = "no shard that is finished has rows yet; `d2m status` says why"
            raise D2MError(f"derive.{name}: {what}")
        if isinstance(entry, Clusters):
            return self._centroids(name, entry)
        if isinstance(entry, Duplicates):
            return self._similarities(entry, kept[entry.within])
        assert isinstance(entry, NegClipLoss)  # the other kinds have no first step
        return self._batches(entry)

    def _features(self, pair: Pair, names: Sequence[str]) -> list[NDArray[Any]]:
        """float32 [rows, D] each, of unit length."""
        there = [self._config.renamed(name) for name in names]
        try:
            found = pair.features(there)
        except Exception as error:  # a store, or a damaged byte, may raise any error
            where = f"{pair.output.path(pair.stem)}.npz: {', '.join(names)}"
            raise D2MError(f"{where} cannot be read: {error}; see `d2m verify`") from error
        return [self._unit(found[name]).cpu().numpy() for name in there]

    def _unit(self, array: NDArray[Any]) -> torch.Tensor:
        flat = torch.from_numpy(np.ascontiguousarray(array)).reshape(len(array), -1)
        return F.normalize(flat.to(self._device).float(), dim=1)

    def _drawn(self, names: Sequence[str], count: int, seed: int) -> _Some:
        """Draw rows, from as many shards as have `POOL` times as many: all need not be read.

        Returns:
            The features' rows, and the stem and the row in its shard of each.
        """
        rng = np.random.default_rng(seed)
        chosen: list[tuple[Pair, int]] = []
        total = 0
        for number in rng.permutation(len(self._pairs)):
            if total >= POOL * count:
                break
            chosen.append(self._pairs[number])
            total += self._pairs[number][1]
        drawn = np.sort(rng.permutation(total)[:count])
        parts, stems, places, start = [], list[str](), [], 0
        for pair, rows in chosen:
            own = drawn[(drawn >= start) & (drawn < start + rows)] - start
            if len(own):
                parts.append([array[own] for array in self._features(pair, names)])
                stems += [pair.stem] * len(own)
                places.append(own)
            start += rows
        joined = [np.concatenate(some) for some in zip(*parts, strict=True)]
        return joined, np.array(stems), np.concatenate(places)

    def _centroids(self, name: str, entry: Clusters) -> _Arrays:
        try:
            import faiss
        except ImportError:
            what = "needs faiss, which is not installed; `pip install 'd2m_hpc[derive]'`"
            raise ConfigError("config", [f"derive.{name}: {what}"]) from None
        if self._rows < entry.count:
            what = f"found {entry.count}; valid is up to the {self._rows:,} rows of the run"
            raise ConfigError("config", [f"derive.{name}.count: {what}"])
        count = max(entry.sample or PER_CLUSTER * entry.count, entry.count)
        [vectors], _, _ = self._drawn([entry.feature], count, entry.seed)
        means = faiss.Kmeans(
            vectors.shape[1],
            entry.count,
            niter=entry.iterations,
            seed=entry.seed,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=len(vectors),
        )
        means.train(vectors)
        return {"vectors": np.asarray(means.centroids)}

    def _batches(self, entry: NegClipLoss) -> _Arrays:
        names, wanted = [entry.image, entry.text], entry.batch * entry.batches
        (image, text), stems, rows = self._drawn(names, wanted, entry.seed)
        rng, found = np.random.default_rng(entry.seed), dict[str, NDArray[Any]]()
        for batch in range(entry.batches):
            some = rng.permutation(len(rows))[: entry.batch]
            own = {"image": image.astype(np.float16), "text": text.astype(np.float16)}
            own |= {"stem": stems, "row": rows}
            found |= {f"{kind}{batch}": values[some] for kind, values in own.items()}
        return found

    def _reference(self, name: str, entry: Referring) -> _Arrays:
        path = Path(entry.reference)
        try:
            vectors = _vectors(path, entry.column)
            if vectors.ndim != 2 or not vectors.size:
                raise ValueError(f"it has the shape {vectors.shape}; valid are vectors, one a row")
            if bad := len(vectors) - int(np.isfinite(vectors).all(axis=1).sum()):
                raise ValueError(f"{bad:,} of its vectors have a NaN, an infinity or a null")
        except (OSError, ValueError, pa.ArrowException) as error:
            what = f"{path} cannot be used: {str(error).splitlines()[0]}"
            raise ConfigError("config", [f"derive.{name}.reference: {what}"]) from None
        for pair, _ in self._pairs[:1]:
            [own] = self._features(pair, [entry.feature])
            if own.shape[1] != vectors.shape[1]:
                what = f"{path} has vectors of {vectors.shape[1]}, {entry.feature!r} of "
                raise ConfigError("config", [f"derive.{name}.reference: {what}{own.shape[1]}"])
        return {"vectors": self._unit(vectors).cpu().numpy()}

    def _similarities(self, entry: Duplicates, clusters: Path) -> _Arrays:
        """The largest cosine of each row with an earlier one of its cluster; 0 without one.

        As in SemDeDup (arXiv 2303.09540), the rows least like their centroid come first, and stay.
        Of rows that are alike in that to five digits, the first of the run comes first.
        """
        with np.load(clusters) as arrays:
            centroids = torch.from_numpy(arrays["vectors"]).to(self._device)
        found = [nearest(unit, centroids) for unit in self._units(entry.feature)]
        label = np.concatenate([place.cpu().numpy() for place, _ in found])
        cosine = np.concatenate([value.cpu().numpy() for _, value in found])
        order = np.lexsort((cosine.round(5), label))  # a stable sort
        sorted_at = np.empty_like(order)
        sorted_at[order] = np.arange(len(order))
        largest = np.empty(len(order), np.float32)
        ends = np.flatnonzero(np.diff(label[order], append=-1)) + 1
        with tempfile.TemporaryDirectory(prefix="d2m-") as folder:
            whole = self._sorted(entry.feature, sorted_at, Path(folder))
            start = 0
            for end in ends.tolist():
                largest[order[start:end]] = self._earlier(whole[start:end])
                start = end
            del whole
        starts = np.cumsum([0, *(rows for _, rows in self._pairs)])
        return {
            pair.stem: largest[start : start + rows]
            for (pair, rows), start in zip(self._pairs, starts, strict=False)
        }

    def _units(self, feature: str) -> Iterator[torch.Tensor]:
        for pair, _ in self._pairs:
            [vectors] = self._features(pair, [feature])
            yield torch.from_numpy(vectors).to(self._device)

    def _sorted(self, feature: str, places: NDArray[Any], folder: Path) -> NDArray[Any]:
        """All vectors in a file on this node, each at its place."""
        whole: Any = None
        start = 0
        for unit in self._units(feature):
            if whole is None:
                shape = (len(places), unit.shape[1])
                whole = np.lib.format.open_memmap(folder / "sorted.npy", "w+", np.float32, shape)
            whole[places[start : start + len(unit)]] = unit.cpu().numpy()
            start += len(unit)
        return whole  # type: ignore[no-any-return]

    def _earlier(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """The largest product of each row with a row before."""
        rows = torch.from_numpy(np.array(vectors)).to(self._device)
        size, found = max(1, CELLS // len(rows)), []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            products = part @ rows[: start + len(part)].T
            found.append(products.tril(start - 1).amax(dim=1).clamp(0, 1).cpu().numpy())
        return np.concatenate(found)


def _vectors(path: Path, column: str | None) -> NDArray[Any]:
    if path.suffix != ".parquet":
        with path.open("rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                raise ValueError("it is no .npy, as numpy.save writes them")
        return _numbers(np.load(path))
    if not path.is_file():  # Arrow would read a folder as a table
        raise ValueError("it is no file")
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            asked = f"found no column {column!r}; " if column else ""
            raise ValueError(f"{asked}valid for `column` is one of {', '.join(names) or 'none'}")
        lists = file.read([column])[column].combine_chunks()
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_one(lists.type) for is_one in kinds):
        raise ValueError(f"column {column!r} is of {lists.type}; valid are lists of numbers")
    widths = {*lists.value_lengths().to_pylist()}
    if len(widths) > 1:
        what = ", ".join("null" if w is None else str(w) for w in sorted(widths, key=str)[:3])
        raise ValueError(f"column {column!r} has lists of {what} values; valid is one length")
    flat = lists.flatten()
    if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)):
        raise ValueError(f"column {column!r} has lists of {flat.type}; valid are numbers")
    return _numbers(flat.to_numpy(zero_copy_only=False).reshape(len(lists), -1 if lists else 0))


def _numbers(found: NDArray[Any]) -> NDArray[Any]:
    if found.dtype.kind not in "fiu":
        raise ValueError(f"it has values of type {found.dtype}; valid are numbers")
    return found.astype(np.float32)
