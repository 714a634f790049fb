"""The door for Python: start a run, open a run, and read what a run has made.

Large libraries are imported by the functions that need them; every error is a `D2MError`.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

from d2m_hpc.errors import ConfigError, D2MError, DiskError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as pads

    from d2m_hpc.config import Config
    from d2m_hpc.launch.export import ExportTasks
    from d2m_hpc.launch.flow import Backend
    from d2m_hpc.launch.head import FirstSamples
    from d2m_hpc.plan.decide import Decision
    from d2m_hpc.plan.suggest import Sight
    from d2m_hpc.plan.workload import Workload
    from d2m_hpc.run.folder import RunDir
    from d2m_hpc.run.tasks import Progress
    from d2m_hpc.subsets.datacomp import Export
    from d2m_hpc.subsets.diff import Difference
    from d2m_hpc.subsets.exports import Exported
    from d2m_hpc.subsets.finished import Features
    from d2m_hpc.subsets.select import Query, Selection
    from d2m_hpc.watch.serve import ReportServer
    from d2m_hpc.watch.status import Summary
    from d2m_hpc.watch.verify import Report
    from d2m_hpc.worker.progress import Listener


@contextmanager
def _explained() -> Iterator[None]:
    """Raise an OSError as a D2MError that says what the system refused, and for which file."""
    try:
        yield
    except OSError as error:
        from d2m_hpc.storage.refused import ADVICE, of_system

        if error.errno in ADVICE:
            raise DiskError(of_system(error)) from error
        raise D2MError(f"{type(error).__name__}: {error}") from error


def _path(name: str, given: Any) -> Path:
    """
    Raises:
        ConfigError: it is no path.
    """
    if not isinstance(given, str | os.PathLike) or given == "":
        raise ConfigError(name, [f"found {_shown(given)}; valid is a path"])
    return Path(given)


def _plain(value: Any) -> Any:
    """A path as its text, and a number of numpy's as Python has it."""
    return value.item() if hasattr(value, "item") else os.fspath(value)


def _shown(value: Any) -> str:
    from d2m_hpc.storage.texts import BRIEF, safe

    try:
        return safe(repr(value), BRIEF)
    except ValueError:  # a number of thousands of digits
        return f"a {type(value).__name__}"


def _require(kind: type | UnionType, what: str, **given: Any) -> None:
    """
    Args:
        given: arguments by name; None is one that was left out.

    Raises:
        ConfigError: one is of another type.
    """
    for name, value in given.items():
        wrong = not isinstance(value, kind) or isinstance(value, bool)
        if value is not None and wrong:
            raise ConfigError("run", [f"{name}: found {_shown(value)}; valid is {what}"])


def _whole(name: str, given: Any, what: str = "a whole number") -> Any:
    """A whole number, also one of numpy's, as an int.

    Raises:
        ConfigError: it is none, or a negative "number of" something.
    """
    with suppress(TypeError):
        found = operator.index(given)
        is_negative = what.startswith("a number of") and found < 0
        if not (isinstance(given, bool) or is_negative):
            return found
    raise ConfigError("run", [f"{name}: found {_shown(given)}; valid is {what}"])


def _seed(given: Any) -> Any:
    return None if given is None else _whole("seed", given)


def _number(name: str, given: Any) -> Any:
    """A number, whole ones as `_whole` has them.

    Raises:
        ConfigError: it is none.
    """
    is_broken = isinstance(given, Real) and not isinstance(given, Integral)
    return given if is_broken else _whole(name, given, "a number")


def _require_names(name: str, given: Any) -> None:
    """
    Raises:
        ConfigError: it is no list of texts; a text is none, though it has letters.
    """
    _require(list | tuple, "a list of names", **{name: given})
    _require(str, "a name", **{f"{name}[{i}]": value for i, value in enumerate(given or ())})


