"""Read shards into batches with decode threads, ahead of the device.

One thread claims shards and copies them to the node; another reads their tars and hands samples to
a pool of decode threads. Batches wait in a bounded queue, also those of the next shard.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from queue import Empty, Queue
from threading import Event, Semaphore

import torch

from d2m_hpc.errors import ShardError
from d2m_hpc.models.blocks import Reused
from d2m_hpc.models.inputs import told
from d2m_hpc.run.records import Rejection
from d2m_hpc.worker.batch import Batch, collate, plain
from d2m_hpc.worker.gate import Gate
from d2m_hpc.worker.read import refusal
from d2m_hpc.worker.read.beside import of_shard, versions
from d2m_hpc.worker.read.members import Notes
from d2m_hpc.worker.read.prefetch import Coming, Stager, received
from d2m_hpc.worker.read.prepare import IN_FLIGHT, WHOLE, Ready, Recipe, prepare
from d2m_hpc.worker.read.reader import Reader, Sample, Samples, Version
from d2m_hpc.worker.read.scratch import Scratch
from d2m_hpc.worker.read.seen import Seen
from d2m_hpc.worker.rows import Tray, taken_out
from d2m_hpc.worker.work import Clock, Work

AHEAD = 4
"""Batches that may wait for the device."""
GROUP = 8
"""Samples that a decode thread takes at a time: few enough to share evenly, enough to make handing
over cheap."""
FIRST = 64
"""Rows that memory is made for as long as no batch has shown to be larger: shards may have far
fewer samples than a batch may."""
BATCH_BYTES = 512 << 20
"""A batch of whole pictures, for custom models, ends early at so many bytes."""
POLL_SECONDS = 0.1
"""Seconds between a reader's looks, while its queue is full, whether its batches are still
wanted."""
STOP_SECONDS = 10.0
"""Seconds that closing waits for a reader that hangs in a download or a claim."""


@dataclass
class Findings:
    """A reader's findings in a tar besides batches, handed over at the end.

    Attributes:
        total: samples in the tar.
        notices: remarks on the whole tar, such as members that are no samples, or a cut.
        causes: reasons why samples lack members, with advice.
        seen: the fields of the samples.
        tar: the file that was read.
        texts: as `Record` has them.
    """

    rejections: list[Rejection] = field(default_factory=list)
    total: int = 0
    notices: list[str] = field(default_factory=list)
    causes: Notes = field(default_factory=Notes)
    seen: Seen = field(default_factory=Seen)
    tar: Version = field(default_factory=Version)
    texts: dict[str, list[int]] = field(default_factory=dict)


class Reading:
    """A shard that is being read: a queue from the reader to the thread that computes.

    Attributes:
        found: set once the iteration has ended.

    Args:
        slots: bounds the waiting batches of all shards of a loader.
        stopped: set when the loader closes.
    """

    def __init__(self, work: Work, slots: Semaphore, stopped: Event) -> None:
        self.work, self.found = work, Findings()
        self._slots, self._stopped, self._cancelled = slots, stopped, Event()
        self._queue: Queue[Future[Batch] | Findings | BaseException] = Queue()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set() or self._stopped.is_set()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; raise the error that stopped the reader."""
        while (batch := self._next()) is not None:
            yield batch

    def _next(self) -> Batch | None:
        with self.work.clock("wait"):
            item = self._queue.get()
            self._slots.release()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, Future):
                return item.result()
            self.found = item
            return None

    def poll(self) -> Batch | None:
        """Take the next batch, if it is ready at this moment."""
        with suppress(IndexError):  # the queue is empty
            item = self._queue.queue[0]
            if isinstance(item, Future) and item.done() and not item.exception():
                return self._next()
        return None

    def put(self, item: Future[Batch] | Findings | BaseException) -> None:
        """Hand over a batch, the findings or an error; drop it once cancelled."""
        while not self._slots.acquire(timeout=POLL_SECONDS):
            if self.is_cancelled:
                return
        self._queue.put(item)
        if self._cancelled.is_set():
            self.cancel()

    def cancel(self) -> None:
        """Drop the waiting batches and stop the reader."""
        self._cancelled.set()
        while True:
            try:
                self._queue.get_nowait()
            except Empty:
                return
            self._slots.release()


