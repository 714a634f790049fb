"""The shards that are a task's to do: its chunk's, then those that slower tasks have not begun."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from d2m_hpc.config import Config
from d2m_hpc.errors import D2MError
from d2m_hpc.run.attempts import Attempt, Attempts
from d2m_hpc.run.chunks import Chunks
from d2m_hpc.run.extension import refits
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Record, Recorder, Shard, read_records
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.storage.files import FILE_MODE, make_folder
from d2m_hpc.storage.lease import Lease
from d2m_hpc.storage.refused import require_there
from d2m_hpc.worker.board import Board
from d2m_hpc.worker.evidence import Evidence
from d2m_hpc.worker.held import Held
from d2m_hpc.worker.progress import Reporter
from d2m_hpc.worker.work import Work

log = logging.getLogger(__name__)

POLL_SECONDS, SETTLED_SECONDS = 1.0, 0.05
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
        board: tells the process that watches this one what is in hand.
        alone: stems that are tried last and one at a time, as one of them kills processes.
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
        self.base = self.chunk[0].base if self.chunk else ""
        self._chunks, self._index = chunks, name.index
        self._run, self._config, self._fingerprint = run, config, fingerprint
        self._output = OutputDir(config.output_metadata_dir)
        self._recorder = Recorder(run.record(name.submission, name.index, name.attempt))
        self._report, self._clean, self._board = report, clean, board or Board()
        # Slurm tells a time of day. From here on it is a time that no clock's correction changes.
        self._deadline = None if deadline is None else _now() + deadline - time.time()
        self._evidence = Evidence(run, str(name), fingerprint, self._recorder)
        self._alone, self._put_off = set(alone), set[str]()
        self._slowest = 0.0
        self._held: dict[str, Work] = {}
        self._stopped = threading.Event()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        """Claim nothing more."""
        self._stopped.set()

    def __iter__(self) -> Iterator[Work]:
        """Yield the chunk's shards, last and one at a time those at which a process died; then what
        others have not begun."""
        self._alone |= {shard.stem for shard in self.chunk if shard.alone}
        yield from self._own([s for s in self.chunk if s.stem not in self._alone])
        for shard in [s for s in self.chunk if s.stem in self._alone]:
            self._wait_for_settled()
            yield from self._own([shard])
            self._wait_for_settled()
        if self._config.steal:
            yield from self._steal()

    def _wait_for_settled(self) -> None:
        """Until nothing is in hand but results that wait for all others to be written."""
        while any(w.held is not None and not w.held.rests for w in list(self._held.values())):
            if self._stopped.wait(SETTLED_SECONDS):
                return

    def _own(self, shards: Iterable[Shard]) -> Iterator[Work]:
        """Those that are in other hands are come back to until they are settled."""
        waiting = [(shard, self._lease(shard)) for shard in shards]
        while waiting:
            busy = []
            for shard, lease in waiting:
                if self.is_late or self._stopped.is_set():
                    return
                if not lease.claim():
                    busy.append((shard, lease))
                elif work := self._begin(shard, lease):
                    yield work
                elif shard.stem not in self._put_off:
                    self._report(done=1)
            waiting = busy
            if waiting:
                self._report()
                self._stopped.wait(POLL_SECONDS)

    def _steal(self) -> Iterator[Work]:
        """Other tasks' shards, those first that they come to last."""
        finished = self._extended() if self.base else self._output.stems()
        for shard in self._others():
            if self.is_late or self._stopped.is_set():
                return
            if shard.alone or (shard.stem in finished and not shard.again):
                continue
            if not (lease := self._lease(shard)).claim():
                continue
            if work := self._begin(shard, lease, own=False):
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

    def _begin(self, shard: Shard, lease: Lease, own: bool = True) -> Work | None:
        """A shard that was just claimed, or None where there is nothing for this task to do."""
        try:
            require_there(self._run.leases)
            pair = Pair(self._output, shard.stem)
            last, record = self._attempts.last(shard.stem), pair.record()
            known = max(shard.attempt, last.number if last else 0, record.attempt if record else 0)
            if self._clean(shard.stem, known + 1):  # now no earlier attempt changes what lies there
                record = pair.record()
            why = self._why_not(shard, None if shard.outlives(record) else record)
            if not why and last and (last.died or not last.ended):
                why = self._after_death(shard, last) if own else "a process may have died of it"
        except BaseException:
            lease.release()
            raise
        if why:
            log.info("%s: %s", shard.stem, why)
            lease.release()
            return None
        before = last or Attempt(0)
        host = self._report.progress.host
        attempt = Attempt(known + 1, str(self._name), host, died=before.died, lost=before.lost)
        held = Held(lease, self._attempts, shard.stem, attempt, last, self._board)
        self._held[shard.stem] = work = Work(shard, lease, held)
        return work

    def _after_death(self, shard: Shard, last: Attempt) -> str:
        """Why a shard whose last attempt never ended is not computed now; empty where it is."""
        if not last.ended and self._evidence.weigh(shard, last) >= self._config.max_attempts:
            self._put_off.add(shard.stem)
            _touch(self._submission.failed(shard.stem))
            self._report(failed=1)
            return "given up"
        if shard.stem in self._alone:
            return ""
        self._put_off.add(shard.stem)
        self._alone.add(shard.stem)
        return "put off: it is tried last and alone"

    def _why_not(self, shard: Shard, record: Record | None) -> str:
        """Why a shard is not to be computed here; empty where it is."""
        if record is not None and record.fingerprint == self._fingerprint:
            self._put_back(record)
            self._attempts.done(shard.stem)  # its task was killed before it removed that
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
            self._recorder.append(Pair(self._output, record.shard).restored(record))

    @property
    def is_late(self) -> bool:
        """Too little walltime is left for another shard like the slowest one so far."""
        return self._deadline is not None and (_now() + MARGIN * self._slowest > self._deadline)

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


def _now() -> float:
    """Seconds that also pass while the machine is suspended, as a walltime does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _touch(path: Path) -> None:
    make_folder(path.parent)
    path.touch(FILE_MODE)
