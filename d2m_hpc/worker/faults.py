"""Sort errors of user code, devices and disks, and log them."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from d2m_hpc.errors import ConfigError, DiskError, NodeError, ShardError
from d2m_hpc.models.custom import described
from d2m_hpc.stopping import is_asked
from d2m_hpc.storage.files import FILE_MODE
from d2m_hpc.storage.texts import ERROR, TRACEBACK, safe
from d2m_hpc.worker.batch import Outputs


class Safe(logging.Formatter):
    """Keeps secrets and control characters out of the log, also out of tracebacks.

    A message is one line: line ends in a stranger's text would look like messages of the program.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return safe(super().formatMessage(record), ERROR)

    def formatException(self, ei: Any) -> str:
        return safe(super().formatException(ei), TRACEBACK, lines=True)


class _Log(logging.StreamHandler[TextIO]):
    """Ignores a full disk: no task ends for a line of its log."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


@contextmanager
def logging_to(path: Path, crashes: bool) -> Iterator[None]:
    """Append this program's log, and the stacks of a crash, to the task's file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, FILE_MODE)
    package = logging.getLogger("d2m_hpc")
    before = package.level
    package.setLevel(logging.INFO)
    file = open(fd, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    handler = _Log(file)
    handler.setFormatter(Safe("%(asctime)s %(levelname)s %(message)s"))
    package.addHandler(handler)
    if crashes:
        faulthandler.enable(file)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before)
        if crashes:
            faulthandler.disable()
        with suppress(OSError):  # the rest on a full disk
            file.close()


def guarded(outputs: Iterator[Outputs]) -> Iterator[Outputs]:
    """Yield models' outputs; a model that tries to end the process fails its shard only.

    Raises:
        ShardError: a model called `sys.exit`, or raised an error that is no `Exception`.
    """
    while True:
        try:
            made = next(outputs)
        except StopIteration:
            return
        except BaseException as error:
            if isinstance(error, Exception) or is_asked(error):
                raise
            raise ShardError(f"a model or preprocessor raised {described(error)}") from error
        yield made


def ends_task(error: BaseException) -> bool:
    """Whether an error is not the shard's fault, but the config's, a disk's, the node's, or a wish
    to stop."""
    others = isinstance(error, ConfigError | DiskError | NodeError)
    return others or not isinstance(error, Exception) or bool(cuda_failure(error))


def cuda_failure(error: BaseException) -> str:
    """Why this process can compute no more, where CUDA itself is in error; else nothing.

    Libraries on top of CUDA raise errors of their own when it has failed, so that CUDA is asked.
    """
    cause: BaseException | None = error
    while cause is not None:
        if _is_cudas(cause):
            return _first_line(cause)
        cause = cause.__cause__ or cause.__context__
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        try:
            torch.cuda.synchronize()
        except RuntimeError as failure:
            return _first_line(failure)
    return ""


def _is_cudas(error: BaseException) -> bool:
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, torch.AcceleratorError) and not out_of_memory


def _first_line(error: BaseException) -> str:
    """The rest of torch's message is advice on how to debug kernels."""
    return str(error).partition("\n")[0]
