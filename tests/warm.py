"""Run the package's programs in forks of a process that has imported them, and torch.

A `d2m submit --local` takes some 2 s of processor time, of which the imports take nine tenths, and
the tests start hundreds of such programs. A fork of a warm process runs the same code with the same
words, folder, variables, output and umask. A fork is a process as any other: SIGKILL ends it.

    warm.run(["d2m", "status", "c.yml"], cwd=folder).stdout

A program starts cold, as a user's does, where a variable differs that the imports have read.
Tests of what a program imports, or of its very first steps, start it by themselves.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, NoReturn
from unittest.mock import patch

IMPORTED = (
    # pandas is there for pyarrow, which imports it where it can.
    *("pandas", "torch", "torchvision", "pyarrow.pandas_compat", "fsspec.implementations.local"),
    *("jinja2", "rich.progress", "rich.table"),
    *("d2m_hpc.cli.commands", "d2m_hpc.launch.local", "d2m_hpc.plan.preflight"),
    *("d2m_hpc.models.stats", "d2m_hpc.worker.supervise", "d2m_hpc.worker.task"),
)
"""What most programs import; none of these starts a thread, nor looks for a terminal."""
OUTSIDE = ("LANG", "LC_", "LD_", "MKL_", "OMP_", "PYTHON", "TORCH_")
"""Beginnings of variables that may be read outside of Python's code."""
SET_BY_TORCH = "TORCHINDUCTOR_CACHE_DIR"
"""The import of its compiler sets this variable in the tests; programs ask for it when they run."""
BEFORE = dict(os.environ)
"""The variables of these tests, before any of them sets one."""
BIN = Path(sys.executable).parent
MOST = 1 << 17
"""Bytes of a message."""


class Process:
    """A started program."""

    def __init__(self, address: str, request: Mapping[str, Any], *streams: IO[Any]) -> None:
        self._server = _socket()
        self._server.connect(address)
        data = json.dumps(request).encode()
        socket.send_fds(self._server, [data], [stream.fileno() for stream in streams])
        self.pid = int(self._server.recv(MOST))
        self.returncode: int | None = None

    def wait(self, seconds: float | None = None) -> int:
        """Return the exit code, or minus a signal's number; raise `TimeoutError` if it is late."""
        if self.returncode is None:
            self._server.settimeout(seconds)
            self.returncode = int(self._server.recv(MOST))
            self._server.close()
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL to a program that has not been waited for."""
        os.kill(self.pid, signal.SIGKILL)


class Warm(NamedTuple):
    """A warm process: where it listens, its variables, and names of variables it asked for."""

    address: str
    variables: dict[str, str]
    asked: list[str]

    def suits(self, variables: Mapping[str, str]) -> bool:
        """Whether the imports would do the same with these variables."""
        both = self.variables.keys() | variables.keys()
        read = [*self.asked, *(name for name in both if name.startswith(OUTSIDE))]
        return all(self.variables.get(name) == variables.get(name) for name in read)


_here: list[Warm] = []
"""The warm process of these tests, once it has started."""


def _warm() -> Warm:
    if not _here:
        folder = tempfile.mkdtemp(prefix="d2m-warm-")
        started = subprocess.Popen(
            [sys.executable, __file__, f"{folder}/socket"],
            stdout=subprocess.PIPE,
            env=BEFORE,
            cwd="/",
            start_new_session=True,
        )
        for left in (partial(shutil.rmtree, folder), started.wait, started.kill):
            atexit.register(left)  # the last one is called first
        assert started.stdout is not None
        with started.stdout as told:
            _here.append(Warm(*json.loads(told.readline())))
    return _here[0]


def start(
    words: Sequence[str],
    out: IO[Any],
    err: IO[Any],
    cwd: str | os.PathLike[str] = ".",
    env: Mapping[str, str] | None = None,
    umask: int = -1,
) -> Process | None:
    """Start `d2m`, `d2m-submit` or `PYTHON -P -m MODULE`; returns None where it must start cold."""
    variables = dict(os.environ if env is None else env)
    if not (warm := _warm()).suits(variables):
        return None
    request = {"words": words, "cwd": os.path.abspath(cwd), "env": variables, "umask": umask}
    return Process(warm.address, request, out, err)


def run(
    words: Sequence[str],
    timeout: float | None = None,
    errors: str = "strict",
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a program, as `subprocess.run` does, and take its output as text.

    Args:
        options: `cwd`, `env` and `umask`.
    """
    with (
        tempfile.TemporaryFile("w+", errors=errors) as out,
        tempfile.TemporaryFile("w+", errors=errors) as err,
    ):
        if (process := start(words, out, err, **options)) is None:
            command = [str(BIN / words[0]), *words[1:]]  # an absolute path stays as it is
            return subprocess.run(
                command, capture_output=True, errors=errors, timeout=timeout, **options
            )
        try:
            code = process.wait(timeout)
        except TimeoutError as error:
            process.kill()
            process.wait()
            raise subprocess.TimeoutExpired(words, timeout or 0) from error
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


