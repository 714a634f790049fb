"""Commit and record shards in a thread, while the next ones are computed.

Results whose values do not tell the type of a field or column are written last: later results
may tell that type.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Queue

from d2m_hpc.errors import D2MError, DiskError, NodeError, ShardError
from d2m_hpc.run.records import Job, Record, Recorder
from d2m_hpc.storage.refused import require_there
from d2m_hpc.storage.texts import traceback_of
from d2m_hpc.worker.claims import Claims
from d2m_hpc.worker.progress import Reporter
from d2m_hpc.worker.work import Work
from d2m_hpc.worker.write.extend import Rows
from d2m_hpc.worker.write.writer import Committer, TakenOver

log = logging.getLogger(__name__)

ROWS = 10_000
"""Rows of waiting results, which are in memory."""


@dataclass
class Result:
    """A computed shard, or the error that stopped its computation.

    Attributes:
        began: the start of the computation, by `time.monotonic`.
    """

    work: Work
    record: Record
    rows: Rows
    error: BaseException | None = None
    began: float = field(default_factory=time.monotonic)


class Settler:
    """Settles results in order, in the one thread that writes outputs and records."""

    def __init__(
        self, committer: Committer, recorder: Recorder, claims: Claims, report: Reporter
    ) -> None:
        self._committer, self._recorder = committer, recorder
        self._claims, self._report = claims, report
        self._queue: Queue[Result | None] = Queue(1)
        self._end: Future[None] = Future()
        self._thread = threading.Thread(target=self._loop, name="writer", daemon=True)

    def __enter__(self) -> Settler:
        self._thread.start()
        return self

    def put(self, result: Result) -> None:
        """Hand over a result; raise the error that stopped the thread, as a task needs its
        records."""
        if self._end.done():
            self._end.result()
        self._queue.put(result)

    def __exit__(self, *_: object) -> None:
        """Settle all results so far, even where the task is being stopped."""
        self._queue.put(None)
        self._thread.join()
        self._committer.close()
        self._end.result()

    def _loop(self) -> None:
        try:
            while (result := self._queue.get()) is not None:
                self._settle(result)
            self._end.set_result(None)
        except BaseException as error:
            self._end.set_exception(error)
            while self._queue.get() is not None:
                pass  # `put` may be waiting for room

    def _settle(self, result: Result) -> None:
        record = result.record
        seconds = time.monotonic() - result.began
        record.finished = record.started + seconds  # the clock may have been set meanwhile
        try:
            if result.work.is_lost:
                raise TakenOver
            if result.error is not None:
                raise result.error
            with result.work.clock("write"):
                self._committer.commit(result.rows, record, lambda: not result.work.is_lost)
        except TakenOver:
            log.warning("%s: another task took it over; nothing is written", record.shard)
            require_there(self._recorder.path.parent)
            self._claims.let_go(result.work)
            return
        except (DiskError, NodeError):  # not the shard's fault
            raise
        except Exception as error:
            _fail(record, error)
        record.seconds = result.work.clock.rounded()
        self._recorder.append(record)
        self._claims.mark(result.work, record.state)
        self._claims.let_go(result.work, seconds)
        self._tell(record)

    def _tell(self, record: Record) -> None:
        if record.state == "failed":
            log.error("%s failed: %s", record.shard, record.error)
            self._report(failed=1)
        else:
            log.info("%s: %d rows, %d rejected", record.shard, record.rows, len(record.rejections))
            self._report(done=1, rejected=len(record.rejections))


def _fail(record: Record, error: BaseException) -> None:
    record.state, record.kind, record.error = "failed", type(error).__name__, str(error)
    record.rows = 0
    cause = error.__cause__ or error
    if not isinstance(cause, D2MError):
        record.traceback = traceback_of(error)


def last_if_undecided(
    results: Iterable[Result], chunk: Sequence[Job], look_elsewhere: Callable[[], None]
) -> Iterator[Result]:
    """Yield results in order, but last those with a type that the run does not know yet.

    Args:
        chunk: the task's jobs. Other chunks' shards do not wait: two tasks that stole from each
            other would wait for each other.
        look_elsewhere: finds the types of columns and features in other shards of the run.
    """
    own = {job.stem for job in chunk}
    waiting: list[Result] = []
    left = ROWS
    for result in results:
        if _undecided(result):
            if result.work.shard.stem in own and result.rows.rows <= left:
                left -= result.rows.rows
                waiting.append(result)
                result.work.rest()
                continue
            look_elsewhere()
        yield result
    for result in waiting:
        result.work.resume()
        if _undecided(result):
            look_elsewhere()
        result.record.notices += [
            f"{name!r} has no value that tells its type, neither here nor in the shards so far"
            for name in _undecided(result)
        ]
        yield result


def _undecided(result: Result) -> list[str]:
    """Names of unknown type; an output that cannot be written fails its shard here already."""
    try:
        return [] if result.error else result.rows.undecided
    except ShardError as error:
        result.error = error
        return []
