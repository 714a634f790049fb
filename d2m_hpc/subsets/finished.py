"""Read the finished outputs of a run: columns as a dataset or a table, features shard by shard.

Importing this module loads no large library, as `import d2m_hpc` imports it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from d2m_hpc.errors import ConfigError, D2MError, DiskError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.dataset as pads
    from numpy.typing import NDArray

    from d2m_hpc.config import Config
    from d2m_hpc.run.folder import RunDir
    from d2m_hpc.run.manifest import Outcome
    from d2m_hpc.run.pair import Pair

FOOTERS = 16
"""The most parquets whose types are read for a dataset's: the tasks of a run agree on types."""


class Part(NamedTuple):
    """The vectors of a feature in one shard, a row each, in the order of the shard's parquet.

    Attributes:
        stem: the shard's name, and that of its files.
        keys: the samples' keys.
        values: [rows, ...]
    """

    stem: str
    keys: list[str]
    values: NDArray[Any]


class Features:
    """The vectors of a feature; each iteration reads the files anew.

    Attributes:
        name: the feature's name in the npz.

    Args:
        mapped: map the arrays in place of reading them.
    """

    def __init__(self, name: str, pairs: Sequence[Pair], mapped: bool = False) -> None:
        self.name, self._pairs, self._mapped = name, pairs, mapped

    def __iter__(self) -> Iterator[Part]:
        """Read one shard after the other.

        Raises:
            D2MError: a file cannot be read, or the two files of a pair differ in their rows.
        """
        for pair in self._pairs:
            with readable(pair.output.path(pair.stem)):
                keys: list[str] = pair.table(["key"])["key"].to_pylist()
                values = pair.features([self.name], self._mapped)[self.name]
                if values.shape[:1] != (len(keys),):
                    raise ValueError("its files are of different rows")
            yield Part(pair.stem, keys, values)

    def array(self, path: str | os.PathLike[str] | None = None) -> tuple[list[str], NDArray[Any]]:
        """All keys, and all vectors as one array, row by row.

        Args:
            path: a new .npy file to write the array to and map it from, if the array does not fit
                into memory.

        Raises:
            DiskError: the new file cannot be written.
            D2MError: a file cannot be read, shards have vectors of different lengths, or these take
                more memory than there is.
        """
        import numpy as np

        with readable(self.name):
            rows = sum(pair.metadata().num_rows for pair in self._pairs)
        keys: list[str] = []
        whole: NDArray[Any] = np.empty((0, 0), np.float32)
        for part in self:
            shape, dtype = (rows, *part.values.shape[1:]), part.values.dtype
            if not keys:
                whole = _array(shape, dtype, path)
            if (whole.shape, whole.dtype) != (shape, dtype):
                raise unreadable(part.stem, f"{self.name!r} is of another shape or type here")
            if len(keys) + len(part.keys) > rows:
                raise unreadable(part.stem, "it has changed meanwhile")
            whole[len(keys) : len(keys) + len(part.keys)] = part.values
            keys += part.keys
        if len(keys) != rows:
            raise unreadable(self.name, "shards have changed meanwhile")
        return keys, whole


def _array(
    shape: tuple[int, ...], dtype: np.dtype[Any], path: str | os.PathLike[str] | None
) -> NDArray[Any]:
    """Memory, or a new file, for so many values."""
    import numpy as np

    from d2m_hpc.storage.refused import of_system

    size = f"an array of {math.prod(shape) * dtype.itemsize / 1e9:.1f} GB"
    try:
        if path is None:
            return np.empty(shape, dtype)
        return np.lib.format.open_memmap(Path(path), "w+", dtype, shape)
    except MemoryError:
        raise D2MError(f"{size} is more than memory has; `array(path)` maps a file") from None
    except OSError as error:
        raise DiskError(f"{path} cannot take {size}: {of_system(error)}") from None
    except (TypeError, ValueError) as error:
        raise D2MError(f"{path!r} is no path of a new file: {error}") from None


def dataset(run: RunDir, config: Config) -> pads.Dataset:
    """Open the columns of all finished shards, in the plan's order."""
    import pyarrow as pa
    import pyarrow.dataset as pads

    pairs = _pairs(run, config)
    if not pairs:
        return pads.dataset(pa.table({"key": pa.array([], pa.string())}))
    output = pairs[0][0].output
    with readable(output.url):
        paths = [output.path(pair.name(".parquet")) for pair, _ in pairs]
        return pads.dataset(paths, schema_of(pairs), "parquet", output.fs)


def schema_of(pairs: Sequence[tuple[Pair, Outcome]]) -> pa.Schema:
    """The types of the columns of all pairs, which are one run's; each with its record."""
    import pyarrow as pa

    each = {made.fingerprint: pair for pair, made in pairs}  # some may lack derived columns
    some = [*each.values(), *(pair for pair, _ in pairs[:: -(-len(pairs) // FOOTERS)])]
    kinds = [pair.metadata().schema.to_arrow_schema().remove_metadata() for pair in some]
    return pa.unify_schemas(kinds, promote_options="permissive")


def table(run: RunDir, config: Config, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of all finished shards, by default all columns."""
    import pyarrow.compute as pc

    found = dataset(run, config)
    names = [*(found.schema.names if columns is None else columns)]
    made = "shard" in names and "shard" not in found.schema.names
    for name in names:
        require_known("column", name, [*found.schema.names, "shard"])
    asked = ["__filename" if made and name == "shard" else name for name in names]
    with readable(config.output_metadata_dir):
        read = found.to_table(asked)
    if made:
        at = names.index("shard")
        stems = pc.replace_substring_regex(read.column(at), r"^.*/|\.parquet$", "")
        read = read.set_column(at, "shard", stems)
    return read


def features(run: RunDir, config: Config, name: str, mapped: bool = False) -> Features:
    """Find a feature of all finished shards, by its name in the config or in the npz."""
    names = {n: config.renamed(n) for n in config.postprocess_features}
    require_known("feature", name, {*names, *names.values()})
    pairs = [pair for pair, _ in _pairs(run, config)]
    return Features(names.get(name, name), pairs, mapped)


def _pairs(run: RunDir, config: Config) -> list[tuple[Pair, Outcome]]:
    """The pairs and records of all finished shards with rows, in the plan's order."""
    from d2m_hpc.plan.standing import standings
    from d2m_hpc.run.outputs import OutputDir
    from d2m_hpc.run.pair import Pair

    output = OutputDir(config.output_metadata_dir)
    done = standings(run, config).done
    return [(Pair(output, stem), outcome) for stem, outcome in done.items() if outcome.rows]


def require_known(kind: str, name: str, known: Collection[str]) -> None:
    """Raise ConfigError if a name is not known."""
    from d2m_hpc.storage.texts import nearest

    if name not in known:
        raise ConfigError("run", [f"found no {kind} {name!r}{nearest(name, known)}"])


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Raise every error in reading an output as a D2MError that names the output."""
    try:
        yield
    except D2MError:
        raise
    except Exception as error:  # each store, and each library at a damaged byte, raises its own
        raise unreadable(where, f"{type(error).__name__}: {error}") from error


def unreadable(where: str, why: str) -> D2MError:
    return D2MError(f"{where} cannot be read: {' '.join(why.split())}; see `d2m verify`")
