"""Describe how a process died, and record its attempts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from resource import struct_rusage

from d2m_hpc.run.attempts import Attempt, Attempts
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import Recorder, died
from d2m_hpc.storage.files import make_folder
from d2m_hpc.storage.lease import Lease
from d2m_hpc.worker.board import Board, Entry, Scene

CGROUPS = Path("/sys/fs/cgroup")
STALLED = 5
"""The exit code of a task that its own watchdog ended."""
GB = 1e9
PATIENCE = 10.0
"""Seconds for taking over a dead process's leases."""


def told(status: int, usage: struct_rusage, oom_kills: int, stalled: float) -> str:
    """Describe how a process ended.

    Args:
        status: from `os.wait4`.
        oom_kills: the system's kills for memory since the process began.
        stalled: the silent seconds after which the process was ended; 0 for any other end.
    """
    if stalled:
        return f"stalled: nothing happened for {stalled:.0f} s"
    if not os.WIFSIGNALED(status):
        return f"was ended with exit code {os.waitstatus_to_exitcode(status)} by the code it ran"
    name = signal.Signals(os.WTERMSIG(status)).name
    if name != "SIGKILL":
        return f"was killed by {name}"
    limit = memory_limit()
    of = f" of {limit / GB:.1f} GB" if limit else ""
    peak = f"{usage.ru_maxrss * 1024 / GB:.1f} GB{of}"
    if oom_kills:
        return f"was killed by SIGKILL, out of memory: it took {peak}"
    return f"was killed by SIGKILL, as where memory runs out: it took {peak}"


def oom_kills() -> int:
    """The system's kills for memory in this cgroup; 0 where the system does not say."""
    return sum(_figure(folder, ("memory.events", "memory.oom_control")) for folder in cgroups())


def memory_limit() -> int:
    """The least memory limit of this process's cgroups in bytes; 0 for none."""
    limits = [
        int(text)
        for folder in cgroups()
        for name in ("memory.max", "memory.limit_in_bytes")
        if (text := _text(folder / name).strip()).isdigit()
    ]
    return min((limit for limit in limits if limit < 1 << 60), default=0)


def cgroups() -> Iterator[Path]:
    """The folders of this process's cgroup (in version 1, of memory) and of its parents."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        folder = CGROUPS / ("memory" if kinds else "") / path.lstrip("/")
        yield folder
        yield from (f for f in folder.parents if CGROUPS in f.parents)


def _figure(folder: Path, names: tuple[str, ...]) -> int:
    for name in names:
        for line in _text(folder / name).splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


def record(board: Board, how: str) -> list[Entry]:
    """Record the attempts of a dead process, and leave its shards to others.

    Returns:
        The shards in hand, one of which is to blame.
    """
    scene, entries = board.scene, board.entries()
    if scene is None:
        return []
    begun = [entry for entry in entries if entry.begun]
    for entry in _taken_over(scene, entries):
        if entry.begun:
            with suppress(OSError):
                _fail(scene, entry, how, [e.stem for e in begun if e != entry])
    return begun


def give_back(board: Board) -> None:
    """Leave the shards of a process that was told to end to others; no attempt fails."""
    if (scene := board.scene) is None:
        return
    for entry in _taken_over(scene, board.entries()):
        if entry.begun:
            with suppress(OSError):
                _end(scene, entry, died=False)


def _taken_over(scene: Scene, entries: list[Entry]) -> Iterator[Entry]:
    """Yield the shards of a dead process that no other task takes over, with their leases held.

    A lease is tried for a while, as one look may not show that its holder is dead. All shards share
    one deadline, as Slurm may be about to kill this process too.
    """
    run, until, waiting = RunDir(Path(scene.root)), time.monotonic() + PATIENCE, list(entries)
    while waiting:
        for entry in list(waiting):
            lease = Lease(run.lease(entry.stem), scene.lease_seconds)
            try:
                with suppress(OSError):
                    if lease.claim():
                        waiting.remove(entry)
                        yield entry
            finally:
                lease.release()
        if time.monotonic() > until:
            return
        if waiting:
            time.sleep(0.1)


def _end(scene: Scene, entry: Entry, died: bool) -> None:
    attempts = Attempts(RunDir(Path(scene.root)).attempts)
    attempts.end(entry.stem, replace(_attempt(scene, entry), died=died))


def _attempt(scene: Scene, entry: Entry) -> Attempt:
    task = f"{scene.submission}-{scene.index}-{scene.attempt}"
    return Attempt(entry.attempt, task, scene.host)


def _fail(scene: Scene, entry: Entry, how: str, others: list[str]) -> None:
    """Record a failed attempt; where it was alone in hand, end the shard for this submission."""
    run = RunDir(Path(scene.root))
    beside = f"; it may have been {' or '.join(others)}, which it had in hand too" if others else ""
    error = f"the process that worked on {entry.stem} {how}{beside}"
    recorder = Recorder(run.record(scene.submission, scene.index, scene.attempt))
    recorder.append(died(entry.stem, _attempt(scene, entry), scene.fingerprint, error))
    _end(scene, entry, died=True)
    if not others:
        path = run.submission(scene.submission).failed(entry.stem)
        make_folder(path.parent)
        path.touch()
