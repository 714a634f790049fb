"""Run `d2m submit --local` in forks of a process that has imported everything, and kill them.

A fork starts to work at once, so that a random moment falls into the work and not into the import
of torch. The parent itself never runs an operation of torch.

    forker.py random CONFIG OUT SEED KILLS SECONDS
        SIGKILL at random moments, then a run to the end
    forker.py steps CONFIG OUT
        SIGKILL before the first file operation, and a run to the end, in OUT/1; before the second
        in OUT/2; and so on
    forker.py requests CONFIG OUT
        likewise, before each request to S3 that is about an output and reads none, with OUT on S3;
        after a kill it waits for a line on its input
    forker.py task-steps CONFIG OUT BEFORE
        likewise, but only before the operations of the task; each folder is a copy of BEFORE

    forker.py freeze CONFIG OUT TAKER [BEFORE]
        SIGSTOP before the first file operation of the thread that commits and records; its leases
        are taken for expired, TAKER is run to the end, the first goes on, and TAKER is run once
        more; and so on

Prints how each run ended, `killed` or its exit code.
"""

from __future__ import annotations

import gc
import glob
import itertools
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import fsspec
import warm
import yaml

from d2m_hpc import cli
from d2m_hpc.plan import preflight
from d2m_hpc.worker import task


def fork(config: str, out: str, before: Callable[[], None] = lambda: None) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.dup2(2, 1)
    sys.argv = ["d2m", "submit", config, "--local", "--set", f"output_metadata_dir={out}"]
    before()
    try:
        cli.main()
    except SystemExit as error:
        os._exit(int(error.code or 0))
    os._exit(0)


def wait(pid: int) -> str:
    state = os.waitpid(pid, 0)[1]
    ended = "killed" if os.WIFSIGNALED(state) else str(os.WEXITSTATUS(state))
    print(ended, flush=True)
    return ended


def describe_once(config: str) -> None:
    """Run the custom file here, once; each fork would start a process that imports torch for it."""
    preflight.described = cache(preflight.described)
    custom = yaml.safe_load(Path(config).read_bytes()).get("custom_pypath")
    if custom:
        preflight.described(Path(custom))


def kill_at_random(config: str, out: str, seed: int, kills: int, seconds: float) -> None:
    moments = random.Random(seed)
    for _ in range(kills):
        pid = fork(config, out)
        time.sleep(moments.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        wait(pid)
    wait(fork(config, out))


def die_at(step: int) -> None:
    """SIGKILL this process before its step-th operation on a file."""
    steps = itertools.count(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink", "write", "pwrite", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def die_in_task_at(step: int) -> None:
    """As `die_at`, of the operations after the submit."""
    run_task = task.run_task

    def counted(*args: Any, **kwargs: Any) -> Any:
        die_at(step)
        return run_task(*args, **kwargs)

    task.run_task = counted


def stop_in_writer_at(step: int) -> None:
    """SIGSTOP this process before the step-th file operation of its writer thread."""
    steps = itertools.count(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            writes = threading.current_thread().name == "writer"
            if writes and next(steps) == step:
                # To the thread: it would run on while another thread is woken for the signal.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            return function(*args, **kwargs)

        return call

    for name in ("open", "replace", "rename", "fsync", "unlink", "write", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def freeze_at_every_step(config: str, out: str, taker: str, before: str = "") -> None:
    for step in itertools.count(1):
        folder = f"{out}/{step}"
        if before:
            shutil.copytree(before, folder)
        frozen = fork(config, folder, partial(stop_in_writer_at, step))
        if not os.WIFSTOPPED(os.waitpid(frozen, os.WUNTRACED)[1]):
            return
        for lease in glob.glob(f"{folder}/.d2m/leases/*"):
            os.unlink(lease)
        print("taker ", end="", flush=True)
        wait(fork(taker, folder))
        os.kill(frozen, signal.SIGCONT)
        print("frozen ", end="", flush=True)
        wait(frozen)
        print("again ", end="", flush=True)
        wait(fork(taker, folder))


def kill_at_every_step(
    config: str, out: str, die: Callable[[int], None] = die_at, before: str = ""
) -> None:
    for step in itertools.count(1):
        folder = f"{out}/{step}"
        if before:
            shutil.copytree(before, folder)
        if wait(fork(config, folder, partial(die, step))) != "killed":
            return
        wait(fork(config, folder))


def die_at_request(step: int) -> None:
    """SIGKILL this process before its step-th request to S3 about an output, but to read one."""
    from s3fs import S3FileSystem

    steps, asked = itertools.count(1), S3FileSystem._call_s3

    async def call(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        of_output = kwargs.get("Key", "").endswith((".npz", ".parquet"))
        if of_output and method != "get_object" and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return await asked(self, method, *args, **kwargs)

    S3FileSystem._call_s3 = call


def kill_at_every_request(config: str, out: str) -> None:
    fsspec.filesystem("s3").ls(out.rpartition("/")[0])  # forks must not use this one's connections
    for step in itertools.count(1):
        ended = wait(fork(config, f"{out}/{step}", lambda step=step: die_at_request(step)))
        if ended != "killed":
            return
        sys.stdin.readline()
        wait(fork(config, f"{out}/{step}"))


if __name__ == "__main__":
    kind, config, out, *rest = sys.argv[1:]
    warm.import_all()
    describe_once(config)
    gc.freeze()  # a collection in a fork would copy the pages of all objects
    if kind == "random":
        kill_at_random(config, out, int(rest[0]), int(rest[1]), float(rest[2]))
    elif kind == "task-steps":
        kill_at_every_step(config, out, die_in_task_at, *rest)
    elif kind == "freeze":
        freeze_at_every_step(config, out, *rest)
    elif kind == "requests":
        kill_at_every_request(config, out)
    else:
        kill_at_every_step(config, out)
    gc.unfreeze()