@_explained()
def load_config(path: str | os.PathLike[str], **keys: Any) -> Config:
    """Read a config file.

    Example:
        config = d2m.load_config("config.yml", batch_size=64, slurm={"partition": "gpu"})

    Args:
        path: the YAML file.
        keys: values in place of the file's; `slurm` replaces only the keys in it.

    Raises:
        ConfigError: with every mistake that was found.
    """
    from d2m_hpc.config import load

    file, section = _path("config", path), keys.get("slurm")
    options = keys.pop("slurm") if isinstance(section, Mapping) else {}
    texts = []
    for key, value in keys.items():
        try:
            texts.append(f"{key}={json.dumps(value, default=_plain)}")
        except (TypeError, ValueError, RecursionError):
            what = f"{key}: found {_shown(value)}; valid are values that a YAML file has"
            raise ConfigError(str(file), [what]) from None
    return load(file, texts, options)


@_explained()
def init(
    inputs: str | os.PathLike[str] | Sequence[str],
    path: str | os.PathLike[str] = "d2m.yml",
    output: str | os.PathLike[str] | None = None,
) -> Sight:
    """Look into the first samples of a folder, and write a first config for them.

    Example:
        d2m.init("tars", "d2m.yml")
        d2m.submit("d2m.yml", local=True)

    Args:
        inputs: a folder of tars, pictures or parquets, a pattern or a URL, or several.
        path: the new config file.
        output: the folder of the outputs; by default beside the config.

    Raises:
        ConfigError: the file exists, or there are no samples in the tars.
    """
    from d2m_hpc.plan import suggest

    file = _path("config", path)
    if file.exists():
        raise ConfigError("init", [f"{file} exists; name another file by -o"])
    given = [inputs] if isinstance(inputs, str | os.PathLike) else [*inputs]
    where = file.absolute().with_name(f"{file.stem}-metadata") if output is None else output
    if "" in (*given, where):
        raise ConfigError("init", ["found ''; valid is a path, such as . for the current folder"])
    return suggest.write(file, [*map(str, given)], os.fspath(where))


@_explained()
def head(
    config: str | os.PathLike[str] | Config, count: int = 5, where: str = "config"
) -> FirstSamples:
    """Compute the first samples of a config; nothing is written.

    Example:
        d2m.head("config.yml").table.to_pandas()

    Args:
        config: a file, or the result of `load_config`.
        count: the number of samples.
        where: the config's file, for messages, if `config` is no file.

    Raises:
        ConfigError: names every mistake.
        D2MError: the samples cannot be read or computed.
    """
    from d2m_hpc.launch import head as first

    count = _whole("count", count, "a number of samples")
    return first.head(*_loaded(config, where), max(count, 1))


def submit(
    config: str | os.PathLike[str] | Config,
    *,
    local: bool = False,
    preflight: bool = True,
    recompute_changed: bool = False,
    moved: bool | None = None,
    on_progress: Listener | None = None,
) -> Run:
    """Compute the shards of a config that are left; a second call goes on where the first stopped.

    Example:
        run = d2m.submit("config.yml", local=True)
        assert run.status().complete

    Args:
        config: a file, or the result of `load_config`.
        local: compute in this process and return at the end; otherwise submit array tasks to Slurm
            and return at once (`Run.wait` waits for them).
        preflight: look for mistakes that would stop every task before submitting array tasks.
        recompute_changed: compute tars again that were replaced.
        moved: whether tars of planned names and sizes elsewhere are the planned ones.
        on_progress: called with the progress of a local run, several times a second.

    Raises:
        ConfigError: names every mistake, or every difference from the run's last config.
        WeightsError: a checkpoint is missing.
        SlurmError: Slurm refused.
    """
    thorough = preflight and not local
    asked = inspect(config, thorough, recompute_changed, moved)
    return begin(asked, _backend(local, on_progress))


def _backend(local: bool, on_progress: Listener | None) -> Backend:
    from d2m_hpc.launch.arrays import SlurmArrays
    from d2m_hpc.launch.local import ThisProcess

    listener = on_progress or (lambda progress: None)
    return ThisProcess(lambda shards: nullcontext(listener)) if local else SlurmArrays()


