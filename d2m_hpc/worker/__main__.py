"""Run an array element's task: `python -m d2m_hpc.worker RUN_DIR SUBMISSION FIRST TASKS_PER_NODE`.

Exit codes: 0 done, 1 some shards failed, 2 a config or a disk is at fault, 4 the node cannot work,
143 told to stop.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import NoReturn

from submitit import JobEnvironment

from d2m_hpc.config.load import load
from d2m_hpc.errors import D2MError, DiskError, NodeError
from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.run.folder import RunDir, Submission
from d2m_hpc.stopping import Stopped, interrupt_once, own_process, stop_if_asked, stop_on_signals
from d2m_hpc.storage.files import FILE_MODE, atomic_write
from d2m_hpc.storage.refused import of_system
from d2m_hpc.storage.texts import ERROR, safe
from d2m_hpc.worker.board import Board
from d2m_hpc.worker.left import Left, cancel_pending
from d2m_hpc.worker.supervise import Past, leave, supervised

STOPPED = 143
INTERRUPTED = 130

REQUEUE_SECONDS = 1200.0
"""Seconds for which a task asks for its requeue, while slurmctld restarts."""
LONGEST_PAUSE = 5.0
"""Seconds between two tries: slurmctld looks for ended walltimes half a minute after its start."""
REFUSED = re.compile("disabled|nvalid job|denied|not permitted|already", re.IGNORECASE)
"""Answers that are final."""


def main(arguments: list[str]) -> int:
    root, submission, first, tasks_per_node = arguments
    own_process()
    # As in submitit's own scripts; a custom file, too, may ask `JobEnvironment` where it runs.
    os.environ["SUBMITIT_EXECUTOR"] = "slurm"
    run, job = RunDir(Path(root)), JobEnvironment()
    index = int(first) + int(job.array_task_id or 0) * int(tasks_per_node) + job.local_rank
    log_file = run.log_of(submission, index)
    try:
        _own_log(log_file)
    except OSError as error:
        return _said(of_system(error), DiskError.exit_code)
    _own_device(job.local_rank, int(tasks_per_node))
    unfit = partial(_unfit, run, submission, index)
    return supervised(partial(_as_task, run, submission, index, job), unfit, log_file)


def _unfit(run: RunDir, submission: str, index: int, why: str) -> int:
    """Record that the node cannot work; blame no shard."""
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    failure = {"node": _node(), "why": safe(why), "time": time.time()}
    path = run.node_failures / f"{submission}-{index}-{attempt}.json"
    atomic_write(path, json.dumps(failure).encode())
    return _said(why, NodeError.exit_code)


def _as_task(
    run: RunDir, submission: str, index: int, job: JobEnvironment, board: Board | None, past: Past
) -> int:
    """Work in this process; `past` knows of earlier processes that died."""
    stop_on_signals()
    interrupt_once()
    try:
        return _work(run, submission, index, job, board, past.alone)
    except Stopped:
        return STOPPED
    except KeyboardInterrupt:
        return INTERRUPTED
    except NodeError as error:
        return _unfit(run, submission, index, str(error))
    except D2MError as error:
        return _said(str(error), error.exit_code)
    except OSError as error:  # records, leases and logs: a full disk, a lost mount
        return _said(of_system(error), DiskError.exit_code)


def _node() -> str:
    """The node's name in Slurm; several nodes may share a host."""
    return os.environ.get("SLURMD_NODENAME", "")


def _said(why: str, code: int) -> int:
    line = f"error: {safe(why, ERROR, lines=True)}"
    try:
        print(line, flush=True)
    except OSError:  # the log is on a full disk: use srun's own output
        for fd in (1, 2):
            os.dup2(_first_stderr, fd)
        print(line, flush=True)
    return code


