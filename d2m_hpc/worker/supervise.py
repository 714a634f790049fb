"""A small process that watches the process that computes.

A crash leaves a process no time to report: a segfault in a decoder, memory that runs out, a call
that holds the interpreter's lock for ever. A child computes the task; this process waits, records
how the child ended, and starts another child for the rest.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from resource import struct_rusage

from d2m_hpc.storage.texts import traceback_of
from d2m_hpc.worker import death
from d2m_hpc.worker.board import Board

TICK = 1.0
GRACE = 15.0
"""Seconds beyond `stall_seconds`, as the task's own watchdog says more."""
STOP_SECONDS = 100.0
"""Seconds for a child that was told to stop; Slurm gives it 30, before a walltime 120."""
DUMP_SECONDS = 5.0
IDLE = 3
"""Children in a row that died without a finished shard, after which the shards are not to blame."""
WATCHED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
KERNEL = 0x80
"""`si_code` of a signal that a terminal sends to all its processes."""
SIGNALLED = 128
ABORTED = re.compile(rb"what\(\): +(CUDA error: [^\n]+)")
PR_SET_PDEATHSIG = 1


@dataclass
class Watch:
    """The state of a child while it is watched, and its end."""

    pid: int
    status: int = 0
    usage: struct_rusage | None = None
    asked: int = 0
    asked_at: float = 0.0
    silent: float = 0.0
    beats: int = 0
    stalled: float = 0.0
    last: float = field(default_factory=time.monotonic)


@dataclass
class Past:
    """The deaths of earlier children.

    Attributes:
        alone: stems that were in hand together, to be tried last, one at a time.
        blamed: stems that were alone in hand, left to another submit.
    """

    alone: set[str] = field(default_factory=set)
    blamed: set[str] = field(default_factory=set)

    def learn(self, begun: Sequence[str], how: str) -> None:
        """Take in that a child died with these stems in hand."""
        self.alone -= set(begun)
        if len(begun) == 1:
            self.blamed |= set(begun)
            _say(f"the process that worked on {begun[0]} {how}; the rest goes on without it")
        else:
            self.alone |= set(begun)
            _say(
                f"the process {how}, with {', '.join(begun)} in hand; they come last, one at a time"
            )


Main = Callable[[Board | None, Past], int]
_board: Board | None = None


def is_possible() -> bool:
    """Whether this process can be forked: it has one thread, and has not loaded torch."""
    return "torch" not in sys.modules and threading.active_count() == 1


def supervised(main: Main, unfit: Callable[[str], int], log: Path | None = None) -> int:
    """Have a child do the work, and another one for the rest where that dies.

    In the child this returns the work's result, for a call of `leave`.

    Args:
        unfit: gives the exit code for the death of a child without a shard, or of its GPU.
        log: the file that takes the child's output.

    Returns:
        The exit code: the work's own; 1 where a shard was to blame for a death.
    """
    if not is_possible():
        return main(None, Past())
    board, past, idle = Board(), Past(), 0
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*WATCHED, signal.SIGCHLD})
    while True:
        board.clear()
        killed, said = death.oom_kills(), log.stat().st_size if log else 0
        pid = fork()
        if not pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return _as_child(board, main, past)
        watch = _watched(pid, board)
        if board.left:
            return os.waitstatus_to_exitcode(watch.status) or int(bool(past.blamed))
        if watch.asked:
            death.give_back(board)
            return SIGNALLED + watch.asked
        if log and (error := _cuda_error(watch, log, said)):
            death.give_back(board)
            return unfit(f"the process was aborted: {error}")
        how = _how(board, watch, death.oom_kills() - killed)
        begun = [entry.stem for entry in death.record(board, how)]
        if not begun:
            return unfit(f"the process {how} before it had a shard in hand")
        if board.done:
            idle = 0
        elif not past.alone.issuperset(begun) or len(begun) > 1:
            idle += 1  # a death in a shard that is tried alone was expected
        past.learn(begun, how)
        if idle >= IDLE:
            _say(f"{IDLE} processes died one after the other with no shard done; the rest is left")
            return 1


