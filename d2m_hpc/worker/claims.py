"""Claim the shards of a task: its own chunk's, then shards that slower tasks have not begun."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from d2m_hpc.config import Config
from d2m_hpc.errors import D2MError
from d2m_hpc.run.attempts import Attempt, Attempts
from d2m_hpc.run.chunks import Chunks
from d2m_hpc.run.extension import refits
from d2m_hpc.run.fingerprints import meets
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import Job, Record, Recorder, died, read_records
from d2m_hpc.storage.files import FILE_MODE, make_folder
from d2m_hpc.storage.lease import Lease
from d2m_hpc.storage.refused import require_there
from d2m_hpc.worker.board import Board
from d2m_hpc.worker.progress import Reporter
from d2m_hpc.worker.work import Work

log = logging.getLogger(__name__)

POLL_SECONDS, SETTLED_SECONDS = 1.0, 0.05
MARGIN = 1.2
"""A shard may take 1.2 times as long as the slowest one so far."""


@dataclass(frozen=True)
class TaskName:
    """The name of an array task; `attempt` counts its requeues."""

    submission: str
    index: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.submission}-{self.index}-{self.attempt}"


class Claims:
    """Iterate over the shards to do; claim each at the last moment.

    Attributes:
        chunk: the task's own jobs.
        extends: the fingerprint of the pairs that all of the task's jobs extend, or "".

    Args:
        fingerprint: of the config; pairs of any other are not finished.
        clean: fences earlier attempts at a shard; called while its lease is held.
        deadline: the end of the walltime, in seconds since the epoch.
        board: shared with the process that watches this one.
        alone: stems to try last and one at a time, as one of them kills processes.
    """

    def __init__(
        self,
        run: RunDir,
        name: TaskName,
        config: Config,
        fingerprint: str,
        report: Reporter,
        clean: Callable[[str, int], bool],
        deadline: float | None,
        board: Board | None = None,
        alone: Collection[str] = (),
    ) -> None:
        self._name = name
        self._attempts = Attempts(run.attempts)
        self._submission = run.submission(name.submission)
        chunks = Chunks(self._submission)
        if name.index >= len(chunks):
            raise D2MError(f"submission {name.submission} of {run.root} has no chunk {name.index}")
        [self.chunk] = chunks.read([name.index])
        self.extends = self.chunk[0].extends if self.chunk else ""
        self._need = self.chunk[0].need if self.chunk else 0
        self._chunks, self._index = chunks, name.index
        self._run, self._config, self._fingerprint = run, config, fingerprint
        self._output = OutputDir(config.output_metadata_dir)
        self._recorder = Recorder(run.record(name.submission, name.index, name.attempt))
        self._report, self._clean, self._board = report, clean, board or Board()
        # From Slurm's time of day to a clock that nobody sets.
        self._deadline = None if deadline is None else _now() + deadline - time.time()
        self._alone, self._put_off = set(alone), set[str]()
        self._lock = threading.Lock()  # guards the next two, which all threads change
        self._slowest = 0.0
        self._held: dict[str, Work] = {}
        self._stopped = threading.Event()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        """Claim no more shards."""
        self._stopped.set()

    def __iter__(self) -> Iterator[Work]:
        """Yield the chunk's shards, then shards that other tasks have not begun.

        Shards that may have killed a process come last in the chunk, one at a time.
        """
        self._alone |= {job.stem for job in self.chunk if job.alone}
        yield from self._own([j for j in self.chunk if j.stem not in self._alone])
        for job in [j for j in self.chunk if j.stem in self._alone]:
            self._wait_for_settled()
            yield from self._own([job])
            self._wait_for_settled()
        if self._config.steal:
            yield from self._steal()

    def _wait_for_settled(self) -> None:
        """Wait until every shard that the task holds is settled, or rests until all others are."""
        while not all(work.rests for work in self._in_hand()):
            if self._stopped.wait(SETTLED_SECONDS):
                return

    def _own(self, jobs: Iterable[Job]) -> Iterator[Work]:
        """Yield our shards; poll those leased by other tasks until they are done or failed."""
        waiting = [(job, self._lease(job)) for job in jobs]
        while waiting:
            busy = []
            for job, lease in waiting:
                if self.is_late or self._stopped.is_set():
                    return
                if not lease.claim():
                    busy.append((job, lease))
                elif work := self._begin(job, lease):
                    yield work
                elif job.stem not in self._put_off:
                    self._report(done=1)
            waiting = busy
            if waiting:
                self._report()
                self._stopped.wait(POLL_SECONDS)

    def _steal(self) -> Iterator[Work]:
        """Steal from the end of other tasks' chunks."""
        folder = self._submission.extended  # a file for each extended shard
        extended = os.listdir(folder) if folder.is_dir() else ()
        finished = set(extended) if self.extends else self._output.stems()
        for job in self._others():
            if self.is_late or self._stopped.is_set():
                return
            if job.alone or (job.stem in finished and not job.again):
                continue
            if not (lease := self._lease(job)).claim():
                continue
            if work := self._begin(job, lease, own=False):
                log.info("%s: taken from a slower task", job.stem)
                self._report(shards=1)
                yield work

    def _others(self) -> Iterator[Job]:
        """Yield other chunks' jobs with the same `extends` and `need`, from the end; one chunk is
        in memory."""
        numbers = (i for i in reversed(range(len(self._chunks))) if i != self._index)
        for chunk in self._chunks.read(numbers):
            for job in reversed(chunk):
                if (job.extends, job.need) == (self.extends, self._need):
                    yield job

    def _lease(self, job: Job) -> Lease:
        return Lease(self._run.lease(job.stem), self._config.lease_seconds)

    def _begin(self, job: Job, lease: Lease, own: bool = True) -> Work | None:
        """Begin a shard whose lease was just claimed; None where no work is left."""
        try:
            require_there(self._run.leases)
            pair = Pair(self._output, job.stem)
            last, record = self._attempts.last(job.stem), pair.record()
            known = max(job.attempt, last.number if last else 0, record.attempt if record else 0)
            if self._clean(job.stem, known + 1):  # no earlier attempt can commit now
                record = pair.record()
            why = self._why_not(job, None if job.replaces(record) else record)
            if not why and last and (last.died or not last.ended):
                why = self._after_death(job, last) if own else "a process may have died of it"
        except BaseException:
            lease.release()
            raise
        if why:
            log.info("%s: %s", job.stem, why)
            lease.release()
            return None
        before = last or Attempt(0)
        host = self._report.progress.host
        attempt = Attempt(known + 1, str(self._name), host, died=before.died, lost=before.lost)
        work = Work(job, lease, self._attempts, attempt, last is None, self._board)
        with self._lock:
            self._held[job.stem] = work
        return work

    def _in_hand(self) -> list[Work]:
        with self._lock:
            return list(self._held.values())

    def _after_death(self, job: Job, last: Attempt) -> str:
        """The reason not to compute a shard now whose last attempt never ended; empty to compute
        it."""
        if not last.ended and self._weigh(job, last) >= self._config.max_attempts:
            self._put_off.add(job.stem)
            _touch(self._submission.failed(job.stem))
            self._report(failed=1)
            return "given up"
        if job.stem in self._alone:
            return ""
        self._put_off.add(job.stem)
        self._alone.add(job.stem)
        return "put off: it is tried last and alone"

    def _weigh(self, job: Job, last: Attempt) -> int:
        """Record an attempt that never ended; return the failed attempts at the shard by now.

        An attempt that ended when Slurm requeued its whole task is taken for its node's loss, the
        first time, and counts for nothing.
        """
        failures = job.failures
        if last.lost == 0 and self._is_requeued(last.task):
            log.warning("%s: attempt %d was lost with its node", job.stem, last.number)
            last = replace(last, lost=1)
        else:
            asked = self._asked_of(last.task)
            error = (
                f"the process that worked on {job.stem} never came to an end, nor did the one "
                f"that watches it: killed as a whole, or lost with {last.host or 'its node'}"
            )
            self._recorder.append(died(job.stem, last, asked, error))
            log.warning("%s: attempt %d never ended", job.stem, last.number)
            failures += asked == self._fingerprint
        self._attempts.end(job.stem, replace(last, died=True))
        return failures

    def _is_requeued(self, earlier: str) -> bool:
        """Whether Slurm has started the same task again since."""
        same = earlier.rpartition("-")[0] == str(self._name).rpartition("-")[0]
        return same and earlier != str(self._name)

    def _asked_of(self, task: str) -> str:
        """The fingerprint that a task was to make."""
        intent = self._run.submission(task.partition("-")[0]).intent
        try:
            return str(json.loads(intent.read_bytes())["fingerprint"])
        except (OSError, ValueError, LookupError, TypeError):
            return self._fingerprint

    def _why_not(self, job: Job, record: Record | None) -> str:
        """The reason not to compute a shard here; empty to compute it."""
        if record is not None and meets(record.fingerprint, self._fingerprint):
            self._put_back(record)
            self._attempts.done(job.stem)  # its task was killed before removing the attempt
            return f"already done by task {record.task}"
        if not self._is_as_planned(job, record):
            return "its outputs have changed since the submit; the next submit computes it"
        if self._submission.failed(job.stem).exists():
            return "failed in this submission already; the next one tries again"
        return ""

    def _is_as_planned(self, job: Job, record: Record | None) -> bool:
        """Whether the shard's pair is still the pair of the plan.

        An unreadable pair counts as planned: the shard fails, and its record says why.
        """
        if self._config.reprocess:
            return True
        if record is None and job.extends:
            return self._output.has(f"{job.stem}.parquet")
        if record is None or record.fingerprint == job.extends:
            return True
        return not job.extends and refits((r.reason for r in record.rejections), self._config)

    def _put_back(self, record: Record) -> None:
        """Write the record of a task that was killed right after renaming the parquet."""
        paths = {self._run.records / f"{record.task}.jsonl", self._recorder.path}
        known = chain.from_iterable(read_records(path) for path in paths if path.exists())
        if not any(r.shard == record.shard and r.finished == record.finished for r in known):
            self._recorder.append(Pair(self._output, record.shard).restored(record))

    @property
    def is_late(self) -> bool:
        """Whether the walltime left is too short for another shard like the slowest so far."""
        return self._deadline is not None and (_now() + MARGIN * self._slowest > self._deadline)

    def let_go(self, work: Work, seconds: float = 0.0) -> None:
        """Release a shard that is settled, or left to other tasks.

        Args:
            seconds: the time that the shard took.
        """
        with self._lock:
            self._slowest = max(self._slowest, seconds)
            self._held.pop(work.job.stem, None)
        work.release()

    def mark(self, work: Work, state: str) -> None:
        """Tell other tasks of a shard on record, so that they need not look."""
        stem = work.job.stem
        work.settle(state)
        if state == "failed":
            _touch(self._submission.failed(stem))
        elif work.job.extends:
            _touch(self._submission.extended / stem)

    def let_all_go(self) -> None:
        """Release every shard that is not settled."""
        for work in self._in_hand():
            work.release()

    def desert(self) -> None:
        """Leave every shard to other tasks, as attempts that never ended."""
        for work in self._in_hand():
            work.desert()


def _now() -> float:
    """Seconds on a clock that, like a walltime, goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _touch(path: Path) -> None:
    make_folder(path.parent)
    path.touch(FILE_MODE)