class Loader:
    """Iterate over shards that are read ahead.

    Args:
        works: the shards to read; advanced in an own thread, so that each is claimed at the last
            moment.
        scratch: keeps copies of remote tars on this node.
        device: a GPU, for which batches lie in page-locked memory; None without one.
        look: called for each tar, with its URL, before its samples are decoded; an error of it is
            raised by the shard's `Reading`.
        gate: samples are decoded while it is open.
    """

    def __init__(
        self,
        works: Iterable[Work],
        recipe: Recipe,
        scratch: Scratch,
        device: torch.device | None = None,
        look: Callable[[Reader, str], None] = lambda archive, url: None,
        gate: Gate | None = None,
    ) -> None:
        self._look, self._gate = look, gate or Gate()
        self._stager = Stager(iter(works), scratch)
        self._recipe = recipe
        self._allocate = Reused(recipe.batch_size, device)
        self._next: Queue[Reading | BaseException | None] = Queue(1)
        self._stopped, self._slots = Event(), Semaphore(AHEAD)
        self._groups, self._most = 1, FIRST
        self._collect = ThreadPoolExecutor(1, "collect")
        # One thread of torch in each decode thread, as there is one for each core.
        self._pool = ThreadPoolExecutor(
            recipe.threads, "decode", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._reader = threading.Thread(target=self._read_all, name="reader", daemon=True)

    def __enter__(self) -> Loader:
        try:
            self._stager.thread.start()
            self._reader.start()
        except BaseException:  # an interrupt, perhaps after a claim
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading, without waiting long for a reader that hangs."""
        self._stopped.set()
        deadline = time.monotonic() + STOP_SECONDS
        threads = (self._reader, self._stager.thread)
        while (alive := [t for t in threads if t.is_alive()]) and time.monotonic() < deadline:
            self._drain()
            alive[0].join(timeout=0.05)
        self._drain()
        for pool in (self._pool, self._collect):
            pool.shutdown(wait=not self._reader.is_alive(), cancel_futures=True)

    def _drain(self) -> None:
        """Release shards that will not be computed."""
        self._stager.stop()
        while True:
            try:
                reading = self._next.get_nowait()
            except Empty:
                return
            if isinstance(reading, Reading):
                reading.cancel()
                reading.work.release()

    def __iter__(self) -> Iterator[Reading]:
        yield from received(self._next)

    def poll(self) -> tuple[Clock, Batch] | None:
        """Take the first batch of the shard that comes next, if it is ready at this moment.

        The shard comes with its other batches. An error is left to it.
        """
        with suppress(IndexError):  # none comes
            reading = self._next.queue[0]
            if isinstance(reading, Reading) and (batch := reading.poll()) is not None:
                return reading.work.clock, batch
        return None

    def _read_all(self) -> None:
        end: BaseException | None = None
        try:
            for coming in self._stager:
                if self._stopped.is_set():
                    coming.abandon()
                    return
                reading = Reading(coming.work, self._slots, self._stopped)
                self._next.put(reading)
                self._read(reading, coming)
        except BaseException as error:
            end = error
        self._next.put(end)

    def _read(self, reading: Reading, coming: Coming) -> None:
        url, found = reading.work.shard.url, Findings()
        try:
            with ExitStack() as stack:
                staged = stack.enter_context(coming.arrived())
                reading.work.read()
                opened = self._recipe.open(url, staged.path, staged.damage)
                archive = stack.enter_context(closing(opened))
                archive.beside = of_shard(self._recipe.texts, reading.work.shard.stem)
                found.tar = staged.origin if staged.copied else archive.version
                found.texts = {**archive.texts, **versions(archive.beside)}
                if archive.is_doubtful:
                    whole = archive.index()
                    deque(whole, maxlen=0)
                    self._require_whole(url, whole, archive.damage or whole.cut)
                self._look(archive, url)
                index = archive.index(self._recipe.needed)
                self._emit(reading, found, index, archive)
                if cut := archive.damage or index.cut:
                    self._require_whole(url, index, cut)
                    found.notices.append(refusal.taken(cut, index.count))
                found.total = index.count + len(index.strays)
                found.notices += index.ledger.notes.texts()
                found.causes = index.ledger.causes
                self._reject(url, found, index.strays)
            reading.put(found)
        except BaseException as error:
            reading.put(error)

    def _emit(self, reading: Reading, found: Findings, index: Samples, archive: Reader) -> None:
        ready: list[Ready] = []
        bulk = 0
        for result in self._prepared(reading, found.seen, index, archive, ready):
            if isinstance(result, Rejection):
                self._reject(reading.work.shard.url, found, [result])
                continue
            ready.append(result)
            bulk += result.bulk
            if len(ready) == self._recipe.batch_size or bulk >= BATCH_BYTES:
                self._put(reading, ready)
                bulk = 0
        if ready:
            self._put(reading, ready)

    def _put(self, reading: Reading, ready: list[Ready]) -> None:
        """Hand over a batch of the samples, which are none any more then."""
        self._most = max(self._most, len(ready))
        reading.put(self._collect.submit(self._batch, ready.copy()))
        ready.clear()

    def _require_whole(self, url: str, index: Samples, cut: str) -> None:
        if cut and not (index.count and self._recipe.allow_truncated):
            raise refusal.truncated(url, cut, index.count)

    def _reject(self, url: str, found: Findings, rejections: Sequence[Rejection]) -> None:
        found.rejections.extend(rejections)
        if rejections and self._recipe.strict:
            raise refusal.rejected(url, rejections[0])

    def _prepared(
        self,
        reading: Reading,
        seen: Seen,
        samples: Iterable[Sample],
        archive: Reader,
        ready: Sequence[Ready],
    ) -> Iterator[Ready | Rejection]:
        """Yield prepared samples in the tar's order, with a bounded number in the pool.

        Args:
            ready: those that are in no batch yet.
        """
        waiting = deque[tuple[Tray, int, Future[list[Ready | Rejection]]]]()
        samples, tray, row = iter(samples), self._tray(0), 0
        try:
            while not reading.is_cancelled:
                if row == tray.rows:
                    self._free_trays(ready, {tray for tray, _, _ in waiting})
                    tray, row = self._tray(len(ready) + sum(size for _, size, _ in waiting)), 0
                if not (group := list(islice(samples, min(GROUP, tray.rows - row)))):
                    break
                making = partial(self._prepare, reading.work.clock, seen, archive, tray, row)
                waiting.append((tray, len(group), self._pool.submit(making, group)))
                row += len(group)
                while len(waiting) > self._groups:
                    yield from self._weighed(waiting.popleft()[2].result())
            while waiting and not reading.is_cancelled:
                yield from self._weighed(waiting.popleft()[2].result())
        finally:
            # No thread may read the archive any more, as it is closed next.
            futures = [future for _, _, future in waiting]
            for future in futures:
                future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.exception()

    def _tray(self, begun: int) -> Tray:
        """Rows up to the end of a batch, unless samples before it are rejected.

        Args:
            begun: samples that come before, and are in no batch yet.
        """
        left = self._recipe.batch_size - begun % self._recipe.batch_size
        # The few that take the place of rejected ones need no batch's memory: they are copied.
        allocate = self._allocate if 2 * left > self._rows else plain
        return Tray(min(left, self._most), allocate, WHOLE)

    def _free_trays(self, ready: Sequence[Ready], used: Collection[Tray]) -> None:
        """Copy samples out of trays of which rejections left less than half a batch.

        Each tray takes a batch's memory: a batch of few samples from each of many would hold as
        many times its own.

        Args:
            used: trays with samples to come.
        """
        kept = Counter(sample.tray for sample in ready)
        for sample in ready:
            if sample.tray not in used and 2 * kept[sample.tray] < self._rows:
                sample.inputs = {n: taken_out(v, copy=True) for n, v in sample.inputs.items()}
                sample.tray = None

    @property
    def _rows(self) -> int:
        """Rows of a batch, as far as one has been seen."""
        return min(self._recipe.batch_size, self._most)

    def _weighed(self, results: list[Ready | Rejection]) -> list[Ready | Rejection]:
        """Fit the number of groups in the pool to their size: whole pictures take gigabytes."""
        bulk = sum(result.bulk for result in results if isinstance(result, Ready))
        most = max(1, IN_FLIGHT // bulk) if bulk else 2 * self._recipe.threads
        self._groups = min(2 * self._groups, most, 2 * self._recipe.threads)
        return results

    def _prepare(
        self,
        clock: Clock,
        seen: Seen,
        archive: Reader,
        tray: Tray,
        row: int,
        samples: Sequence[Sample],
    ) -> list[Ready | Rejection]:
        made = []
        with clock("decode"):
            for place, sample in enumerate(samples, row):
                self._gate.wait()
                result = prepare(sample, archive, self._recipe, seen)
                if isinstance(result, Ready):
                    inputs = result.inputs.items()
                    result.inputs = {name: tray.put(place, name, v) for name, v in inputs}
                    result.tray = tray
                made.append(result)
        return made

    def _batch(self, ready: Sequence[Ready]) -> Batch:
        inputs = {}
        for wanted in self._recipe.inputs:
            try:
                inputs[wanted] = collate([r.inputs[wanted] for r in ready], self._allocate)
            except ValueError as error:
                raise ShardError(f"preprocessor {told(wanted[1])}: {error}") from None
        columns = zip(*(r.fields for r in ready), strict=True)
        fields = dict(zip(self._recipe.fields, map(list, columns), strict=True))
        return Batch([r.key for r in ready], inputs, fields)