def _loaded(config: str | os.PathLike[str] | Config, where: str) -> tuple[Config, str]:
    """A config, and its file for messages, which is `where` unless the file was named."""
    from d2m_hpc.config import Config

    if isinstance(config, Config):
        return config, where
    with every_mistake():
        return load_config(config), str(config)


@contextmanager
def every_mistake() -> Iterator[None]:
    """Raise the `ConfigError` of a config that cannot be read with what else is wrong in it."""
    try:
        yield
    except ConfigError as error:
        if error.valid is None:
            raise
        from d2m_hpc.plan.workload import further

        more = (m for m in further(error.valid, error.where) if m not in error.mistakes)
        raise ConfigError(error.where, [*error.mistakes, *more]) from None


@_explained()
def inspect(
    config: str | os.PathLike[str] | Config,
    thorough: bool = False,
    recompute_changed: bool = False,
    moved: bool | None = None,
    where: str = "config",
) -> Workload:
    """Check all that a config names.

    Args:
        where: the config's file, for messages, if `config` is no file.
    """
    from d2m_hpc.plan import workload

    asked = workload.inspect(*_loaded(config, where), thorough)
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
    """Have a back end do all shards that are left."""
    from d2m_hpc.launch import flow

    flow.submit(workload, backend, on_decision, left_out)
    return Run(workload.run, workload.config)


def derive(
    config: str | os.PathLike[str] | Config,
    *,
    local: bool = False,
    allow_missing: bool = False,
    on_progress: Listener | None = None,
) -> Run:
    """Compute the columns of a config's `derive` that finished shards lack, of stored values.

    Example:
        run = d2m.derive("config.yml", local=True)
        run.select("kept.npy", where="NOT duplicate")

    Args:
        local, on_progress: as `submit` takes them.
        allow_missing: derive though shards are not finished.

    Raises:
        ConfigError: names every mistake.
        D2MError: shards are not finished.
        SlurmError: Slurm refused.
    """
    return begin_derive(inspect(config), _backend(local, on_progress), allow_missing)


@_explained()
def begin_derive(
    workload: Workload,
    backend: Backend,
    allow_missing: bool = False,
    on_decision: Callable[[Decision], None] = lambda decision: None,
    left_out: Collection[str] = (),
) -> Run:
    """Do the first steps that are left, and have a back end do the shards."""
    from d2m_hpc.launch import derive as first
    from d2m_hpc.launch.arrays import SlurmArrays

    elsewhere = first.in_a_job if isinstance(backend, SlurmArrays) else None
    first.derive(workload, backend, elsewhere, on_decision, left_out, allow_missing)
    return Run(workload.run, workload.config)


@_explained()
def open(target: str | os.PathLike[str]) -> Run:
    """Open a run that was submitted before.

    Example:
        print(d2m.open("metadata/.d2m").status().eta_seconds)

    Args:
        target: the run's config file or its run folder.

    Raises:
        ConfigError: there is no such run.
    """
    from d2m_hpc.watch.status import find_run

    return Run(*find_run(_path("run", target)))


