"""Who may end this process, and the signals that ask a task to end."""

from __future__ import annotations

import signal
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGUSR2)


_own = False
_asked = 0
"""The signal that asked this process to end."""


def own_process() -> None:
    """Say that this process is a command's or a task's, and not one of a caller from Python."""
    global _own
    _own = True


def is_own_process() -> bool:
    """Whether the process may be ended, and its garbage collector kept from what stays."""
    return _own


class Stopped(BaseException):
    """A signal asked this task to end."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; what user code raises by itself is a plain `KeyboardInterrupt`."""


def stop_on_signals() -> None:
    """Raise `Stopped` in the main thread, once: under srun the same signal arrives twice."""
    global _asked
    _asked = 0
    for number in STOPS:
        signal.signal(number, _stop)


def stop_if_asked() -> None:
    """Raise `Stopped` anew where the code that a signal met kept the first one to itself."""
    if _asked:
        raise Stopped(_asked)


def interrupt_once() -> None:
    """Raise `Interrupted` at the first Ctrl-C; more of them do not disturb what ends the task."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def is_asked(error: BaseException) -> bool:
    """Whether somebody asked the task to end, by a signal, and not the code that it runs."""
    if isinstance(error, KeyboardInterrupt):
        ours = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, _interrupt)
        return isinstance(error, Interrupted) or not ours
    return isinstance(error, Stopped)


def _stop(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = number
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Interrupted
