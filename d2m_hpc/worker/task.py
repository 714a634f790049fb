"""One array task: claim, load, run, write, record; where loader, graph and writer meet.

A task is told a run folder, a submission and an index; everything else it reads there.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import logging
import os
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Queue

import torch

from d2m_hpc.config import Config, load
from d2m_hpc.errors import D2MError, NodeError, ShardError
from d2m_hpc.outputs import OutputDir
from d2m_hpc.state.lease import Lease
from d2m_hpc.state.manifest import Record, Recorder, Shard
from d2m_hpc.state.rundir import RunDir, overwrite
from d2m_hpc.worker.graph import Graph, Toolbox
from d2m_hpc.worker.loader import Loader, Recipe, Work
from d2m_hpc.worker.writer import Committer, Table

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
PROGRESS_SECONDS = 2.0
BROKEN: tuple[type[Exception], ...] = (
    (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
)
STALLED = 5
"""Exit code of a task that the watchdog ended."""


@dataclass
class Progress:
    """How far a task is; written to the run folder every few seconds."""

    task: str
    host: str = ""
    device: str = ""
    shards: int = 0
    done: int = 0
    failed: int = 0
    rows: int = 0
    rejected: int = 0
    shard: str = ""
    started: float = field(default_factory=time.time)
    updated: float = 0.0
    state: str = "running"


Listener = Callable[[Progress], None]


@dataclass(frozen=True)
class TaskName:
    """Which array task this is; `attempt` counts its requeues."""

    submission: str
    index: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.submission}-{self.index}-{self.attempt}"


def choose_device(configured: int | str, local: bool) -> torch.device:
    """The device that a config names.

    Raises:
        NodeError: there is no such device; under `--local` the CPU takes its place.
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
        f"device {configured!r} is not usable on {socket.gethostname()}: "
        f"{torch.cuda.device_count()} CUDA devices are visible"
    )


def node_name() -> str:
    """As Slurm knows it; several of its nodes may share a host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def has_chunk(run: RunDir, submission: str, index: int) -> bool:
    with open(run.submission(submission).chunks, encoding="utf-8") as file:
        return next(itertools.islice(file, index, None), None) is not None


def read_chunk(run: RunDir, submission: str, index: int) -> list[Shard]:
    """The shards of one array task."""
    with open(run.submission(submission).chunks, encoding="utf-8") as file:
        line = next(itertools.islice(file, index, None), None)
    if line is None:
        raise D2MError(f"submission {submission} of {run.root} has no chunk {index}")
    return [Shard(*shard) for shard in json.loads(line)]


def _device_name(device: torch.device) -> str:
    """With the GPU's own index where Slurm shows this task only some."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{device} of {visible}" if visible else str(device)