def _work(
    run: RunDir,
    submission: str,
    index: int,
    job: JobEnvironment,
    board: Board | None,
    alone: Collection[str],
) -> int:
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    starting = run.starting(os.environ.get("SLURM_JOB_ID", ""), int(attempt))
    config = load(run.submission(submission).config, frozen=True)
    if Left(run, submission, config).nothing_for(index):
        starting.unlink(missing_ok=True)
        print("no shard is left for this task", flush=True)
        return 0
    try:
        with gc_paused():  # importing torch takes a tenth less without it
            from d2m_hpc.worker.task import run_task
    except (ImportError, OSError) as error:  # this node lacks a library, or has an old one
        raise NodeError(f"d2m_hpc cannot be loaded on {_node()}: {error}") from error
    finally:
        stop_if_asked()  # libraries in C make an ImportError of a stop, or nothing
    starting.unlink(missing_ok=True)
    record = run.record(submission, index, int(attempt))
    try:
        progress = run_task(
            run.root, submission, index, deadline=_deadline(job), board=board, alone=alone
        )
    except Stopped as stopped:
        # SIGUSR2 comes before the walltime ends; preempted tasks are requeued by Slurm itself.
        if stopped.signal == signal.SIGUSR2:
            _requeue(job, record, board)
        raise
    if progress.state == "out of time":
        _requeue(job, record, board)
        return 0
    if config.steal and Left(run, submission, config).nothing():
        _cancel_pending(run.submission(submission))
    return 1 if progress.failed else 0


def _cancel_pending(submission: Submission) -> None:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array and (why := cancel_pending(submission, array)):
        print(f"pending elements of the submission stay: {why}", flush=True)


_first_stderr = 2


def _own_log(path: Path) -> None:
    """Send the output of this task and its libraries to the task's own file."""
    global _first_stderr
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, FILE_MODE)
    _first_stderr = os.dup(2)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _own_device(rank: int, tasks_per_node: int) -> None:
    """Give each rank one GPU: of those that Slurm gave the element, or of the whole node.

    On nodes that are given out whole, Slurm may set no CUDA_VISIBLE_DEVICES; an empty one means
    that there are no GPUs.
    """
    if tasks_per_node == 1:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        devices = [str(i) for i in range(_gpu_count() or tasks_per_node)]
    else:
        devices = [name for name in visible.split(",") if name]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[rank % len(devices)]


def _gpu_count() -> int:
    """Count the node's NVIDIA GPUs by device files: CUDA reads its variable only once."""
    return sum(p.name[6:].isdecimal() for p in Path("/dev").glob("nvidia*"))


def _deadline(job: JobEnvironment) -> float | None:
    """The end of the walltime, in seconds since the epoch; None where Slurm does not say."""
    if given := os.environ.get("SLURM_JOB_END_TIME"):
        return float(given)
    shown, why = _scontrol("show", "job", "--oneliner", job.job_id)
    if why:
        print(f"warning: the end of the walltime is not known: scontrol: {why}", flush=True)
    found = re.search(r"EndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", shown)
    return time.mktime(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S")) if found else None


def _requeue(job: JobEnvironment, record: Path, board: Board | None) -> None:
    """Ask for another walltime; raise `D2MError` where this one was too short for a single shard.

    Each rank asks, as other ranks may have ended before.
    """
    if not record.exists():
        raise D2MError(
            "no shard was finished in this walltime; raise slurm.time if one takes longer"
        )
    if board is not None:
        board.leave()  # nobody is to end this process while it asks: it has let its shards go
    _ask_for_requeue(job)


def _ask_for_requeue(job: JobEnvironment) -> None:
    """Ask until slurmctld answers; raise `D2MError` where it refuses, or is away for too long."""
    end, pause, told = time.monotonic() + REQUEUE_SECONDS, 1.0, ""
    while why := _scontrol("requeue", job.job_id)[1]:
        if REFUSED.search(why) or time.monotonic() + pause > end:
            raise D2MError(
                f"this task's walltime ends, and it could not be requeued ({why}); the same "
                "d2m-submit command goes on with its shards"
            )
        if why != told:
            print(f"slurmctld does not take the requeue; asking again: {why}", flush=True)
        told = why
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _scontrol(*words: str) -> tuple[str, str]:
    """Run scontrol with times in Slurm's own format; return its output, and its error or ""."""
    environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    done = subprocess.run(
        ["scontrol", *words],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env=environment,
    )
    return done.stdout, done.stderr.strip() or "no reason given" if done.returncode else ""


def end(code: int) -> NoReturn:
    """End this process, at once where its GPU has failed: freeing what CUDA gave would abort it."""
    leave(code)
    if code == NodeError.exit_code:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    end(main(sys.argv[1:]))
