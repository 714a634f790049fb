"""Shards to batches, in decode threads, ahead of the device.

One thread claims shards and brings them here; another walks through their tars and hands the
samples to the pool. Whatever of the next shard is ready waits in a bounded queue while this one is
computed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import islice
from queue import Empty, Queue
from threading import Semaphore

import torch

from d2m_hpc.errors import ShardError
from d2m_hpc.run.manifest import Rejection
from d2m_hpc.worker.batch import Batch, collate
from d2m_hpc.worker.read import refusal
from d2m_hpc.worker.read.memory import Allocate, Reused, pinned
from d2m_hpc.worker.read.prefetch import Coming, Stager, received
from d2m_hpc.worker.read.prepare import Ready, Recipe, prepare
from d2m_hpc.worker.read.scratch import Scratch
from d2m_hpc.worker.read.shard import Archive, Index, Sample
from d2m_hpc.worker.work import AHEAD, Work

GROUP = 8
"""Samples that a decode thread takes at a time: few enough to share them out evenly, and enough to
make little of what handing them over costs."""
STOP_SECONDS = 10.0
"""How long closing waits for the reader, which may hang in a download or a claim."""


class Loader:
    """Reads shards ahead of whoever iterates.

    Args:
        works: the shards to read; it is advanced in a thread of its own, so that it may claim each
            at the last moment.
        scratch: room on this node for copies of remote tars.
        pin: batches are for a GPU, and lie in page-locked memory.
    """

    def __init__(
        self, works: Iterable[Work], recipe: Recipe, scratch: Scratch, pin: bool = False
    ) -> None:
        self._stager = Stager(iter(works), scratch)
        self._recipe = recipe
        self._allocate: Allocate = pinned if pin else Reused(recipe.batch_size)
        self._next: Queue[Work | BaseException | None] = Queue(1)
        self._current: Work | None = None
        self._stopped = False
        self._room = Semaphore(AHEAD)
        # One thread of torch in each decode thread: they already are as many as the cores.
        self._pool = ThreadPoolExecutor(
            recipe.threads, "decode", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._reader = threading.Thread(target=self._read_all, name="reader", daemon=True)

    def __enter__(self) -> Loader:
        try:
            self._stager.thread.start()
            self._reader.start()
        except BaseException:  # an interrupt: a shard may have been claimed already
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading; a reader that hangs is left to itself and does nothing more."""
        self._stopped = True
        deadline = time.monotonic() + STOP_SECONDS
        threads = (self._reader, self._stager.thread)
        while (alive := [t for t in threads if t.is_alive()]) and time.monotonic() < deadline:
            if self._current is not None:
                self._current.cancel()
            self._drain()
            alive[0].join(timeout=0.05)
        self._drain()
        self._pool.shutdown(wait=not self._reader.is_alive(), cancel_futures=True)

    def _drain(self) -> None:
        """Drop shards that nobody will compute, and their claims."""
        self._stager.stop()
        while True:
            try:
                work = self._next.get_nowait()
            except Empty:
                return
            if isinstance(work, Work):
                work.cancel()
                work.release()

    def __iter__(self) -> Iterator[Work]:
        yield from received(self._next)

    def _read_all(self) -> None:
        end: BaseException | None = None
        try:
            for coming in self._stager:
                if self._stopped:
                    coming.abandon()
                    return
                self._current = coming.work
                coming.work.room = self._room
                self._next.put(coming.work)
                self._read(coming.work, coming)
        except BaseException as error:
            end = error
        self._next.put(end)

    def _read(self, work: Work, coming: Coming[Work]) -> None:
        try:
            with ExitStack() as stack:
                staged = stack.enter_context(coming.arrived())
                work.begin()
                archive = stack.enter_context(closing(Archive(staged.path)))
                if not staged.damage and (what := archive.nature()):
                    raise refusal.no_tar(work.shard.url, what)
                if staged.damage or not archive.ends_in_zeros():
                    self._refuse_cut(work, archive, staged.damage)
                index = archive.index(self._recipe.raw_inputs)
                self._emit(work, index, archive)
                self._end(work, index, staged.damage or index.cut)
            work.put(None)
        except BaseException as error:
            work.put(error)

    def _emit(self, work: Work, index: Index, archive: Archive) -> None:
        ready: list[Ready] = []
        for result in self._prepared(work, index, archive):
            if isinstance(result, Rejection):
                self._reject(work, [result])
                continue
            ready.append(result)
            if len(ready) == self._recipe.batch_size:
                work.put(self._pool.submit(self._batch, ready))
                ready = []
        if ready:
            work.put(self._pool.submit(self._batch, ready))

    def _refuse_cut(self, work: Work, archive: Archive, damage: str) -> None:
        """Before anything is computed of a tar that must be cut somewhere."""
        index = archive.index()
        deque(index, maxlen=0)
        self._require_whole(work, index, damage or index.cut)

    def _end(self, work: Work, index: Index, cut: str) -> None:
        """What is known of a tar once its last header has been read."""
        self._require_whole(work, index, cut)
        work.total = index.count + len(index.strays)
        work.notices, work.causes = index.ledger.notes.texts(), index.ledger.causes
        self._reject(work, index.strays)

    def _require_whole(self, work: Work, index: Index, cut: str) -> None:
        if cut and not (index.count and self._recipe.allow_truncated):
            raise refusal.truncated(work.shard.url, cut, index.count)

    def _reject(self, work: Work, rejections: Sequence[Rejection]) -> None:
        work.rejections.extend(rejections)
        if rejections and self._recipe.strict:
            raise refusal.rejected(work.shard.url, rejections[0])

    def _prepared(
        self, work: Work, samples: Iterable[Sample], archive: Archive
    ) -> Iterator[Ready | Rejection]:
        """Prepared samples in the tar's order, a bounded number of them in the pool."""
        waiting: deque[Future[list[Ready | Rejection]]] = deque()
        samples = iter(samples)
        try:
            while not work.cancelled and (group := list(islice(samples, GROUP))):
                waiting.append(self._pool.submit(self._prepare, work, group, archive))
                if len(waiting) > 2 * self._recipe.threads:
                    yield from waiting.popleft().result()
            while waiting and not work.cancelled:
                yield from waiting.popleft().result()
        finally:
            # The archive is closed next: nobody may be reading it still.
            for future in waiting:
                future.cancel()
            for future in waiting:
                if not future.cancelled():
                    future.exception()

    def _prepare(
        self, work: Work, samples: Sequence[Sample], archive: Archive
    ) -> list[Ready | Rejection]:
        with work.clock("decode"):
            return [prepare(sample, archive, self._recipe, work.seen) for sample in samples]

    def _batch(self, ready: Sequence[Ready]) -> Batch:
        inputs = {}
        for wanted in self._recipe.inputs:
            try:
                inputs[wanted] = collate([r.inputs[wanted] for r in ready], self._allocate)
            except ValueError as error:
                raise ShardError(f"preprocessor {wanted[1]!r}: {error}") from None
        columns = zip(*(r.fields for r in ready), strict=True)
        fields = dict(zip(self._recipe.fields, map(list, columns), strict=True))
        return Batch([r.key for r in ready], inputs, fields)