def _log_to(path: Path) -> None:
    """Append this program's log to the task's file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("d2m_hpc")
    package.setLevel(logging.INFO)
    package.addHandler(handler)


def run_task(
    root: Path,
    submission: str,
    index: int,
    local: bool = False,
    listener: Listener | None = None,
    deadline: float | None = None,
) -> Progress:
    """Work through one chunk; returns when each of its shards is done, failed or someone else's.

    Args:
        local: in the user's own process, where a missing GPU is no fault of a node.
        listener: told of every change.
        deadline: when the walltime ends, in seconds since the epoch.

    Raises:
        NodeError: the device does not work; no shard is counted as failed for it.
        D2MError: the config cannot be worked with.
    """
    # Compute nodes have no internet: a library that asks a hub must fail now, not wait.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run = RunDir(root)
    name = TaskName(submission, index, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    _log_to(run.log_of(submission, index))
    config = load(run.submission(submission).config)
    device = choose_device(config.device, local)
    toolbox = Toolbox.of(config)
    task = Task(run, name, config, read_chunk(run, submission, index), listener, deadline)
    task.progress.device = _device_name(device)
    with tempfile.TemporaryDirectory(prefix="d2m-") as scratch:
        return task.work(Graph(config, toolbox, device), Recipe.of(config, toolbox.inputs), scratch)


class Task:
    """The state of one array task while it works."""

    def __init__(
        self,
        run: RunDir,
        name: TaskName,
        config: Config,
        shards: list[Shard],
        listener: Listener | None,
        deadline: float | None,
    ) -> None:
        self.run, self.name, self.config, self.shards = run, name, config, shards
        self.deadline = deadline
        self.slowest = 0.0
        self.held: dict[str, Work] = {}
        self.output = OutputDir(config.output_metadata_dir)
        intent = run.submission(name.submission).intent.read_bytes()
        self.fingerprint: str = json.loads(intent)["fingerprint"]
        self.recorder = Recorder(run.record(name.submission, name.index, name.attempt))
        self.progress = Progress(str(name), node_name(), shards=len(shards))
        self.listener = listener
        self._announced = 0.0
        self._lock = threading.Lock()

    def work(self, graph: Graph, recipe: Recipe, scratch: str) -> Progress:
        committer = Committer(self.output, Path(scratch))
        try:
            with (
                Watchdog(self),
                Closing(self, committer) as closing,
                Loader(self._claimed(committer), recipe, Path(scratch)) as loader,
            ):
                for work in loader:
                    try:
                        result = self._compute(work, graph)
                    except BaseException:
                        work.release()
                        raise
                    closing.put(work, result)
        except BaseException:
            self._announce(state="stopped")
            raise
        finally:
            committer.close()
        self._announce(state="out of time" if self._is_late() else "finished")
        return self.progress

    def _claimed(self, committer: Committer) -> Iterator[Work]:
        """The shards that are ours to do: the chunk's, then those that slower tasks have not begun.

        Shards of the chunk that are in other hands are come back to until they are settled.
        """
        waiting = [(shard, self._lease(shard)) for shard in self.shards]
        while waiting and not self._is_late():
            busy = []
            for shard, lease in waiting:
                if self._is_late():
                    return
                if not lease.claim():
                    busy.append((shard, lease))
                elif work := self._begin(shard, lease, committer):
                    yield work
            waiting = busy
            if waiting:
                self._announce()
                time.sleep(POLL_SECONDS)
        if self.config.steal:
            yield from self._stolen(committer)

    def _stolen(self, committer: Committer) -> Iterator[Work]:
        """Shards of the submission's other chunks, those first that their tasks come to last."""
        finished = self.output.stems()
        for shard in reversed(self._others()):
            if self._is_late():
                return
            lease = self._lease(shard)
            if shard.stem in finished or not lease.claim():
                continue
            if work := self._begin(shard, lease, committer):
                log.info("%s: taken from a slower task", shard.stem)
                self._announce(shards=1)
                yield work

    def _others(self) -> list[Shard]:
        own = {s.stem for s in self.shards}
        with open(self.run.submission(self.name.submission).chunks, encoding="utf-8") as file:
            return [Shard(*s) for line in file for s in json.loads(line) if s[0] not in own]

    def _lease(self, shard: Shard) -> Lease:
        return Lease(self.run.lease(shard.stem), self.config.lease_seconds)

    def _begin(self, shard: Shard, lease: Lease, committer: Committer) -> Work | None:
        """A shard that was just claimed, or None where somebody has finished it meanwhile."""
        if self._is_settled(shard):
            lease.release()
            return None
        committer.clean(shard.stem)
        self.held[shard.stem] = work = Work(shard, lease)
        return work

    def _is_late(self) -> bool:
        """Too little walltime is left for another shard of the slowest kind seen."""
        return self.deadline is not None and time.time() + 1.2 * self.slowest > self.deadline

    def _is_settled(self, shard: Shard) -> bool:
        """Someone finished it since it was planned; ask only while its lease is held."""
        record = self.output.record(shard.stem)
        if record is None or record.fingerprint != self.fingerprint:
            return False
        log.info("%s: already done by task %s", shard.stem, record.task)
        self._announce(done=1)
        return True

    def _compute(self, work: Work, graph: Graph) -> Result:
        """All outputs of a shard, or why it failed."""
        result = Result(self._record(work.shard), Table(self.config))
        self._announce(shard=work.shard.stem)
        try:
            for batch in work:
                outputs = graph(batch)
                result.table.add(outputs)
                result.record.rejections += outputs.rejections
                result.record.recomputed += outputs.recomputed
                self._announce(rows=len(outputs.keys))
            self._account(work, result)
        except Exception as error:
            work.cancel()
            _raise_if_broken(error)
            result.error = error
        return result

    def _record(self, shard: Shard) -> Record:
        return Record(
            shard.stem,
            "done",
            fingerprint=self.fingerprint,
            started=time.time(),
            task=str(self.name),
            host=self.progress.host,
        )

    def _account(self, work: Work, result: Result) -> None:
        """Every sample is a row or a rejection, and not too many are rejections.

        Raises:
            ShardError: one of the two does not hold.
        """
        record = result.record
        record.rows = result.table.rows
        record.rejections = [*work.rejections, *record.rejections]
        rejected = len(record.rejections)
        if record.rows + rejected != work.total:
            raise ShardError(
                f"{work.shard.url}: {record.rows} rows and {rejected} rejections of {work.total} "
                "samples; please report this"
            )
        limit = self.config.max_rejected_fraction
        if rejected > limit * work.total:
            key, reason = record.rejections[0]
            raise ShardError(
                f"{work.shard.url}: {rejected} of {work.total} samples are rejected, over "
                f"max_rejected_fraction ({limit}); the first: {key!r}, {reason}"
            )

    def settle(self, work: Work, result: Result, committer: Committer) -> None:
        """Commit or fail a shard, record it, let go of it. Runs in the writer thread."""
        record = result.record
        try:
            if result.error is None:
                self._commit(work, result, committer)
        except Superseded:
            log.warning("%s: another task took it over; nothing was written", record.shard)
            work.release()
            return
        except Exception as error:
            result.error = error
        finally:
            self.held.pop(record.shard, None)
        if result.error is not None:
            _fail(record, result.error)
            log.error("%s failed: %s", record.shard, record.error)
        record.finished = record.finished or time.time()
        self.slowest = max(self.slowest, record.finished - record.started)
        self.recorder.append(record)
        work.release()
        done = record.state == "done"
        self._announce(done=done, failed=not done, rejected=len(record.rejections) * done)

    def _commit(self, work: Work, result: Result, committer: Committer) -> None:
        if work.lease is not None and work.lease.lost:
            raise Superseded
        result.record.finished = time.time()
        committer.commit(result.table, result.record)
        log.info("%s: %d rows", result.record.shard, result.record.rows)

    def _announce(self, state: str = "", shard: str = "", **more: int) -> None:
        """Count, tell the listener, and now and then the run folder."""
        with self._lock:
            progress = self.progress
            progress.state, progress.shard = state or progress.state, shard or progress.shard
            for key, value in more.items():
                setattr(progress, key, getattr(progress, key) + value)
            progress.updated = time.time()
            if state or progress.updated - self._announced > PROGRESS_SECONDS:
                self._announced = progress.updated
                path = self.run.progress_of(str(self.name))
                overwrite(path, json.dumps(asdict(progress)).encode())
            if self.listener:
                self.listener(progress)


