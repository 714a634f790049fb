"""Bring shards to this node one ahead: the next is copied while the current one is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from queue import Empty, Queue
from typing import TypeVar

from d2m_hpc.worker.read.scratch import Scratch
from d2m_hpc.worker.read.stage import Staged, stage
from d2m_hpc.worker.work import Work

T = TypeVar("T")


def received(queue: Queue[T | BaseException | None]) -> Iterator[T]:
    """Yield another thread's items until None; raise an item that is an error."""
    while (item := queue.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


class Coming:
    """A shard on its way to this node.

    Attributes:
        work: the claimed shard.
        begun, ended: reading has started; has finished.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.begun, self.ended = threading.Event(), threading.Event()
        self._arrival: Future[Staged] = Future()
        self._stack = ExitStack()

    def bring(self, scratch: Scratch) -> bool:
        """Put the attempt on record and copy the shard; errors are raised by `arrived`.

        Returns:
            Whether a copy was made.
        """
        try:
            self.work.begin()
            with self.work.clock("stage"):
                staged = self._stack.enter_context(stage(self.work.shard, scratch))
        except BaseException as error:
            self.work.wait()
            self._arrival.set_exception(error)
            return False
        self.work.wait()
        self._arrival.set_result(staged)
        return staged.copied

    @contextmanager
    def arrived(self) -> Iterator[Staged]:
        """Wait for the shard, or raise the error of its fetch; its copy is gone when the block
        ends."""
        try:
            staged = self._arrival.result()
            self.begun.set()
            yield staged
        finally:
            self.drop()

    def drop(self) -> None:
        """End the reading of the shard, or its hope to be read."""
        self.begun.set()
        self.ended.set()
        if self._arrival.done():
            self._stack.close()

    def abandon(self) -> None:
        """Leave the shard to others."""
        self.work.release()
        self.drop()


class Stager:
    """Iterate over shards as they are claimed; each may still be on its way.

    A shard that needs a copy is claimed when the reading of the one before has started, any other
    shard when that has finished: other tasks can take shards that would only wait here.

    Args:
        works: advanced in `thread`, which the reader starts.
    """

    def __init__(self, works: Iterator[Work], scratch: Scratch) -> None:
        self._works, self._scratch = works, scratch
        self._queue: Queue[Coming | BaseException | None] = Queue()
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="stager", daemon=True)

    def __iter__(self) -> Iterator[Coming]:
        """Yield the shards; raise the error that stopped the claims."""
        yield from received(self._queue)

    def stop(self) -> None:
        """Release shards that were not taken, without waiting for a copy that hangs."""
        self._stopped.set()
        while True:
            try:
                coming = self._queue.get_nowait()
            except Empty:
                return
            if isinstance(coming, Coming):
                coming.abandon()
            else:
                self._queue.put(coming)
                return

    def _run(self) -> None:
        end: BaseException | None = None
        try:
            for work in self._works:
                coming = Coming(work)
                self._queue.put(coming)
                if self._stopped.is_set():
                    coming.abandon()
                    break
                copied = coming.bring(self._scratch)
                if coming.ended.is_set():
                    coming.drop()
                (coming.begun if copied else coming.ended).wait()
                if self._stopped.is_set():
                    break
        except BaseException as error:
            end = error
        self._queue.put(end)
