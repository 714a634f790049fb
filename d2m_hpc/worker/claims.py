"""The shards that are a task's to do: its chunk's, then those that slower tasks have not begun."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from d2m_hpc.config import Config
from d2m_hpc.config.growth import refits
from d2m_hpc.errors import D2MError
from d2m_hpc.outputs import OutputDir
from d2m_hpc.state.attempts import Attempt, Attempts
from d2m_hpc.state.chunks import Chunks
from d2m_hpc.state.lease import Lease
from d2m_hpc.state.manifest import Record, Recorder, Shard, read_records
from d2m_hpc.state.rundir import FILE_MODE, RunDir, make_folder
from d2m_hpc.worker.held import Held
from d2m_hpc.worker.progress import Reporter
from d2m_hpc.worker.work import Work

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MARGIN = 1.2
"""A shard may take so much longer than the slowest one so far."""


@dataclass(frozen=True)
class TaskName:
    """Which array task this is; `attempt` counts its requeues."""

    submission: str
    index: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.submission}-{self.index}-{self.attempt}"


class Claims:
    """Iterate for the shards to do, each claimed at the last moment.

    Attributes:
        chunk: the task's own shards.
        base: of all its shards, others' too: the fingerprint of finished pairs that lack the same.

    Args:
        fingerprint: of the config; outputs of another one do not count as finished.
        clean: fences the attempts at a shard before a number; called while its lease is held.
        deadline: when the walltime ends, in seconds since the epoch.
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
    ) -> None:
        self._name = name
        self._attempts = Attempts(run.attempts)
        self._submission = run.submission(name.submission)
        chunks = Chunks(self._submission)
        if name.index >= len(chunks):
            raise D2MError(f"submission {name.submission} of {run.root} has no chunk {name.index}")
        [self.chunk] = chunks.read([name.index])
        self.base = self.chunk[0].base if self.chunk else ""
        self._chunks, self._index = chunks, name.index
        self._run, self._config, self._fingerprint = run, config, fingerprint
        self._output = OutputDir(config.output_metadata_dir)
        self._recorder = Recorder(run.record(name.submission, name.index, name.attempt))
        self._report, self._clean, self._deadline = report, clean, deadline
        self._slowest = 0.0
        self._held: dict[str, Work] = {}
        self._stopped = threading.Event()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        """Claim nothing more."""
        self._stopped.set()

    def __iter__(self) -> Iterator[Work]:
        """Shards of the chunk that are in other hands are come back to until they are settled."""
        waiting = [(shard, self._lease(shard)) for shard in self.chunk]
        while waiting:
            busy = []
            for shard, lease in waiting:
                if self.is_late or self._stopped.is_set():
                    return
                if not lease.claim():
                    busy.append((shard, lease))
                elif work := self._begin(shard, lease):
                    yield work
                else:
                    self._report(done=1)
            waiting = busy
            if waiting:
                self._report()
                self._stopped.wait(POLL_SECONDS)
        if self._config.steal:
            yield from self._steal()

    def _steal(self) -> Iterator[Work]:
        """Other tasks' shards, those first that they come to last."""
        finished = self._extended() if self.base else self._output.stems()
        for shard in self._others():
            if self.is_late or self._stopped.is_set():
                return
            if shard.stem in finished or not (lease := self._lease(shard)).claim():
                continue
            if work := self._begin(shard, lease):
                log.info("%s: taken from a slower task", shard.stem)
                self._report(shards=1)
                yield work

    def _others(self) -> Iterator[Shard]:
        """All others' shards of the base from the last to the first, of which one chunk is held."""
        numbers = (i for i in reversed(range(len(self._chunks))) if i != self._index)
        for chunk in self._chunks.read(numbers):
            yield from (shard for shard in reversed(chunk) if shard.base == self.base)

    def _extended(self) -> set[str]:
        """The stems that tasks of this submission have extended; all of them have a parquet."""
        folder = self._submission.extended
        return set(os.listdir(folder)) if folder.is_dir() else set()

    def _lease(self, shard: Shard) -> Lease:
        return Lease(self._run.lease(shard.stem), self._config.lease_seconds)

    def _begin(self, shard: Shard, lease: Lease) -> Work | None:
        """A shard that was just claimed, or None where there is nothing for this task to do."""
        try:
            last, record = self._attempts.last(shard.stem), self._output.record(shard.stem)
            known = max(shard.attempt, last.number if last else 0, record.attempt if record else 0)
            if self._clean(shard.stem, known + 1):  # now no earlier attempt changes what lies there
                record = self._output.record(shard.stem)
            why = self._why_not(shard, record)
        except BaseException:
            lease.release()
            raise
        if why:
            log.info("%s: %s", shard.stem, why)
            lease.release()
            return None
        attempt = Attempt(known + 1, str(self._name), self._report.progress.host)
        held = Held(lease, self._attempts, shard.stem, attempt, last)
        self._held[shard.stem] = work = Work(shard, lease, held)
        return work

    def _why_not(self, shard: Shard, record: Record | None) -> str:
        """Why a shard is not to be computed here; empty where it is."""
        if record is not None and record.fingerprint == self._fingerprint:
            self._put_back(record)
            return f"already done by task {record.task}"
        if not self._is_as_planned(shard, record):
            return "its outputs are not those of the submit any more; the next one sees to it"
        if self._submission.failed(shard.stem).exists():
            return "failed in this submission already; the next one tries again"
        return ""

    def _is_as_planned(self, shard: Shard, record: Record | None) -> bool:
        """Whether its pair is still the one to extend; if not, the next submit sees to it.

        One that cannot be read is taken all the same, so that it is found and recorded as damaged.
        """
        if self._config.reprocess:
            return True
        if record is None and shard.base:
            return self._output.has(f"{shard.stem}.parquet")
        if record is None or record.fingerprint == shard.base:
            return True
        return not shard.base and refits((r.reason for r in record.rejections), self._config)

    def _put_back(self, record: Record) -> None:
        """A task was killed between the parquet's rename and its record."""
        paths = {self._run.records / f"{record.task}.jsonl", self._recorder.path}
        known = chain.from_iterable(read_records(path) for path in paths if path.exists())
        if not any(r.shard == record.shard and r.finished == record.finished for r in known):
            self._recorder.append(self._output.restored(record))

    @property
    def is_late(self) -> bool:
        """Too little walltime is left for another shard like the slowest one so far."""
        return self._deadline is not None and (
            time.time() + MARGIN * self._slowest > self._deadline
        )

    def let_go(self, work: Work, seconds: float = 0.0) -> None:
        """The shard is settled, or left to others; it took so many seconds."""
        self._slowest = max(self._slowest, seconds)
        self._held.pop(work.shard.stem, None)
        work.release()

    def mark(self, work: Work, state: str) -> None:
        """The shard is on record; tell the other tasks what they need not look at."""
        stem = work.shard.stem
        if work.held is not None:
            work.held.settled(state)
        if state == "failed":
            _touch(self._submission.failed(stem))
        elif work.shard.base:
            _touch(self._submission.extended / stem)

    def let_all_go(self) -> None:
        """Give back what is not settled."""
        for work in list(self._held.values()):
            work.release()

    def desert(self) -> None:
        """Leave all to others; the attempts that were begun count as ones that never ended."""
        for work in list(self._held.values()):
            if work.held is not None:
                work.held.desert()


def _touch(path: Path) -> None:
    make_folder(path.parent)
    path.touch(FILE_MODE)