@dataclass
class Result:
    """A shard that was computed, or the error that stopped it."""

    record: Record
    table: Table
    error: BaseException | None = None


class Superseded(Exception):
    """This task was stopped for so long that its lease is another's."""


def _raise_if_broken(error: Exception) -> None:
    """
    Raises:
        NodeError: CUDA itself is in error; no later shard can be computed by this process.
    """
    cause = error.__cause__ or error
    if isinstance(cause, BROKEN) and not isinstance(cause, torch.OutOfMemoryError):
        raise NodeError(f"CUDA failed on {node_name()}: {cause}") from error


class Watchdog:
    """Ends the process when nothing has happened for `stall_seconds`: a hung mount, a dead GPU."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        limit, progress = self._task.config.stall_seconds, self._task.progress
        while not self._over.wait(min(limit / 4, 10)):
            if time.time() - max(progress.updated, progress.started) > limit:
                self._stop(limit)

    def _stop(self, limit: float) -> None:
        log.error("no batch for %.0f s: all stacks follow; this task ends", limit)
        path = self._task.run.log_of(self._task.name.submission, self._task.name.index)
        with open(path, "a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        for work in list(self._task.held.values()):
            work.release()
        os._exit(STALLED)


def _fail(record: Record, error: BaseException) -> None:
    record.state, record.kind, record.error = "failed", type(error).__name__, str(error)
    record.finished = time.time()
    if not isinstance(error, D2MError):
        record.traceback = "".join(traceback.format_exception(error))


class Closing:
    """The writer thread: settles shards in order while the next ones are computed."""

    def __init__(self, task: Task, committer: Committer) -> None:
        self._queue: Queue[tuple[Work, Result] | None] = Queue(1)
        self._task, self._committer = task, committer
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="writer", daemon=True)

    def __enter__(self) -> Closing:
        self._thread.start()
        return self

    def put(self, work: Work, result: Result) -> None:
        """
        Raises:
            whatever stopped the thread: without records nothing more can be done.
        """
        if self._error is not None:
            raise self._error
        self._queue.put((work, result))

    def __exit__(self, *_: object) -> None:
        """Settle what was computed, even where the task is being stopped."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _loop(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._task.settle(*item, self._committer)
                except BaseException as error:
                    self._error = error
