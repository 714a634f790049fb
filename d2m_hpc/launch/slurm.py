"""Ask squeue for a run's elements, size the job arrays of a submit, cancel them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from d2m_hpc.errors import SlurmError
from d2m_hpc.launch.commands import ask, asked_again
from d2m_hpc.run.damage import undamaged
from d2m_hpc.run.folder import RunDir, Submission
from d2m_hpc.run.records import Job
from d2m_hpc.run.tasks import Progress
from d2m_hpc.storage.files import atomic_write

DEFAULT_MAX_ARRAY_SIZE = 1001

# Jobs in these states take no more shards.
OVER = {"CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "TIMEOUT"} | {
    "BOOT_FAIL",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
}


@dataclass
class Array:
    """A job array: elements 0 to `elements` - 1, each of `tasks_per_node` chunks.

    Attributes:
        name: the job name, which finds the array where its job id was never recorded.
        first: the chunk of the first element's first task.
        parallel: elements that may run at once; 0 for no limit.
        after: the place in the submission of an array that must end first, or None.
        mem, time: what the array's elements ask for; empty where the config says nothing.
        gres, constraint: the kind of nodes, where the config names several.
    """

    name: str
    first: int
    elements: int
    tasks_per_node: int = 1
    parallel: int = 0
    after: int | None = None
    job_id: str = ""
    mem: str = ""
    time: str = ""
    gres: str = ""
    constraint: str = ""

    def chunks_of(self, element: int) -> range:
        start = self.first + element * self.tasks_per_node
        return range(start, start + self.tasks_per_node)


class Need(NamedTuple):
    """The memory and walltime of an array element, as sbatch takes them; empty for none."""

    mem: str = ""
    time: str = ""


class Kind(NamedTuple):
    """A kind of nodes, as sbatch takes it; empty for any."""

    gres: str = ""
    constraint: str = ""


@dataclass
class Sized:
    """Jobs whose tasks need the same of Slurm.

    Attributes:
        groups: jobs that one task can do together.
        tasks: the number of tasks, one for each chunk.
    """

    need: Need
    groups: list[list[Job]]
    tasks: int


@dataclass
class Proposal:
    """The arrays and options that a submit would hand to Slurm.

    Attributes:
        most: the most shards of a task.
        node_failures: failures in a row on a node after which pending elements leave it out.
    """

    parts: list[Sized]
    most: int
    arrays: list[Array]
    options: dict[str, Any]
    node_failures: int = 3

    @property
    def tasks(self) -> int:
        return sum(part.tasks for part in self.parts)


def token(root: Path) -> str:
    """The mark of a run in its jobs' names."""
    return hashlib.sha256(str(root).encode()).hexdigest()[:8]


