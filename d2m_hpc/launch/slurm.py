"""Chunks to job arrays, and what Slurm says of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from d2m_hpc.errors import SlurmError
from d2m_hpc.state.manifest import Shard
from d2m_hpc.state.rundir import RunDir, Submission, atomic_write

DEFAULT_MAX_ARRAY_SIZE = 1001

# A job in one of these takes no more shards.
OVER = {"CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "TIMEOUT"} | {
    "BOOT_FAIL",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
}


@dataclass
class Array:
    """A job array: elements 0 to `elements` - 1, each of `tasks_per_node` chunks.

    Attributes:
        name: its job name, by which it is found when its job id was never written down.
        first: the chunk of its first element's first task.
        parallel: how many elements may run at once; 0 for no limit.
        after: the array that must end first, by its place in the submission, or None.
    """

    name: str
    first: int
    elements: int
    tasks_per_node: int = 1
    parallel: int = 0
    after: int | None = None
    job_id: str = ""

    def chunks_of(self, element: int) -> range:
        start = self.first + element * self.tasks_per_node
        return range(start, start + self.tasks_per_node)


@dataclass
class Proposal:
    """What a submit would hand to Slurm.

    Attributes:
        groups: shards that one task can do together.
        most: the most shards of a task.
        tasks: how many there will be, of as many chunks.
    """

    groups: list[list[Shard]]
    most: int
    tasks: int
    arrays: list[Array]
    options: dict[str, Any]


def token(root: Path) -> str:
    """A run's mark in its jobs' names."""
    return hashlib.sha256(str(root).encode()).hexdigest()[:8]


def split(
    chunks: int, max_array_size: int, tasks_per_node: int, max_parallel: int | None, name: str
) -> list[Array]:
    """Arrays whose indices stay below MaxArraySize, together never over `max_parallel` tasks.

    Each array gets its share of `max_parallel`; when there are more arrays than that, some wait
    for others to end.
    """
    elements = -(-chunks // tasks_per_node)
    starts = range(0, elements, max_array_size)
    most = max(1, max_parallel // tasks_per_node) if max_parallel else 0
    lanes = min(most, len(starts)) if most else len(starts)
    return [
        Array(
            name=f"{name}-{i}",
            first=start * tasks_per_node,
            elements=min(max_array_size, elements - start),
            tasks_per_node=tasks_per_node,
            parallel=most // lanes + (i % lanes < most % lanes) if most else 0,
            after=i - lanes if i >= lanes else None,
        )
        for i, start in enumerate(starts)
    ]


def is_here() -> bool:
    return shutil.which("sbatch") is not None


def _ask(*words: str) -> str:
    """
    Raises:
        SlurmError: the command is not here or failed, with its words.
    """
    # A user's SQUEUE_PARTITION or SQUEUE_STATES would hide live tasks.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SQUEUE_")}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=120, env=environment
        )
    except FileNotFoundError:
        raise SlurmError(f"there is no {words[0]} here; go to a login node") from None
    if done.returncode:
        raise SlurmError(f"{words[0]} failed: {done.stderr.strip()}")
    return done.stdout


def max_array_size() -> int:
    """Of this cluster; Slurm's default where there is none to ask, or it does not answer.

    A plan can be looked at without Slurm; a submit asks for the queue first.
    """
    try:
        return parse_max_array_size(_ask("scontrol", "show", "config"))
    except SlurmError:
        return DEFAULT_MAX_ARRAY_SIZE


def parse_max_array_size(shown: str) -> int:
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return int(found[1]) if found else DEFAULT_MAX_ARRAY_SIZE


@dataclass(frozen=True)
class Element:
    """An array element in the queue."""

    job_id: str
    index: int
    state: str
    name: str
    reason: str = ""
    node: str = ""


@dataclass(frozen=True)
class Queue:
    """The user's array elements that Slurm knows of."""

    all: list[Element]

    def of(self, array: Array) -> list[Element]:
        """Its elements, by job id, or by name where the id was never written down."""
        named = self._by_name.get(array.name, [])
        return [e for e in named if not array.job_id or e.job_id == array.job_id]

    @cached_property
    def _by_name(self) -> dict[str, list[Element]]:
        """A large run has hundreds of arrays, each asked for, and tens of thousands of elements."""
        named = defaultdict(list)
        for element in self.all:
            named[element.name].append(element)
        return named

    def live(self, array: Array) -> list[Element]:
        """Its elements that are pending or running."""
        return [e for e in self.of(array) if e.state not in OVER]

    def elements(self, array: Array) -> list[int]:
        """Indices of its elements that are pending or running."""
        return [e.index for e in self.live(array)]


_FORMAT = "%F|%K|%T|%r|%N|%j"
"""The name last: it is the only field that may hold a `|`."""


def queue() -> Queue:
    """
    Raises:
        SlurmError: squeue failed; without it live tasks cannot be told from dead ones.
    """
    return parse_queue(_ask("squeue", "--me", "--noheader", "--array", f"--format={_FORMAT}"))


def parse_queue(shown: str) -> Queue:
    rows = (line.split("|", 5) for line in shown.splitlines() if line.strip())
    return Queue(
        [
            Element(job, int(index), state, name, reason, node)
            for job, index, state, reason, node, name in rows
            if index.isdigit()
        ]
    )


def cancel(job_ids: Sequence[str]) -> None:
    if job_ids:
        _ask("scancel", *job_ids)


def read_arrays(submission: Submission) -> list[Array]:
    """The arrays that a submission meant to start, with the job ids that were written down."""
    if not submission.arrays.exists():
        return []
    return [Array(**values) for values in json.loads(submission.arrays.read_bytes())]


def all_arrays(run: RunDir) -> list[Array]:
    """Of every submission, oldest first."""
    return [array for submission in run.submissions() for array in read_arrays(submission)]


def write_arrays(submission: Submission, arrays: Sequence[Array]) -> None:
    atomic_write(submission.arrays, json.dumps([asdict(a) for a in arrays]).encode())