COMMAND = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
request = {{"words": words, "cwd": os.getcwd(), "env": dict(os.environ), "umask": -1}}
socket.send_fds(server, [json.dumps(request).encode()], [1, 2])
server.recv(16)
sys.exit(int(server.recv(16)))
"""


def commands(folder: Path, variables: Mapping[str, str]) -> Path:
    """A folder with a `d2m` and a `d2m-submit` which scripts call with these variables.

    Args:
        folder: made anew; where the commands must start cold, it stays empty.
    """
    folder.mkdir()
    if (warm := _warm()).suits(variables):
        for name in ("d2m", "d2m-submit"):
            path = folder / name
            path.write_text(COMMAND.format(python=sys.executable, address=warm.address))
            path.chmod(0o755)
    return folder


def describe(
    words: Sequence[str], capture_output: bool, text: bool, errors: str, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run the program that runs a custom file, as `preflight.described` asks for it."""
    return run(words, errors=errors, env=env)


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def import_all() -> list[str]:
    """Import what programs import; returns the names of the variables that were asked for."""
    from d2m_hpc.models.entries import presets

    asked, variables = set[str](), type(os.environ)
    get, contains = variables.get, variables.__contains__
    # Not `__getitem__`, as copies of all variables do not ask for any.
    with (
        patch.object(variables, "get", lambda v, n, *d: asked.add(n) or get(v, n, *d)),
        patch.object(variables, "__contains__", lambda v, n: asked.add(n) or contains(v, n)),
    ):
        for name in IMPORTED:
            import_module(name)
        presets()  # imports all families, and looks for no weights
    return sorted(asked - {SET_BY_TORCH})


def _serve(listener: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each request until the tests end; returns in a fork, with its request and output.

    The asker is told the fork's id, and how it ended.
    """
    selector, tests = selectors.DefaultSelector(), os.pidfd_open(os.getppid())
    selector.register(tests, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd == tests:
                os._exit(0)
            if key.fileobj is not listener:  # a fork has ended
                pid, asker = key.data
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with asker, suppress(BrokenPipeError):
                    asker.send(b"%d" % code)
                selector.unregister(key.fd)
                os.close(key.fd)
                continue
            asker, _ = listener.accept()
            data, streams, _, _ = socket.recv_fds(asker, MOST, 2)
            if not (pid := os.fork()):
                return json.loads(data), streams
            asker.send(b"%d" % pid)
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, asker))
            for stream in streams:
                os.close(stream)


def _prepare(request: Mapping[str, Any], streams: Sequence[int]) -> None:
    """Take the output, folder, variables and umask of the program that was asked for."""
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stderr__ = sys.stderr
    os.closerange(3, 1 << 10)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["umask"] != -1:
        os.umask(request["umask"])


def _run(program: str, *words: str) -> None:
    """Be the program that was asked for."""
    from d2m_hpc import cli
    from d2m_hpc.plan import preflight
    from d2m_hpc.worker import supervise

    preflight.subprocess = SimpleNamespace(run=describe)
    # Torch is here, and has run nothing, so that it has no threads which a fork would lack.
    supervise.is_possible = lambda: threading.active_count() == 1
    if program in ("d2m", "d2m-submit"):
        sys.path[0] = str(BIN)
        sys.argv = [str(BIN / program), *words]
        cli.main() if program == "d2m" else cli.main_submit()
    else:
        del sys.path[0]
        sys.argv = [*words[2:]]
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)


def _end(program: Callable[..., None], *words: str) -> NoReturn:
    """Run a program to its end, without the second that taking all modules apart takes."""
    code: object = 0
    try:
        program(*words)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    assert isinstance(code, int)
    os._exit(code)


if __name__ == "__main__":
    with _socket() as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        _here.append(Warm(sys.argv[1], dict(os.environ), import_all()))
        print(json.dumps(_here[0]), flush=True)
        gc.freeze()  # a collection in a fork would copy the pages of all objects
        request, streams = _serve(listener)
    _prepare(request, streams)
    _end(_run, *request["words"])
