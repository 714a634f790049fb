"""Run array tasks on nodes that share a folder through caches.

    clients.py CONFIG SEED FAULTS NODE...

A NODE is a process of `nfs_like.py`. Submits there, starts each task on a node, kills tasks at
random moments, or freezes them for longer than their lease, and requeues each killed one on another
node; then submits what is left from the last node. Prints what it did, and how each task ended.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import forker
from nfs_like import NEWNS, NEWUTS

from d2m_hpc.config.load import load
from d2m_hpc.plan.workload import run_dir
from d2m_hpc.worker import __main__ as worker

PAUSE = 0.05


def enter(node: int) -> None:
    """Go to a node, with its name and what it sees; a process of one thread may."""
    for kind, flag in (("mnt", NEWNS), ("uts", NEWUTS)):
        fd = os.open(f"/proc/{node}/ns/{kind}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(fd, flag):
            raise OSError(ctypes.get_errno(), f"setns {kind}")
        os.close(fd)


@dataclass
class Task:
    """An array element on a node; `thaws` is when a frozen one goes on."""

    index: int
    node: int
    attempt: int = 0
    pid: int = 0
    thaws: float = 0.0
    again: float = 0.0

    def start(self, root: str) -> None:
        self.pid = os.fork()
        if not self.pid:
            enter(self.node)
            slurm = {"ARRAY_TASK_ID": self.index, "RESTART_COUNT": self.attempt, "JOB_ID": 7}
            slurm |= {"JOB_END_TIME": 4102444800, "ARRAY_JOB_ID": 7}
            os.environ |= {f"SLURM_{name}": str(value) for name, value in slurm.items()}
            os._exit(worker.main([root, "000", "0", "1"]))


def play(root: str, nodes: list[int], moments: random.Random, faults: int, lease: float) -> None:
    """Run the tasks to their ends, with so many faults."""
    tasks = [Task(i, nodes[i % len(nodes)]) for i in range(len(nodes) * 2)]
    for task in tasks:
        task.start(root)
    next_fault = time.monotonic() + 1.0
    while any(task.pid or task.again for task in tasks):
        now = time.monotonic()
        for task in tasks:
            _look(task, now, root, nodes)
        awake = [t for t in tasks if t.pid and not t.thaws]
        if faults and awake and now > next_fault:
            faults, next_fault = faults - 1, now + moments.uniform(0.1, 1.0)
            _harm(moments.choice(awake), now, moments, lease if faults % 4 == 3 else 0.0)
        time.sleep(PAUSE)


def _look(task: Task, now: float, root: str, nodes: list[int]) -> None:
    if task.thaws and now > task.thaws:
        os.kill(task.pid, signal.SIGCONT)
        task.thaws = 0.0
    if task.again and now > task.again:
        task.again, task.attempt = 0.0, task.attempt + 1
        task.node = nodes[nodes.index(task.node) - 1]
        task.start(root)
    if task.pid and not task.thaws:
        pid, state = os.waitpid(task.pid, os.WNOHANG)
        if pid:
            print(f"task {task.index}-{task.attempt} ended: {state}", flush=True)
            task.pid = 0


def _harm(task: Task, now: float, moments: random.Random, lease: float) -> None:
    """Freeze a task for longer than its lease, or kill it."""
    print(f"task {task.index}-{task.attempt} is {'frozen' if lease else 'killed'}", flush=True)
    if lease:
        os.kill(task.pid, signal.SIGSTOP)
        task.thaws = now + 1.5 * lease
        return
    os.kill(task.pid, signal.SIGKILL)
    os.waitpid(task.pid, 0)
    task.pid, task.again = 0, now + moments.uniform(0.1, 1.0)


def main(where: str, seed: str, faults: str, *nodes: str) -> None:
    config, pids = load(Path(where)), [int(node) for node in nodes]
    forker.describe_once(where)
    root = str(run_dir(config).root)

    def submitted(node: int, *words: str) -> None:
        pid = os.fork()
        if not pid:
            enter(node)
            sys.argv = ["d2m", *words]
            try:
                forker.cli.main()
            except SystemExit as error:
                os._exit(int(error.code or 0))
            os._exit(0)
        print(f"{words[0]}: {os.waitpid(pid, 0)[1]}", flush=True)

    submitted(pids[0], "submit", where, "--no-sbatch")
    play(root, pids, random.Random(int(seed)), int(faults), config.lease_seconds)
    submitted(pids[-1], "submit", where, "--local")
    submitted(pids[0], "verify", where)


if __name__ == "__main__":
    main(*sys.argv[1:])
