"""Tell a task's progress to the run folder, to a listener, and to a watchdog."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from d2m_hpc.errors import D2MError
from d2m_hpc.run.tasks import Progress
from d2m_hpc.stopping import is_own_process
from d2m_hpc.storage.files import overwrite
from d2m_hpc.worker.death import STALLED

log = logging.getLogger(__name__)

EVERY_SECONDS = 2.0
ALIVE_SECONDS = 20.0
"""Nothing may change for minutes: nets are loaded, a batch is computed, a shard is copied."""


Listener = Callable[[Progress], None]


class Reporter:
    """Counts progress; threads may share it.

    As a context it shows, in a thread of its own, that the task lives while nothing changes. That
    is no progress for the watchdog.

    Args:
        path: rewritten every few seconds with the progress as JSON.
        listener: called at every change.
        beat: called at every change.
    """

    def __init__(
        self,
        progress: Progress,
        path: Path,
        listener: Listener | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.progress, self._beat = progress, beat
        self.beats = 0
        self._path, self._listener = path, listener
        self._written, self._failed = 0.0, False
        self._lock, self._over = threading.Lock(), threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._live, name="progress", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()  # without waiting for a file server that hangs

    def _live(self) -> None:
        while not self._over.wait(ALIVE_SECONDS):
            with self._lock:
                if not self._over.is_set():
                    self._tell()

    def __call__(self, state: str = "", shard: str = "", **more: float) -> None:
        """Set the state or the shard, and add to the counts."""
        with self._lock:
            progress = self.progress
            self.beats += 1
            self._beat()
            progress.state, progress.shard = state or progress.state, shard or progress.shard
            for name, value in more.items():
                setattr(progress, name, getattr(progress, name) + value)
            progress.updated = time.time()
            if state or shard or progress.updated - self._written > EVERY_SECONDS:
                self._tell()
            if self._listener:
                self._listener(progress)

    def _tell(self) -> None:
        """Write the progress file; a full disk ends no task for it."""
        self.progress.updated = self._written = time.time()
        try:
            overwrite(self._path, json.dumps(asdict(self.progress)).encode())
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written: %s", self._path, error)
            self._failed = True


class Watchdog:
    """Ends a process that was silent for long: a hung mount, a dead GPU.

    A Python caller's process is not ended: its main thread is interrupted, if the task works there.
    Time in which the process itself was suspended is no silence.

    Args:
        seconds: the longest silence.
        path: the log file, for the stacks of all threads.
        let_go: releases the process's shards.

    Raises:
        D2MError: the task was interrupted.
    """

    def __init__(
        self, report: Reporter, seconds: float, path: Path, let_go: Callable[[], None]
    ) -> None:
        self._report, self._seconds, self._path, self._let_go = report, seconds, path, let_go
        self._over, self._stalled = threading.Event(), threading.Event()
        self._is_main = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if self._stalled.is_set() and kind is KeyboardInterrupt:
            what = f"nothing happened for {self._seconds:g} s"
            raise D2MError(f"{what}; the stacks of all threads are in {self._path}")

    def _watch(self) -> None:
        step, silent, heard = min(self._seconds / 4, 10.0), 0.0, -1
        before = time.monotonic()
        while not self._over.wait(step):
            now = time.monotonic()
            silent += min(now - before, 2 * step)
            before = now
            if self._report.beats != heard:
                heard, silent = self._report.beats, 0.0
            elif silent > self._seconds:
                return self._end()

    def _end(self) -> None:
        log.error("nothing happened for %.0f s; all stacks follow; the task ends", self._seconds)
        with open(self._path, "a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        self._let_go()
        if is_own_process():
            os._exit(STALLED)
        self._stalled.set()
        if self._is_main:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
