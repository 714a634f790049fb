"""One array task: claim, read, compute, write and record shards; the worker's rooms meet here.

A task gets a run folder, a submission and an index, and reads all else there.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path

import torch

from d2m_hpc.config import Config, load
from d2m_hpc.errors import ConfigError, NodeError, ShardError
from d2m_hpc.models.weights import OFFLINE
from d2m_hpc.run import frozen
from d2m_hpc.run.derived import kept_for
from d2m_hpc.run.extension import DERIVE, lacked, only_new
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.owner import require_own
from d2m_hpc.run.pair import Contents, Pair
from d2m_hpc.run.records import DERIVED, Job, Record, Recorder
from d2m_hpc.run.schema import Schema
from d2m_hpc.run.shards import read_some
from d2m_hpc.run.tasks import Progress
from d2m_hpc.storage.suspension import Awake
from d2m_hpc.storage.urls import scheme
from d2m_hpc.worker.batch import Outputs
from d2m_hpc.worker.board import Board, Scene
from d2m_hpc.worker.busy import Busy
from d2m_hpc.worker.claims import Claims, TaskName
from d2m_hpc.worker.compute import trial
from d2m_hpc.worker.compute.ahead import in_turn
from d2m_hpc.worker.compute.graph import Graph
from d2m_hpc.worker.compute.heap import keep_freed
from d2m_hpc.worker.compute.opened import noted, require_same
from d2m_hpc.worker.compute.resolve import Toolbox
from d2m_hpc.worker.cores import cores
from d2m_hpc.worker.derive import Deriver
from d2m_hpc.worker.faults import cuda_failure, ends_task, guarded, logging_to
from d2m_hpc.worker.peek import json_of, require_fields, required, schema_of
from d2m_hpc.worker.progress import Listener, Reporter, Watchdog
from d2m_hpc.worker.read import refusal
from d2m_hpc.worker.read.loader import Findings, Loader, Reading
from d2m_hpc.worker.read.prepare import Recipe
from d2m_hpc.worker.read.reader import Reader
from d2m_hpc.worker.read.scratch import Scratch, scratch
from d2m_hpc.worker.tracking import Tracker
from d2m_hpc.worker.work import Work
from d2m_hpc.worker.write.extend import Extended, carry_over
from d2m_hpc.worker.write.table import Table
from d2m_hpc.worker.write.thread import Result, Settler, last_if_undecided
from d2m_hpc.worker.write.writer import Committer

log = logging.getLogger(__name__)

_Results = AbstractContextManager[Iterator[Result]]
ELSEWHERE = 16
"""Other shards in which a task looks for types at the most."""


def choose_device(configured: int | str, local: bool) -> torch.device:
    """The device that a config names.

    Raises:
        NodeError: there is no such device; with `--local`, the CPU takes its place.
    """
    name = str(configured).removeprefix("cuda:")
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available() and int(name) < torch.cuda.device_count():
        return torch.device("cuda", int(name))
    if local and not torch.cuda.is_available():
        log.warning("no CUDA device here; running on the CPU (device: cpu says so on purpose)")
        return torch.device("cpu")
    raise NodeError(
        f"device {configured!r} is not usable on {node_name()}: "
        f"{torch.cuda.device_count()} CUDA devices are visible; a task without slurm.gres (gpu:1) "
        "may have none, and `device: cpu` needs none"
    )


def node_name() -> str:
    """The node's name in Slurm; several nodes may share a host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def run_task(
    root: Path,
    submission: str,
    index: int,
    local: bool = False,
    listener: Listener | None = None,
    deadline: float | None = None,
    board: Board | None = None,
    alone: Collection[str] = (),
) -> Progress:
    """Work through one chunk, until each of its shards is done, failed or another task's.

    Args:
        local: in the user's own process, where a missing GPU is no fault of a node.
        listener: called at every change.
        deadline: the end of the walltime, in seconds since the epoch.
        board: shared with the process that watches this one.
        alone: stems to try last and one at a time, as one of them kills processes.

    Raises:
        NodeError: the device does not work; no shard fails for that.
        D2MError: the config cannot be worked with.
    """
    run = RunDir(root)
    name = TaskName(submission, index, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    config = load(run.submission(submission).config, frozen=True)
    _set_variables(run, any(scheme(pattern) == "hf" for pattern in config.patterns))
    with logging_to(run.log_of(submission, index), crashes=board is not None):
        device = choose_device(config.device, local)
        config = _threaded(config, cores(in_slurm=not local))
        if board is not None and device.type == "cpu":  # in a process of the task's own
            keep_freed()
        progress = Progress(str(name), node_name(), _device_name(device), _gpu_model(device))
        report = Reporter(
            progress, run.progress_of(str(name)), listener, (board := board or Board()).beat
        )
        tracker = Tracker(run, config, progress) if config.logging else nullcontext()
        with tracker, scratch(config.scratch_bytes, config.slurm.tasks_per_node) as folder:
            try:
                Task(run, name, config, report, folder, board).work(device, deadline, alone)
            except Exception as error:
                if isinstance(error, NodeError) or not (why := cuda_failure(error)):
                    raise
                raise NodeError(f"CUDA failed on {node_name()}: {why}") from error
    return progress


def _threaded(config: Config, cores: int) -> Config:
    """Bound torch's threads by the cores; returns the config with its number of decode threads."""
    torch.set_num_threads(min(torch.get_num_threads(), cores))
    return config.model_copy(update={"nworkers": config.nworkers or cores})


def _set_variables(run: RunDir, is_on_hub: bool) -> None:
    """Tell libraries, which read this when they are imported, as models are built.

    Args:
        is_on_hub: whether shards lie on Hugging Face's hub.
    """
    # Compute nodes have no internet: a library that asks a hub must fail at once, not wait.
    for switch in () if is_on_hub else OFFLINE:
        os.environ.setdefault(switch, "1")
    if torch.cuda.is_available():
        # By default it is in /tmp, on one node only, under a name that anybody can take first. What
        # lies there is run: nobody else may enter, as torch makes folders by the umask alone.
        run.compiled.mkdir(0o700, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(run.compiled))


def _device_name(device: torch.device) -> str:
    """The device, with the indices of Slurm's GPUs for this task."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{device} of {visible}" if visible else str(device)


def _gpu_model(device: torch.device) -> str:
    """The GPU's model, such as `NVIDIA H100 80GB HBM3`; empty on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _gpu_name(device: torch.device) -> str:
    """The driver's name of a GPU, whatever the number that Slurm gives it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


class Task:
    """One array task while it works."""

    def __init__(
        self,
        run: RunDir,
        name: TaskName,
        config: Config,
        report: Reporter,
        scratch: Scratch,
        board: Board,
    ) -> None:
        self.run, self.name, self.config = run, name, config
        self.report, self.scratch, self.board = report, scratch, board
        submission = run.submission(name.submission)
        self.fingerprint: str = json.loads(submission.intent.read_bytes())["fingerprint"]
        self.custom = frozen.read(submission.frozen)
        self.checkpoints = frozen.require_checkpoints(submission.frozen)
        self.output = OutputDir(config.output_metadata_dir)
        self.schema = Schema.of(config)
        self._is_sound = self._is_declared = False
        self.required: Mapping[str, str] = {}  # fields, and the keys of the config that name them
        self.part = config  # the part that the task computes: for an extension, the added keys

    def work(
        self, device: torch.device, deadline: float | None, alone: Collection[str] = ()
    ) -> None:
        """Compute all shards that can be claimed until the deadline."""
        run, name, config, report = self.run, self.name, self.config, self.report
        committer = Committer(self.output, self.scratch.folder)
        require_own(self.output, run, take=False)
        clean, marks = committer.clean, self.fingerprint
        claims = Claims(run, name, config, marks, report, clean, deadline, self.board, alone)
        made = (self._deriving if DERIVED in marks else self._computing)(claims, device)
        recorder = Recorder(run.record(name.submission, name.index, name.attempt))
        log_file = run.log_of(name.submission, name.index)
        report(state="running", shards=len(claims.chunk))
        self.board.set_scene(self._scene())
        try:
            with (
                Awake(),
                report,
                Watchdog(report, config.stall_seconds, log_file, claims.desert),
                Settler(committer, recorder, claims, report) as settler,
                made as results,
                claims,
            ):
                for result in results:
                    settler.put(result)
        except BaseException:
            report(state="stopped")
            raise
        finally:
            claims.let_all_go()  # an interrupt may come between a claim and the work on it
            self.board.set_scene(None)
        report(state="out of time" if claims.is_late else "finished")

    def _computing(self, claims: Claims, device: torch.device) -> _Results:
        """Build the models, and compute the shards from their samples."""
        run, config = self.run, self.config
        with noted(config.custom_file is not None) as opened:
            toolbox = self._toolbox(claims.extends)
            graph, recipe = Graph(self.part, toolbox, device), Recipe.of(self.part, toolbox.inputs)
        require_same(run, self.custom.version, opened - self.checkpoints)
        self.required = required(self.part, toolbox)
        asked, version = self.required, self.custom.version
        self.schema = schema_of(run, config, asked, self.output, toolbox, version)
        return self._computed(claims, graph, recipe)

    @contextmanager
    def _computed(self, claims: Claims, graph: Graph, recipe: Recipe) -> Iterator[Iterator[Result]]:
        gpu = graph.device if graph.device.type == "cuda" else None
        looks = Busy(self.report.progress, _gpu_name(gpu)) if gpu else nullcontext()
        loader = Loader(claims, recipe, self.scratch, gpu, self._look, graph.gate)
        shards = closing(in_turn(graph, loader, loader.poll))
        with graph, looks, loader, shards as computed:
            results = (self._compute(*shard, graph, claims) for shard in computed)
            look_elsewhere = cache(partial(self._look_elsewhere, graph, recipe))
            yield last_if_undecided(results, claims.chunk, look_elsewhere)

    def _deriving(self, claims: Claims, device: torch.device) -> _Results:
        """Compute the derived columns of the shards from their finished pairs."""
        wanted = self._entries(self.fingerprint)
        lacks = lacked(wanted, {DERIVE: self._entries(claims.extends)})
        kept = {name: kept_for(self.run, digest) for name, digest in wanted.items()}
        derive = Deriver(self.config, kept.__getitem__, device)
        return nullcontext(self._derive(work, claims, derive, lacks) for work in claims)

    def _entries(self, fingerprint: str) -> dict[str, str]:
        known = json.loads(self.run.fingerprint(fingerprint).read_bytes())
        return dict(known.get(DERIVE, {}))

    def _derive(self, work: Work, claims: Claims, derive: Deriver, lacks: Sequence[str]) -> Result:
        record = self._record(work)
        result = Result(work, record, Table(self.part, self.schema))
        self.report(shard=work.shard.stem)
        try:
            work.begin()
            before = Pair(self.output, work.shard.stem).contents(derive.reads(lacks))
            with work.clock("compute"):
                result.rows = derive(work.shard.stem, before, lacks)
            was = before.record
            record.rows, record.rejections, record.notices = was.rows, was.rejections, was.notices
            record.tar_size, record.tar_mtime_ns = was.tar_size, was.tar_mtime_ns
            record.texts = was.texts
            record.recomputed = was.recomputed
            self.report(rows=record.rows)
        except BaseException as error:
            if ends_task(error):
                claims.let_go(work)
                raise
            result.error = error
        return result

    def _scene(self) -> Scene:
        return Scene(
            root=str(self.run.root.absolute()),
            submission=self.name.submission,
            index=self.name.index,
            attempt=self.name.attempt,
            host=self.report.progress.host,
            fingerprint=self.fingerprint,
            lease_seconds=self.config.lease_seconds,
            stall_seconds=self.config.stall_seconds,
        )

    def _toolbox(self, extends: str) -> Toolbox:
        """The models of the config, or for an extension, those that the earlier pairs lack."""
        file, sources = self.config.custom_file, self.custom.sources
        if file and not sources:
            raise ConfigError(
                str(self.run.submission(self.name.submission).folder),
                [f"{file} is not frozen in it, for an earlier version wrote it; submit again"],
            )
        toolbox = Toolbox.of(self.config, sources)
        if extends:
            earlier = json.loads(self.run.fingerprint(extends).read_bytes())
            self.part = only_new(self.config, earlier, toolbox.registry)
        return toolbox.only(self.part)

    def _look(self, archive: Reader, url: str) -> None:
        """Raise `ConfigError` for a field that a tar lacks, as all of the run's before it do."""
        require_fields(json_of(archive), url, self.required, self.schema)

    def _compute(
        self, reading: Reading, made: Iterator[Outputs], graph: Graph, claims: Claims
    ) -> Result:
        """Compute a shard, or find out why that fails; release its lease if the task must abort."""
        work = reading.work
        table, record = Table(self.part, self.schema), self._record(work)
        result = Result(work, record, table)
        self.report(shard=work.shard.stem)
        work.clock.lap()
        try:
            pair = Pair(self.output, work.shard.stem)
            finished = pair.contents() if work.job.extends else None
            with work.clock("compute"):
                for outputs in guarded(made):
                    self._require_declared(outputs)
                    table.add(outputs)
                    record.rejections += outputs.rejections
                    record.recomputed += outputs.recomputed
                    worked, waited = work.clock.lap()
                    self.report(rows=len(outputs.keys), worked=worked, waited=waited)
            found = reading.found
            (record.tar_size, record.tar_mtime_ns), record.texts = found.tar, found.texts
            record.notices += found.seen.missed(self.part, self.schema)
            record.rejections = [*found.rejections, *record.rejections, *table.settle()]
            record.rows = table.rows
            if record.rows + len(record.rejections) != found.total:
                told = f"{record.rows} rows and {len(record.rejections)} rejections"
                raise ShardError(
                    f"{work.shard.url}: {told} of {found.total} samples; please report this"
                )
            if finished:
                self._extend(result, finished, table)
            self._judge(work, found, record)
        except BaseException as error:
            reading.cancel()
            if ends_task(error):
                claims.let_go(work)
                raise
            if why := self._fault(graph):
                claims.let_go(work)
                advice = "on any sample; mend its parameters, checkpoint or code, and submit again"
                raise ConfigError("models", [f"{why}, {advice}"]) from error
            result.error = error
        return result

    def _fault(self, graph: Graph) -> str:
        """Why every shard would fail, if the config is at fault; found out at the first failure."""
        if self._is_sound:
            return ""
        why = trial.fault(graph, self.part, self._compare)
        self._is_sound = not why
        return why

    def _require_declared(self, outputs: Outputs) -> None:
        """Compare the task's first outputs with what their models declare."""
        if outputs.keys and not self._is_declared:
            self._is_declared = True
            self._compare(outputs)

    def _compare(self, outputs: Outputs) -> None:
        """Compare outputs with the types and shapes that their models declare.

        Raises:
            ShardError, ConfigError: they are others.
        """
        named = {"postprocess_columns": [*outputs.columns]}
        named |= {"postprocess_features": [*outputs.features]}
        table = Table(self.part.model_copy(update=named), self.schema)
        table.add(outputs)
        table.require_declared()

    def _look_elsewhere(self, graph: Graph, recipe: Recipe) -> None:
        """Find types and shapes that no shard of this task tells, for instance as none has rows.

        The first samples of some shards of the run are computed for it, until all types are known.
        """
        for shard in read_some(self.run.shards, ELSEWHERE):
            log.info("types are looked for in %s, as no shard here tells them", shard.stem)
            table = Table(self.part, self.schema)
            # The task may be copying the same shard: this copy has a name of its own.
            work = Work(Job(shard._replace(stem=f"elsewhere-{shard.stem}")))
            with suppress(ShardError), Loader([work], recipe, self.scratch) as loader:
                for outputs in guarded(graph.run(next(iter(loader)))):
                    table.add(outputs)
                    break
                if not table.undecided:
                    return

    def _record(self, work: Work) -> Record:
        return Record(
            work.shard.stem,
            "done",
            attempt=work.attempt.number,
            fingerprint=self.fingerprint,
            started=time.time(),
            task=str(self.name),
            host=self.report.progress.host,
        )

    def _extend(self, result: Result, finished: Contents, lacked: Table) -> None:
        record = result.record
        result.rows = extended = Extended(self.config, finished, lacked, record.rejections)
        record.rows, record.rejections = extended.rows, extended.rejections
        carry_over(finished.record, record)

    def _judge(self, work: Work, found: Findings, record: Record) -> None:
        """Raise `ShardError` for too many rejections; record the notices of any other shard."""
        rejected, limit = record.rejections, self.config.max_rejected_fraction
        total = record.rows + len(rejected)
        if len(rejected) > limit * total:
            cause = found.causes.foremost(len(rejected) / 2)
            raise refusal.too_many(work.shard.url, rejected, total, limit, cause)
        record.notices += found.notices + found.causes.texts()
        for notice in record.notices:
            log.info("%s: %s", record.shard, notice)