def split(
    parts: Sequence[tuple[int, Need]],
    max_array_size: int,
    tasks_per_node: int,
    max_parallel: int | None,
    name: str,
    kinds: Sequence[Kind] = (Kind(),),
) -> list[Array]:
    """Arrays whose indices stay below MaxArraySize, with `max_parallel` tasks at once in all.

    The elements are shared out among the kinds of nodes. Each array gets a share of
    `max_parallel`; where there are more arrays, some wait for others.

    Args:
        parts: numbers of chunks, with what their tasks need; each begins with an element of its
            own.
    """
    pieces: list[tuple[int, int, Need, Kind]] = []
    begin = 0
    for chunks, need in parts:
        elements = -(-chunks // tasks_per_node)
        for i, kind in enumerate(kinds):
            start, end = (-(-elements * n // len(kinds)) for n in (i, i + 1))
            starts = range(begin + start, begin + end, max_array_size)
            pieces += [(s, min(max_array_size, begin + end - s), need, kind) for s in starts]
        begin += elements
    most = max(1, max_parallel // tasks_per_node) if max_parallel else 0
    abreast = min(most, len(pieces)) if most else len(pieces)
    return [
        Array(
            name=f"{name}-{i}",
            first=start * tasks_per_node,
            elements=elements,
            tasks_per_node=tasks_per_node,
            parallel=share(most, abreast, i),
            after=i - abreast if i >= abreast else None,
            **need._asdict(),
            **kind._asdict(),
        )
        for i, (start, elements, need, kind) in enumerate(pieces)
    ]


def share(most: int, abreast: int, place: int) -> int:
    """The elements of one array that may run at once, of `most` in arrays that run abreast."""
    return most // abreast + (place % abreast < most % abreast) if most else 0


def is_here() -> bool:
    return shutil.which("sbatch") is not None


def max_array_size() -> int:
    """The cluster's MaxArraySize; Slurm's default where nobody answers.

    A dry run needs no Slurm; a submit asks for the queue first.

    Raises:
        SlurmError: the cluster takes no job arrays.
    """
    try:
        shown = ask("scontrol", "show", "config")
    except SlurmError:
        return DEFAULT_MAX_ARRAY_SIZE
    return parse_max_array_size(shown)


def parse_max_array_size(shown: str) -> int:
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    if found and not int(found[1]):
        raise SlurmError(
            "this cluster takes no job arrays: its MaxArraySize is 0; ask its administrators for "
            "another one, or run with --local in a job of your own"
        )
    return int(found[1]) if found else DEFAULT_MAX_ARRAY_SIZE


@dataclass(frozen=True)
class Element:
    """An array element in the queue.

    Attributes:
        began: when it was started, as squeue says it; maybe a prediction where it is pending.
    """

    job_id: str
    index: int
    state: str
    name: str
    reason: str = ""
    node: str = ""
    began: str = ""

    @property
    def is_listed(self) -> bool:
        """Whether squeue lists the element by itself: it lives, or its epilog runs."""
        return self.state == COMPLETING or self.state not in OVER


@dataclass(frozen=True)
class Queue:
    """A run's array elements that Slurm knows of; those that ended long ago are forgotten.

    Attributes:
        submitted: the run's arrays, by the name of their submission, oldest first.
    """

    all: list[Element]
    submitted: Mapping[str, list[Array]] = field(default_factory=dict)

    @cached_property
    def arrays(self) -> list[Array]:
        return [array for arrays in self.submitted.values() for array in arrays]

    def of(self, array: Array) -> list[Element]:
        """The elements of an array, by job id, or by name where the id was never recorded."""
        named = self._by_name.get(array.name, [])
        return [e for e in named if not array.job_id or e.job_id == array.job_id]

    @cached_property
    def _by_name(self) -> dict[str, list[Element]]:
        """Elements by name: a large run has hundreds of arrays and tens of thousands of
        elements."""
        named = defaultdict(list)
        for element in self.all:
            named[element.name].append(element)
        return named

    def live(self, array: Array) -> list[Element]:
        """The elements of an array that are pending or running."""
        return [e for e in self.of(array) if e.state not in OVER]

    def elements(self, array: Array) -> list[int]:
        """The indices of those elements."""
        return [e.index for e in self.live(array)]


_FORMAT = "%F|%K|%T|%r|%N %S|%j"
"""squeue's fields; the name comes last, as it alone may hold a `|`."""
_ENDS = "%F|%K|%T|%e"

PENDING, RUNNING, COMPLETING, REQUEUED = "PENDING", "RUNNING", "COMPLETING", "REQUEUED"
REST = -1
"""The index of all elements that were cancelled before they began, of an array that had begun."""
SILENT = 300.0
"""Seconds in which a task is imported and begins, also from a slow disk."""

AT_ONCE = 500
"""Jobs on one command line, whose length the system bounds."""
NAMES = 3000
"""Job names in one word of a command line."""


def queue(
    run: RunDir, patience: float = 0.0, known: Mapping[str, list[Array]] | None = None
) -> Queue:
    """Ask squeue for a run's array elements, whoever submitted them; raise `SlurmError` where
    that fails.

    Args:
        patience: seconds for which a controller that is away is asked again.
        known: the run's arrays, if read already.
    """
    submitted = known or arrays_of(run)
    names = [rounds_of(run).name, *(a.name for arrays in submitted.values() for a in arrays)]
    found: list[Element] = []
    for start in range(0, len(names), NAMES):
        named = f"--name={','.join(names[start : start + NAMES])}"
        # Also those that ended in the last minutes (MinJobAge), and how.
        words = ("squeue", named, "--states=all", "--noheader", "--array")
        part = parse_queue(asked_again(patience, *words, f"--format={_FORMAT}"))
        if any(element.state == COMPLETING for element in part.all):
            part = with_requeued(part, ask(*words, f"--format={_ENDS}"), datetime.now())
        found += part.all
    return Queue(found, submitted)


def parse_queue(shown: str) -> Queue:
    """Parse squeue's lines; skip lines that are not jobs, such as a cluster's name."""
    rows = (line.split("|", 5) for line in shown.splitlines() if line.count("|") >= 5)
    return Queue(
        [
            Element(
                job,
                int(index) if index.isdigit() else REST,
                state,
                name,
                reason,
                *place.split(" ", 1),
            )
            for job, index, state, reason, place, name in rows
            if index.isdigit() or state == "CANCELLED"
        ]
    )


def with_requeued(found: Queue, ends: str, now: datetime) -> Queue:
    """Tell requeued elements from ended ones while their epilog runs.

    squeue says COMPLETING of both. A requeued element has an end in the future, an ended one its
    own.

    Args:
        ends: squeue's later output by `_ENDS`.
    """
    rows = (line.split("|") for line in ends.splitlines() if line.count("|") == 3)
    later = {(job, index): (state, end) for job, index, state, end in rows}

    def seen(element: Element) -> Element:
        known = later.get((element.job_id, str(element.index)))
        if element.state != COMPLETING or known is None:
            return element
        state, end = known
        if state == COMPLETING:
            state = COMPLETING if _is_past(end, now) else REQUEUED
        return replace(element, state=state)

    return Queue([seen(element) for element in found.all])


def _is_past(end: str, now: datetime) -> bool:
    """Whether squeue's time has come; no for `N/A`, without a walltime.

    The two clocks are slurmctld's and this machine's. Where this one is behind, an element that is
    over counts as requeued until its epilog ends; where it is ahead by a whole walltime, one that
    will run again counts as over, and leases keep its shards from being computed twice.
    """
    try:
        return datetime.fromisoformat(end) <= now
    except ValueError:
        return False


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs, arrays or elements; raise `SlurmError` with scancel's words."""
    for start in range(0, len(jobs), AT_ONCE):
        ask("scancel", *jobs[start : start + AT_ONCE])


def node_names() -> set[str]:
    """All nodes of the cluster; none where Slurm does not answer."""
    try:
        return set(ask("sinfo", "--noheader", "--Node", "--format=%N").split())
    except SlurmError:
        return set()


def read_arrays(submission: Submission) -> list[Array]:
    """The arrays that a submission meant to start, with the recorded job ids."""
    if not submission.arrays.exists():
        return []
    advice = "look for its array tasks by `squeue --me`; where there are none, remove it"
    with undamaged(submission.arrays, advice):
        return [Array(**values) for values in json.loads(submission.arrays.read_bytes())]


def arrays_of(run: RunDir) -> dict[str, list[Array]]:
    """A run's arrays by the name of their submission, oldest first."""
    return {submission.name: read_arrays(submission) for submission in run.submissions()}


def at_work(queue: Queue) -> dict[str, set[int]]:
    """The chunks of running elements, by the name of each submission that Slurm knows of."""
    known: dict[str, set[int]] = {}
    for name, arrays in queue.submitted.items():
        for array in arrays:
            if array.job_id or queue.of(array):
                running = (e.index for e in queue.live(array) if e.state not in (PENDING, REQUEUED))
                chunks = known.setdefault(name, set())
                chunks.update(i for index in running for i in array.chunks_of(index))
    return known


def silent(queue: Queue | None, tasks: Iterable[Progress]) -> dict[str, str]:
    """The nodes of elements that run by Slurm's word and have told nothing for minutes.

    They hang, or are gone: a slurmctld that died may call running what ended some seconds before.

    Args:
        queue: None where Slurm was not asked.
        tasks: the attempts of the run's tasks.
    """
    told, found, now = defaultdict[str, float](float), dict[str, str](), time.time()
    if queue is None:
        return found
    for task in tasks:
        told[task.lane] = max(told[task.lane], task.updated)
    for name, arrays in queue.submitted.items():
        for array, element in ((a, e) for a in arrays for e in queue.live(a)):
            with suppress(ValueError):  # of a Slurm that says no time
                began = datetime.fromisoformat(element.began).timestamp()
                signs = [told[f"{name}-{i}"] for i in array.chunks_of(element.index)]
                if element.state == RUNNING and max(began, *signs) < now - SILENT:
                    found[f"{element.job_id}_{element.index}"] = element.node
    return found


def counts(queue: Queue | None, without: Collection[str] = ()) -> tuple[int, int]:
    """The run's tasks that run and that wait; none where Slurm was not asked.

    Args:
        without: elements that do not count, as `job_index`.
    """
    found = [0, 0]
    for array in queue.arrays if queue else ():
        for element in queue.live(array) if queue else ():
            if f"{element.job_id}_{element.index}" not in without:
                found[element.state in (PENDING, REQUEUED)] += array.tasks_per_node
    return found[0], found[1]


def has_arrays(run: RunDir) -> bool:
    """Whether array tasks of the run were ever submitted."""
    return any(submission.arrays.exists() for submission in run.submissions())


def rounds_of(run: RunDir) -> Array:
    """The rounds of a run that goes on by itself, as `Queue` finds them."""
    return Array(f"d2m-{token(run.root)}-next", 0, 0)


def live_rounds(run: RunDir, patience: float = 0.0) -> set[str]:
    """The job ids of a run's rounds that are pending or running; asks squeue as `queue` does."""
    return {element.job_id for element in queue(run, patience).live(rounds_of(run))}


def write_arrays(submission: Submission, arrays: Sequence[Array]) -> None:
    atomic_write(submission.arrays, json.dumps([asdict(a) for a in arrays]).encode())
