"""The devcluster, as the tests use it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

DEVCLUSTER = Path(__file__).parents[2] / "slurm" / "devcluster"
NO_INDEX = 4294967294
"""What sbatch makes of %a for a job that is no array."""
T = TypeVar("T")


PATIENCE = 300.0
"""Seconds for what takes a few on an idle machine, and many times that on a busy one."""


def wait_until(probe: Callable[[], T], seconds: float = PATIENCE) -> T:
    """The first true value of `probe`; an assertion error with its last one after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := probe()):
        assert time.monotonic() < end, f"still {value!r} after {seconds} s"
        time.sleep(0.1)
    return value


def is_up() -> bool:
    """Whether this machine has a Slurm that answers."""
    if shutil.which("scontrol") is None:
        return False
    return subprocess.run(["scontrol", "ping"], capture_output=True, check=False).returncode == 0


class Cluster:
    """Slurm's commands, as a user types them, and devcluster's own two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        done = subprocess.run(
            words, cwd=self.folder, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done

    def up(self, *options: object) -> subprocess.CompletedProcess[str]:
        return self.run(DEVCLUSTER / "up", *options)

    def down(self) -> subprocess.CompletedProcess[str]:
        return self.run(DEVCLUSTER / "down")

    def controllers(self) -> list[int]:
        """The slurmctld that is up, or none."""
        path = Path("/etc/slurm/slurm.conf").resolve().parents[1] / "run" / "slurmctld.pid"
        return [int(path.read_text())] if path.exists() and is_up() else []

    def save(self, job: str) -> None:
        """Wait until what slurmctld knows of a job is on disk; it saves some seconds late.

        One that dies before has forgotten new jobs, knows a task that runs as one that waits, and
        starts it again.
        """
        saved = Path("/etc/slurm/slurm.conf").resolve().parents[1] / "state" / "job_state"
        written = lambda: saved.stat().st_mtime_ns if saved.exists() else 0  # noqa: E731
        before = written()
        self.run("scontrol", "update", f"jobid={job}", "comment=to be saved")
        wait_until(lambda: written() > before)

    def crash_controller(self, job: str) -> None:
        """Kill slurmctld, once what it knows of a job is on disk."""
        [controller] = self.controllers()
        self.save(job)
        os.kill(controller, signal.SIGKILL)

    def submit(self, script: str, *options: object) -> str:
        """The id of a batch job that runs `script`; its output goes to <id>_<index>.out."""
        path = self.folder / "job.sh"
        path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        return self.run(
            "sbatch", "--parsable", "--output=%A_%a.out", "--open-mode=append", *options, path
        ).stdout.strip()

    def field(self, job: str, name: str) -> str:
        """What `scontrol show job` says of a job or of an array's element."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)[name]

    def wait_state(self, job: str, *states: str) -> str:
        """Wait for one of `states`, and return it."""

        def arrived() -> str:
            state = self.field(job, "JobState")
            return state if state in states else ""

        return wait_until(arrived)

    def output(self, job: str, index: int | None = None) -> str:
        """What the job has written so far."""
        path = self.folder / f"{job}_{NO_INDEX if index is None else index}.out"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def node_state(self, node: str) -> str:
        return self.run("sinfo", "-hN", "-p", "low", "-n", node, "-o", "%T").stdout.strip()

    def set_node(self, node: str, state: str) -> None:
        self.run("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")

    def resume_nodes(self) -> None:
        """Take back what a test, or Slurm at a task that it did not know, made of nodes."""
        shown = self.run("sinfo", "-hN", "-p", "low", "-o", "%N %T").stdout if is_up() else ""
        for line in shown.splitlines():
            node, state = line.split()
            if state.rstrip("*") in ("drained", "draining", "down"):
                self.set_node(node, "resume")

    def set_time(self, job: str, minutes: int) -> None:
        """Another walltime, as an administrator gives it."""
        self.run("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")

    def states(self) -> dict[str, str]:
        """State of every job and array element in the queue."""
        shown = self.run("squeue", "-h", "-r", "-o", "%i %T").stdout
        return dict(line.split() for line in shown.splitlines())

    def cancel_all(self) -> None:
        """Cancel all jobs, without KillWait's patience, and wait for their nodes."""
        if is_up() and (jobs := self.run("squeue", "-h", "-o", "%A").stdout.split()):
            # A job may end by itself meanwhile.
            self.run("scancel", "-Q", *jobs, check=False)
            self.run("scancel", "-Q", "-f", "-s", "KILL", *jobs, check=False)
            wait_until(lambda: not self.run("squeue", "-h").stdout)