class Run:
    """A run in its folder: its state and its outputs.

    Attributes:
        config: the config of the last submit.
    """

    def __init__(self, folder: RunDir, config: Config) -> None:
        self._folder, self.config = folder, config

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.root

    def __repr__(self) -> str:
        return f"d2m_hpc.open({str(self.path)!r})"

    def _new(self, name: str, given: Any, is_file: bool = False) -> Path:
        """The path of a folder or file to write.

        Raises:
            ConfigError: it is no path, or is among the run's own files.
        """
        from d2m_hpc.run.outputs import OutputDir
        from d2m_hpc.run.owner import require_apart

        path = _path(name, given)
        output = OutputDir(self.config.output_metadata_dir)
        require_apart(output, self._folder, path, is_file)
        return path

    @_explained()
    def status(self, offline: bool = False) -> Summary:
        """Count the run's shards and rows: `done`, `failed`, `rows`, `failures` and more.

        Args:
            offline: read the run folder and the outputs alone; ask neither Slurm nor for the tars.
        """
        from d2m_hpc.watch.status import look

        return look(self._folder, self.config, offline)

    @_explained()
    def tasks(self) -> list[Progress]:
        """The tasks at work, as they told their progress last: node, shard, rows and speed.

        Example:
            sum(task.speed for task in d2m.open("config.yml").tasks())
        """
        from d2m_hpc.run.tasks import attempts

        return [task for task in attempts(self._folder) if task.is_active]

    @_explained()
    def verify(self, sample: int | None = None, seed: int | None = None) -> Report:
        """Check every output against its record.

        Args:
            sample: the number of shards to check, drawn at random; by default all.
            seed: the seed of the draw; by default 0.
        """
        from d2m_hpc.watch.verify import verify

        sample = None if sample is None else _whole("sample", sample, "a number of shards")
        return verify(self._folder, self.config, sample, _seed(seed))

    @_explained()
    def cancel(self) -> int:
        """Cancel all pending and running array tasks; returns how many there were.

        Raises:
            SlurmError: some tasks are still there, or Slurm does not answer.
        """
        from d2m_hpc.launch import arrays

        return arrays.cancel(self._folder)

    @_explained()
    def go_on(self, most: int = 20, then: str = "", notify: str = "") -> str:
        """Let small jobs submit again what the array tasks leave, until the run is complete.

        Example:
            run = d2m.submit("config.yml")
            run.go_on(then="sbatch train.sh")

        Args:
            most: rounds after which the run stops, whatever is left.
            then: a shell line that becomes a job of its own once the run is complete.
            notify: a shell line that is run when the last round has ended, with `D2M_RUN`,
                `D2M_STATE` (`complete` or `stopped`) and `D2M_WHY` in its environment.

        Returns:
            The job id of the first round.

        Raises:
            SlurmError: Slurm refused, or does not answer.
        """
        from d2m_hpc.launch import rounds
        from d2m_hpc.run.rounds import Rounds

        most = _whole("most", most, "a number of rounds")
        return rounds.begin(self._folder, self.config, Rounds(most, then, notify))

    @_explained()
    def wait(self) -> None:
        """Wait until the last array task has ended, or until every shard is done and what Slurm
        lists of the run has not changed for five minutes: a Slurm that died may list ghosts.

        Raises:
            SlurmError: no task that is left can start, or Slurm has not answered for minutes.
        """
        from d2m_hpc.launch import arrays

        arrays.wait(self._folder, self.config)

    @_explained()
    def forget(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Take shards out of the plan.

        Args:
            names: stems, or patterns of stems, paths or URLs.

        Returns:
            The shards' stems, and the stems of those shards whose outputs remain.

        Raises:
            ConfigError: there is no such shard.
            D2MError: tasks are working on some of the shards.
        """
        from d2m_hpc.launch import arrays
        from d2m_hpc.plan.forget import forget
        from d2m_hpc.run.outputs import OutputDir

        _require_names("names", names)
        gone = [s.stem for s in forget(self._folder, names, arrays.live_stems(self._folder))]
        present = OutputDir(self.config.output_metadata_dir).stems()
        return gone, [stem for stem in gone if stem in present]

    @_explained()
    def remember(self, names: Sequence[str]) -> list[str]:
        """Put shards that `forget` took out back into the plan; returns their stems."""
        from d2m_hpc.plan.forget import remember

        _require_names("names", names)
        return [shard.stem for shard in remember(self._folder, names)]

    @_explained()
    def log(self, shard: str) -> Path:
        """The log of the task that worked on a shard last.

        Raises:
            ConfigError: no task has worked on the shard.
        """
        from d2m_hpc.watch.status import log_of

        return log_of(self._folder, shard)

    @_explained()
    def task_logs(self, task: str) -> list[Path]:
        """The logs of an array task: its batch script's, and those of its tasks.

        Example:
            d2m.open("config.yml").task_logs("4711_3")

        Raises:
            ConfigError: the run has no such task, or the task wrote no log.
        """
        from d2m_hpc.launch import ended

        _require(str, "a text", task=task)
        return ended.logs(self._folder, task)

    @_explained()
    def report(
        self,
        output: str | os.PathLike[str] = "report.html",
        score: str | None = None,
        samples: int = 8,
    ) -> Path:
        """Write a report on the run and its outputs as one HTML file.

        Args:
            score: the column that sorts the contact sheet.
            samples: the number of pictures at each end of the score.
        """
        from d2m_hpc.launch.guest import pictures

        samples = _whole("samples", samples, "a number of pictures")
        path = self._new("output", output, is_file=True)
        with pictures():
            from d2m_hpc.watch.page import write

            write(self._folder, self.config, path, score, samples)
        return path

    @_explained()
    def serve(
        self, port: int = 0, host: str = "127.0.0.1", score: str | None = None, samples: int = 8
    ) -> ReportServer:
        """Make a server of the report, which is made anew while the run works.

        Example:
            with run.serve() as server:
                print(server.url)
                server.serve_forever()

        Args:
            port: 0 for any that is free.
            score, samples: those of `report`.

        Raises:
            ConfigError: the page cannot be made, or the address is taken.
        """
        from d2m_hpc.launch.guest import pictures
        from d2m_hpc.watch.serve import ReportServer

        port = _whole("port", port, "a number of a port")
        samples = _whole("samples", samples, "a number of pictures")

        def page() -> tuple[bytes, bool]:
            from d2m_hpc.watch.page import rendered
            from d2m_hpc.watch.status import find_run

            with pictures():
                return rendered(*find_run(self.path), score, samples)

        server = ReportServer(page, port, host)  # a page takes seconds: first the address
        try:
            server.page()  # whatever is wrong is told here, and not in a browser
        except BaseException:
            server.server_close()
            raise
        return server

    @_explained()
    def diff(
        self,
        other: Run,
        by: str = "key",
        tolerance: float = 0.0,
        features: bool = False,
        on_shards: Callable[[int, int], None] = lambda done, total: None,
    ) -> Difference:
        """Compare the outputs with those of another run: rows, columns, and shifts of values.

        Example:
            assert run.diff(d2m.open("other.yml"), tolerance=1e-3).is_equal

        Args:
            by: the column that tells the rows of shards of one name: `key`, or for example `uid`.
            tolerance: numbers that differ by no more are equal.
            features: compare the features, too.
            on_shards: called with the number of shards read, and of all shards.

        Raises:
            ConfigError: a run has no column `by`.
            D2MError: a file cannot be read.
        """
        from d2m_hpc.subsets.diff import compare

        _require(str, "a column's name", by=by)
        tolerance = _number("tolerance", tolerance)
        ours, theirs = (self._folder, self.config), (other._folder, other.config)
        return compare(ours, theirs, by, tolerance, features, on_shards)

    @_explained()
    def select(
        self,
        output: str | os.PathLike[str] | None,
        where: str = "true",
        top: float = 0.0,
        by: str = "",
        on_shards: Callable[[int, int], None] | None = None,
        *,
        within: str = "",
        sample: float = 0.0,
        weight: str = "",
        seed: int | None = None,
        join: str | os.PathLike[str] | None = None,
        columns: Sequence[str] = (),
        look: str | os.PathLike[str] | None = None,
    ) -> Selection:
        """Write the uids of the best samples: a subset for DataComp's tools, or a parquet.

        Example:
            run.select("best.npy", "\"text-words\" > 3", top=0.3, by="oai-clip-vit-l14-score")
            run.select("some.parquet", sample=1000, seed=1, columns=["uid", "url"])

        Args:
            output: a .npy, .parquet or .jsonl file; None for thresholds of `by`, or for a look.
            where: an SQL expression over the columns.
            top: the share (up to 1) or the number of the best samples among those of `where`.
            by: the column whose highest values are the best.
            on_shards: called with the number of shards read, and of all shards.
            within: a column; `top` and `sample` are of the samples of each of its values.
            sample: the share or the number of samples to draw from these, by `seed`.
            weight: a column; a sample of twice the weight is twice as likely to be drawn first.
            join: a parquet of more columns by `uid` (or `shard` and `key`), or a .npy subset.
            columns: of a parquet; by default the uid, or shard and key.
            look: an HTML file, for pictures of what is cut beside those of what is kept.

        Raises:
            ConfigError: names every mistake in the query.
        """
        from d2m_hpc.subsets.select import Query

        _require(str, "a text", where=where, by=by, within=within, weight=weight)
        top, sample, seed = _number("top", top), _number("sample", sample), _seed(seed)
        beside = None if join is None else _path("join", join)
        query = Query(where, by, top, within, sample, weight, seed, beside)
        return self._select(query, output, look, on_shards, columns)

    def _select(
        self,
        query: Query,
        output: str | os.PathLike[str] | None,
        look: str | os.PathLike[str] | None,
        on_shards: Callable[[int, int], None] | None,
        columns: Sequence[str],
    ) -> Selection:
        from d2m_hpc.launch.guest import pictures
        from d2m_hpc.subsets.select import select

        _require_names("columns", columns)
        path = None if output is None else self._new("output", output, is_file=True)
        if look is None:
            return select(self._folder, self.config, query, path, on_shards, columns)
        page = self._new("look", look, is_file=True)
        with pictures():
            from d2m_hpc.watch.page.look import Look

            shown = Look(self._folder, self.config, page)
            return select(self._folder, self.config, query, path, on_shards, columns, shown)

    @_explained()
    def export(
        self,
        layout: str,
        folder: str | os.PathLike[str],
        features: Sequence[str] | None = None,
        *,
        image: str = "",
        text: str = "",
        lists: str | os.PathLike[str] | None = None,
        part: Sequence[int] = (),
        allow_missing: bool = False,
        on_rows: Callable[[int, int], None] = lambda done, of: None,
    ) -> Exported:
        """Write the outputs in another tool's layout; again, it goes on, or adds what is new.

        Example:
            run.export("hf", "dataset", features=["oai-clip-vit-l14-image"])
            datasets.load_dataset("dataset", split="train", streaming=True)

        Args:
            layout: `npy`, `clip-retrieval`, `hf`, `lance`, `links` or `subset-tars`.
            folder: a new folder, or that of the same export before.
            features: names of features for `npy`, `hf` and `lance`; by default all.
            image: the feature for `img_emb`, if there are several; likewise `text`.
            lists: the kept keys for `subset-tars`, which `select` writes to a name in `.jsonl`.
            part: (2, 3) for what the second of three tasks of `export_tasks` writes.
            allow_missing: leave out shards that are not finished.
            on_rows: called with the number of rows written, and of all rows.

        Raises:
            ConfigError: there is no such layout or feature, or the folder has other files.
            D2MError: shards are not finished, or an output cannot be read.
        """
        from d2m_hpc.subsets import exports, layouts

        _require_names("features", features)
        _require(str, "a text", layout=layout, image=image, text=text)
        path = self._new("folder", folder)
        if layout == "links":
            return exports.link(self._folder, self.config, path, allow_missing)
        kept = None if lists is None else _path("lists", lists)
        options = (features, image, text, kept, allow_missing)
        found = layouts.of(layout, self._folder, self.config, path, *options)
        return exports.export(self._folder, found, on_rows, exports.part_of(part))

    @_explained()
    def export_tasks(
        self,
        folder: str | os.PathLike[str],
        lists: str | os.PathLike[str],
        tasks: int,
        slurm: Mapping[str, Any] = {},
    ) -> ExportTasks:
        """Write `subset-tars` by array tasks on Slurm; again, it starts those that are needed.

        Example:
            tasks = run.export_tasks("kept", "kept.jsonl", 8, {"partition": "cpu"})
            assert not tasks.wait(), "the logs of tasks that failed"

        Args:
            folder, lists: as `export` takes them.
            tasks: among so many the shards are divided.
            slurm: keys of the config's `slurm:`, before the run's own.

        Raises:
            ConfigError: the lists, the folder or a key is wrong.
            D2MError: tasks of another number or with other lists wait or run for the folder.
            SlurmError: Slurm refused.
        """
        from d2m_hpc.launch import export
        from d2m_hpc.subsets import exports
        from d2m_hpc.subsets.tars import SubsetTars

        if (tasks := _whole("tasks", tasks)) < 1:
            raise ConfigError("export", [f"--tasks: found {tasks}; valid is 1 or more"])
        where, kept = self._new("folder", folder), _path("lists", lists)
        made = SubsetTars(self._folder, self.config, where, kept)
        live = partial(export.live, self._folder, made.root)
        divided = partial(exports.divided, self._folder, made, tasks, live)

        def left() -> set[int]:
            with divided() as (shares, _):
                return shares

        with divided() as (shares, at_work):
            given, new = (self._folder, made.root), shares - at_work
            job = export.start(*given, made.lines(), tasks, new, slurm) if new else ""
        return export.ExportTasks(at_work, new, job, *given, left)

    @_explained()
    def export_datacomp(
        self,
        folder: str | os.PathLike[str] = "datacomp",
        allow_missing: bool = False,
        on_rows: Callable[[int, int], None] = lambda done, of: None,
    ) -> Export:
        """Write DataComp's blur map and sizes.json, and outputs by DataComp's names if need be.

        Args:
            allow_missing: write them even if shards are not finished.
            on_rows: called with the number of rows that have DataComp's names, and of all.
        """
        from d2m_hpc.subsets.datacomp import export

        where = self._new("folder", folder)
        return export(self._folder, self.config, where, allow_missing, on_rows)

    @_explained()
    def dataset(self) -> pads.Dataset:
        """Open the columns of all finished shards as a dataset, without reading them.

        A query reads only its columns and rows, so a run may be larger than memory; DuckDB and
        polars take such a dataset as it is.

        Example:
            run.dataset().count_rows(filter=pc.field("image-brightness") > 0.5)
            duckdb.from_arrow(run.dataset()).aggregate("avg(\"image-brightness\")")
        """
        from d2m_hpc.subsets import finished

        return finished.dataset(self._folder, self.config)

    @_explained()
    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the columns of all finished shards, in the plan's order, rows in the tars' order.

        Ten million rows of ten scores take half a gigabyte; `dataset` suits a larger run.

        Example:
            run.table(["key", "image-brightness"]).to_pandas()

        Args:
            columns: names of columns, and `shard` for the stem of each row's shard; by default all
                but that one.

        Raises:
            ConfigError: there is no such column.
            D2MError: a parquet cannot be read.
        """
        from d2m_hpc.subsets import finished

        _require_names("columns", columns)
        return finished.table(self._folder, self.config, columns)

    @_explained()
    def features(self, name: str, mapped: bool = False) -> Features:
        """Read the vectors of a feature in all finished shards, a shard at a time or as one array.

        Example:
            for part in run.features("oai-clip-vit-l14-image"):
                index.add_with_ids(part.values, part.keys)
            mapped = {part.stem: part.values for part in run.features("image-histogram", True)}

        Args:
            name: the feature's name in the config's `postprocess_features`, or in the npz.
            mapped: map the files in place of reading them; only the rows that are used are read,
                and no checksum is compared.

        Raises:
            ConfigError: there is no such feature.
        """
        from d2m_hpc.subsets import finished

        _require(str, "a name", name=name)
        return finished.features(self._folder, self.config, name, mapped)
