"""What the door for Python does: start a run, open one, and read what it made.

Nothing large is imported before it is needed, and every error is a `D2MError`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from d2m_hpc.errors import ConfigError, D2MError, DiskError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as pads
    from numpy.typing import NDArray

    from d2m_hpc.config import Config
    from d2m_hpc.launch.flow import Backend
    from d2m_hpc.plan.decide import Decision
    from d2m_hpc.plan.workload import Workload
    from d2m_hpc.run.folder import RunDir
    from d2m_hpc.run.pair import Pair
    from d2m_hpc.subsets.datacomp import Export
    from d2m_hpc.subsets.select import Selection
    from d2m_hpc.watch.status import Summary
    from d2m_hpc.watch.verify import Report
    from d2m_hpc.worker.progress import Listener

FOOTERS = 16
"""Parquets whose types make those of the dataset: the tasks of a run agree on them."""


@contextmanager
def _explained() -> Iterator[None]:
    """
    Raises:
        D2MError: the system or a store refused something; a disk, where that is at fault.
    """
    try:
        yield
    except OSError as error:
        from d2m_hpc.storage.refused import ADVICE, of_system

        if error.errno in ADVICE:
            raise DiskError(of_system(error)) from error
        raise D2MError(f"{type(error).__name__}: {error}") from error


@_explained()
def load_config(path: str | os.PathLike[str], **keys: Any) -> Config:
    """Read a config file.

    Example:
        config = d2m.load_config("config.yml", batch_size=64, slurm={"partition": "gpu"})

    Args:
        path: the YAML file.
        keys: values in place of the file's; of `slurm`, those of its keys that are named.

    Raises:
        ConfigError: with every mistake that was found.
    """
    from d2m_hpc.config import load

    options = keys.pop("slurm", {})
    texts = [f"{key}={json.dumps(value, default=str)}" for key, value in keys.items()]
    return load(Path(path), texts, options)


def submit(
    config: str | os.PathLike[str] | Config,
    *,
    local: bool = False,
    preflight: bool = True,
    recompute_changed: bool = False,
    moved: bool | None = None,
    on_progress: Listener | None = None,
) -> Run:
    """Compute what is left of a config's shards; called again, go on from there.

    Example:
        run = d2m.submit("config.yml", local=True)
        assert run.status().complete

    Args:
        config: a file, or what `load_config` made of one.
        local: compute in this process and return when all is done; else submit array tasks to
            Slurm and return at once, and `Run.wait` waits for them.
        preflight: before array tasks are submitted, look for what would fail on every node.
        recompute_changed: compute tars again that were replaced.
        moved: whether tars of planned names and sizes elsewhere are those that were planned.
        on_progress: told how far a local run is, several times a second.

    Raises:
        ConfigError: with every mistake that was found, or what differs from the run's last config.
        WeightsError: a checkpoint is missing.
        SlurmError: Slurm refused.
    """
    from d2m_hpc.launch.arrays import SlurmArrays
    from d2m_hpc.launch.local import ThisProcess

    listener = on_progress or (lambda progress: None)
    backend = ThisProcess(lambda shards: nullcontext(listener)) if local else SlurmArrays()
    thorough = preflight and not local
    return begin(inspect(config, thorough, recompute_changed, moved), backend)


@_explained()
def inspect(
    config: str | os.PathLike[str] | Config,
    thorough: bool = False,
    recompute_changed: bool = False,
    moved: bool | None = None,
    where: str = "config",
) -> Workload:
    """Look at all that a config names.

    Args:
        where: the config's file, for messages, where it was read already.
    """
    from d2m_hpc.plan import workload

    if isinstance(config, str | os.PathLike):
        config, where = load_config(config), str(config)
    asked = workload.inspect(config, where, thorough)
    asked.recompute_changed, asked.moved = recompute_changed, moved
    return asked


@_explained()
def dry_run(workload: Workload) -> Decision:
    """Decide what a submit would do; change nothing."""
    from d2m_hpc.launch import arrays
    from d2m_hpc.run.outputs import OutputDir
    from d2m_hpc.run.owner import require_own

    require_own(OutputDir(workload.config.output_metadata_dir), workload.run, take=False)
    return arrays.look(workload)


@_explained()
def begin(
    workload: Workload,
    backend: Backend,
    on_decision: Callable[[Decision], None] = lambda decision: None,
    left_out: Collection[str] = (),
) -> Run:
    """Have a back end do all that is left."""
    from d2m_hpc.launch import flow

    flow.submit(workload, backend, on_decision, left_out)
    return Run(workload.run, workload.config)


@_explained()
def open(target: str | os.PathLike[str]) -> Run:
    """A run that was submitted before.

    Example:
        print(d2m.open("metadata/.d2m").status().eta_seconds)

    Args:
        target: its config file or its run folder.

    Raises:
        ConfigError: there is none.
    """
    from d2m_hpc.watch.status import find_run

    return Run(*find_run(Path(target)))


class Part(NamedTuple):
    """A feature's vectors of one shard, a row each, in the order of its parquet.

    Attributes:
        stem: the shard's name, and that of its files.
        keys: of the samples.
        values: [rows, ...]
    """

    stem: str
    keys: list[str]
    values: NDArray[Any]


class Run:
    """A run, by its folder: how far it is, and what it made.

    Attributes:
        config: as it was submitted last.
    """

    def __init__(self, folder: RunDir, config: Config) -> None:
        self._folder, self.config = folder, config

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.root

    def __repr__(self) -> str:
        return f"d2m_hpc.open({str(self.path)!r})"

    @_explained()
    def status(self) -> Summary:
        """How far the run is, in figures: `done`, `failed`, `rows`, `failures` and more."""
        from d2m_hpc.watch.status import look

        return look(self._folder, self.config)

    @_explained()
    def verify(self, sample: int | None = None, seed: int = 0) -> Report:
        """Check every output against its record.

        Args:
            sample: so many shards only, drawn at random.
            seed: of the draw.
        """
        from d2m_hpc.watch.verify import verify

        return verify(self._folder, self.config, sample, seed)

    @_explained()
    def cancel(self) -> int:
        """Cancel all pending and running array tasks; returns how many there were.

        Raises:
            SlurmError: some are still there, or Slurm cannot be asked.
        """
        from d2m_hpc.launch import arrays

        return arrays.cancel(self._folder)

    @_explained()
    def wait(self) -> None:
        """Wait until the last array task has ended.

        Raises:
            SlurmError: nothing that is left can start, or Slurm has not answered for minutes.
        """
        from d2m_hpc.launch import arrays

        arrays.wait(self._folder)

    @_explained()
    def forget(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Take shards out of the plan.

        Args:
            names: stems, or patterns of stems, paths or URLs.

        Returns:
            Their stems, and those of them whose outputs are there and stay.

        Raises:
            ConfigError: there is no such shard.
            D2MError: tasks are working on some of them.
        """
        from d2m_hpc.launch import arrays
        from d2m_hpc.plan.forget import forget
        from d2m_hpc.run.outputs import OutputDir

        gone = [s.stem for s in forget(self._folder, names, arrays.live_stems(self._folder))]
        present = OutputDir(self.config.output_metadata_dir).stems()
        return gone, [stem for stem in gone if stem in present]

    @_explained()
    def remember(self, names: Sequence[str]) -> list[str]:
        """Put shards back into the plan that `forget` took out; returns their stems."""
        from d2m_hpc.plan.forget import remember

        return [shard.stem for shard in remember(self._folder, names)]

    @_explained()
    def log(self, shard: str) -> Path:
        """The log of the task that worked on a shard last.

        Raises:
            ConfigError: no task has worked on it.
        """
        from d2m_hpc.watch.status import log_of

        return log_of(self._folder, shard)

    @_explained()
    def report(
        self,
        output: str | os.PathLike[str] = "report.html",
        score: str | None = None,
        samples: int = 8,
    ) -> Path:
        """Write what the run did and made as one HTML file.

        Args:
            score: the column that sorts the contact sheet.
            samples: pictures at each end of the score.
        """
        from d2m_hpc.launch.guest import pictures

        with pictures():
            from d2m_hpc.watch.page import write

            write(self._folder, self.config, Path(output), score, samples)
        return Path(output)

    @_explained()
    def select(
        self,
        output: str | os.PathLike[str],
        where: str = "true",
        top: float = 0.0,
        by: str = "",
        on_shards: Callable[[int, int], None] | None = None,
    ) -> Selection:
        """Write the uids of the best samples, as a subset for DataComp's tools.

        Example:
            run.select("best.npy", "\"text-words\" > 3", top=0.3, by="oai-clip-vit-l14-score")

        Args:
            output: a file in .npy.
            where: an SQL expression over the columns.
            top: of what `where` leaves, the best share, or so many.
            by: the column whose highest values are the best.
            on_shards: told how many shards were read, of how many.

        Raises:
            ConfigError: with every mistake in the query.
        """
        from d2m_hpc.subsets.select import Query, select

        query = Query(where, by, top)
        return select(self._folder, self.config, query, Path(output), on_shards)

    @_explained()
    def export_datacomp(
        self, folder: str | os.PathLike[str] = "datacomp", allow_missing: bool = False
    ) -> Export:
        """Write DataComp's blur map and sizes.json.

        Args:
            allow_missing: though shards are not finished.
        """
        from d2m_hpc.subsets.datacomp import export

        return export(self._folder, self.config, Path(folder), allow_missing)

    @_explained()
    def dataset(self) -> pads.Dataset:
        """The columns of all finished shards, of which nothing is read before it is asked for.

        Columns and filters are chosen while files are read, so that a run of any size can be
        worked through; DuckDB and polars take such a dataset as it is.

        Example:
            run.dataset().count_rows(filter=pc.field("image-brightness") > 0.5)
            duckdb.from_arrow(run.dataset()).aggregate("avg(\"image-brightness\")")
        """
        import pyarrow as pa
        import pyarrow.dataset as pads

        pairs = self._pairs()
        if not pairs:
            return pads.dataset(pa.table({"key": pa.array([], pa.string())}))
        output = pairs[0].output
        some = pairs[:: -(-len(pairs) // FOOTERS)]
        with _readable(output.url):
            kinds = [pair.metadata().schema.to_arrow_schema().remove_metadata() for pair in some]
            schema = pa.unify_schemas(kinds, promote_options="permissive")
            paths = [output.path(pair.name(".parquet")) for pair in pairs]
            return pads.dataset(paths, schema, "parquet", output.fs)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The columns of all finished shards in memory, in the plan's order, rows in the tars'.

        Ten million rows of ten scores take half a gigabyte; of a larger run, `dataset` reads some.

        Example:
            run.table(["key", "image-brightness"]).to_pandas()

        Args:
            columns: names of columns; by default all.

        Raises:
            ConfigError: there is no such column.
            D2MError: a parquet cannot be read.
        """
        found = self.dataset()
        for name in columns or ():
            _require_known("column", name, found.schema.names)
        with _readable(self.config.output_metadata_dir):
            return found.to_table(columns)

    @_explained()
    def features(self, name: str) -> Features:
        """One feature's vectors of all finished shards, a shard at a time, or as one array.

        Example:
            for part in run.features("oai-clip-vit-l14-image"):
                index.add_with_ids(part.values, part.keys)

        Args:
            name: as in the config's `postprocess_features`, or as in the npz.

        Raises:
            ConfigError: there is no such feature.
        """
        names = {n: self.config.renamed(n) for n in self.config.postprocess_features}
        _require_known("feature", name, {**names, **{n: n for n in names.values()}})
        return Features(names.get(name, name), self._pairs())

    def _pairs(self) -> list[Pair]:
        """Of all finished shards with rows, in the plan's order."""
        from d2m_hpc.plan.standing import standings
        from d2m_hpc.run.outputs import OutputDir
        from d2m_hpc.run.pair import Pair

        output = OutputDir(self.config.output_metadata_dir)
        done = standings(self._folder, self.config).done
        return [Pair(output, stem) for stem, outcome in done.items() if outcome.rows]


class Features:
    """A feature's vectors; each time that they are gone through, they are read anew.

    Attributes:
        name: as in the npz.
    """

    def __init__(self, name: str, pairs: Sequence[Pair]) -> None:
        self.name, self._pairs = name, pairs

    def __iter__(self) -> Iterator[Part]:
        """
        Raises:
            D2MError: a file cannot be read, or its pair's other file is not of the same rows.
        """
        for pair in self._pairs:
            with _readable(pair.output.path(pair.stem)):
                keys: list[str] = pair.table(["key"])["key"].to_pylist()
                values = pair.features([self.name])[self.name]
            if len(keys) != len(values):
                raise _unreadable(pair.output.path(pair.stem), "its files are of different rows")
            yield Part(pair.stem, keys, values)

    def array(self, path: str | os.PathLike[str] | None = None) -> tuple[list[str], NDArray[Any]]:
        """All keys, and all vectors as one array, row by row.

        Args:
            path: a new .npy file that the array is written to and mapped from, where it does not
                fit into memory; by default it is in memory.

        Raises:
            D2MError: a file cannot be read, or shards have vectors of different lengths.
        """
        import numpy as np

        with _readable(self.name):
            rows = sum(pair.metadata().num_rows for pair in self._pairs)
        keys: list[str] = []
        whole: NDArray[Any] = np.empty((0, 0), np.float32)
        for part in self:
            shape, dtype = (rows, *part.values.shape[1:]), part.values.dtype
            if not keys and path is None:
                whole = np.empty(shape, dtype)
            elif not keys and path is not None:
                whole = np.lib.format.open_memmap(Path(path), "w+", dtype, shape)
            if (whole.shape, whole.dtype) != (shape, dtype):
                raise _unreadable(part.stem, f"{self.name!r} is of another shape or type here")
            whole[len(keys) : len(keys) + len(part.keys)] = part.values
            keys += part.keys
        return keys, whole


def _require_known(kind: str, name: str, known: Collection[str]) -> None:
    """
    Raises:
        ConfigError: a name is none of those known.
    """
    from d2m_hpc.storage.texts import nearest

    if name not in known:
        raise ConfigError("run", [f"found no {kind} {name!r}{nearest(name, known)}"])


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """
    Raises:
        D2MError: an output cannot be read.
    """
    try:
        yield
    except D2MError:
        raise
    except Exception as error:  # each store, and each library at a damaged byte, raises its own
        raise _unreadable(where, f"{type(error).__name__}: {error}") from error


def _unreadable(where: str, why: str) -> D2MError:
    return D2MError(f"{where} cannot be read: {why}; see `d2m verify`")