def is_child() -> bool:
    """Whether this process was forked to compute."""
    return _board is not None


def leave(code: int) -> None:
    """End a child at once, whatever threads a model has left; do nothing in any other process."""
    if _board is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    _board.leave()
    os._exit(code)


def leave_by(error: BaseException) -> None:
    """End a child as the interpreter does at an uncaught error."""
    if _board is None:
        return
    if isinstance(error, SystemExit):
        leave(error.code if isinstance(error.code, int) else int(error.code is not None))
    print(traceback_of(error), end="", file=sys.stderr)
    leave(1)


def _as_child(board: Board, main: Main, past: Past) -> int:
    global _board
    _board = board
    # Torch's threads spin while they wait for one another, and the decode threads need the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
    return main(board, past)


def fork() -> int:
    """Fork a child that dies with this process, so that shards' holders never work unwatched."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    if pid := os.fork():
        return pid
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    return 0


def _watched(pid: int, board: Board) -> Watch:
    """Wait for a child, pass signals on to it, and end it where it hangs."""
    watch = Watch(pid)
    while True:
        info = signal.sigtimedwait({*WATCHED, signal.SIGCHLD}, TICK)
        # A call that was interrupted by a stop may return no signal.
        if info is not None and info.si_signo in WATCHED:
            _hand_on(watch, info)
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            watch.status, watch.usage = status, usage
            return watch
        _look(watch, board)


def _hand_on(watch: Watch, info: signal.struct_siginfo) -> None:
    now = time.monotonic()
    if info.si_signo == signal.SIGINT and watch.asked and now - watch.asked_at > 1:
        os.kill(watch.pid, signal.SIGKILL)  # the user insists
    elif info.si_signo != signal.SIGINT or info.si_code != KERNEL:
        os.kill(watch.pid, info.si_signo)
    if not watch.asked:
        watch.asked, watch.asked_at = info.si_signo, now


def _look(watch: Watch, board: Board) -> None:
    """Count the child's silent seconds, without those in which either process was suspended."""
    now = time.monotonic()
    passed, watch.last = min(now - watch.last, 2 * TICK), now
    if board.left:  # it has let its shards go, and may ask for its requeue for long
        return
    if watch.asked and now - watch.asked_at > STOP_SECONDS:
        os.kill(watch.pid, signal.SIGKILL)
        return
    scene = board.scene
    if scene is None or board.beats != watch.beats:
        watch.beats, watch.silent = board.beats, 0.0
    elif not _is_frozen(watch.pid):
        watch.silent += passed
    if scene and watch.silent > scene.stall_seconds + min(GRACE, scene.stall_seconds):
        _end_stalled(watch)


def _is_frozen(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state in "Tt"


def _end_stalled(watch: Watch) -> None:
    """End a child with all stacks in the log, which faulthandler writes without the interpreter's
    lock."""
    if not watch.stalled:
        watch.stalled = watch.silent
        os.kill(watch.pid, signal.SIGABRT)
    elif watch.silent > watch.stalled + DUMP_SECONDS:
        os.kill(watch.pid, signal.SIGKILL)


def _how(board: Board, watch: Watch, oom_kills: int) -> str:
    scene, stalled = board.scene, watch.stalled
    if scene and os.WIFEXITED(watch.status) and os.WEXITSTATUS(watch.status) == death.STALLED:
        stalled = scene.stall_seconds
    assert watch.usage is not None
    return death.told(watch.status, watch.usage, oom_kills, stalled)


def _cuda_error(watch: Watch, log: Path, start: int) -> str:
    """The error of CUDA that aborted a child, which C++ raises where memory of a failed GPU is
    freed. The dump of the stacks may crash in turn, with another signal."""
    if watch.stalled or not os.WIFSIGNALED(watch.status):
        return ""
    with suppress(OSError), open(log, "rb") as file:
        file.seek(start)
        if found := ABORTED.search(file.read()):
            return found[1].decode(errors="replace")
    return ""


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
