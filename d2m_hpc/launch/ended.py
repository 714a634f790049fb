"""Tell which array tasks ended before their shards were finished, why, and what helps."""

from __future__ import annotations

import os
import pwd
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from d2m_hpc.config import Slurm
from d2m_hpc.config.slurm_values import minutes
from d2m_hpc.errors import ConfigError, SlurmError
from d2m_hpc.launch.commands import ask
from d2m_hpc.launch.slurm import AT_ONCE, COMPLETING, REST, Array, Queue, read_arrays
from d2m_hpc.plan import memory
from d2m_hpc.run.chunks import Chunks
from d2m_hpc.run.folder import RunDir, Submission
from d2m_hpc.run.tasks import Progress
from d2m_hpc.storage.texts import counted, safe

TAIL = 4096
"""Bytes of a log's end that are read."""
LINES = 8
SAID = 300
"""Characters of a log's last words: a path and what is wrong with it."""
LOGS = 200
"""Tasks whose logs are read; those of more are told by Slurm's word alone."""
SACCT_SECONDS = 60
"""The least time between two calls of sacct by one process."""
NEAR = 0.9
"""The share of its memory from which a killed task counts as killed for it."""
DEFINITE = r"TIMEOUT|DEADLINE|NODE_FAIL|BOOT_FAIL|PREEMPTED|CANCELLED"
"""States that tell the cause, whatever the logs say."""
WARNING = re.compile(r"warning: |\S+ \S+ WARNING ")
"""The beginning of a line that tells no end."""
MISTAKES = re.compile(r"\d mistakes?$")
"""The end of a line whose mistakes stand on the next ones."""
SETUP = re.compile(r"setup line \d+ failed")
HEARSAY = re.compile(rf"Exited with exit code|node \S+ is left out |{SETUP.pattern}$")
"""Lines of the batch script that say less than those before."""
NOTHING_LEFT = "no shard is left for this task"

MEMORY, WALLTIME, KILLED, UNKNOWN = "memory", "walltime", "killed", "unknown"
NOT_LAUNCHED = "not launched"
MEANINGS = {
    MEMORY: (
        r"OUT_OF_MEMORY|OutOfMemory|oom.?kill|memory limit|SIGKILL, out of memory",
        "out of memory",
        "raise slurm.mem, or set slurm.max_mem",
    ),
    WALLTIME: (
        r"TIMEOUT|DEADLINE|DUE TO TIME LIMIT|no shard was finished in this walltime",
        "out of walltime",
        "raise slurm.time, or set slurm.max_time",
    ),
    "node": (
        r"NODE_FAIL|BOOT_FAIL|DUE TO NODE FAILURE|Node failure",
        "their node was lost",
        "`sinfo -R` says whether it is back",
    ),
    "preempted": (r"PREEMPTED|DUE TO PREEMPTION", "preempted", "set slurm.requeue: true"),
    NOT_LAUNCHED: (
        r"signal 53\b",
        "Slurm could not start their script",
        "see that each node reaches the run folder, and may write there",
    ),
    "not begun": (
        r"(?i)exit code (4|126|127)\b|execve\(\)|can't open file|No module named|command not found|"
        r"setup line \d+ failed",
        "they did not begin",
        "mend what their log names",
    ),
    "cancelled": (r"CANCELLED", "cancelled", ""),
    KILLED: (
        r": Killed|signal 9|exit code 137|JobLaunchFailure",
        "killed by SIGKILL, as by an administrator or where memory runs out",
        "raise slurm.mem if they grow",
    ),
    "stopped": (
        r"exit code (138|143)\b|User defined signal",
        "told to stop by a signal",
        "",
    ),
    "crashed": (r"RaisedSignal|signal \d+|Aborted|Segmentation", "killed by a signal", ""),
    "failed": (r"FAILED|[Ee]xit code|error:", "by an error", "mend what their log names"),
    UNKNOWN: (r"", "Slurm does not remember how", ""),
}
"""By a cause's name: words of Slurm or of a log, what they mean, and what helps; the first that
fits."""


TAKEN = {"node", "preempted", "cancelled", "stopped"}
"""Causes that lie in no task: another one may come through."""


@dataclass(frozen=True)
class End:
    """The end of an array element that left shards of its chunks.

    Attributes:
        task: `job_index`, as Slurm and `d2m logs --task` name it.
        chunks: the numbers of its chunks with such shards.
        stems: these shards.
        took, of: the most memory of its tasks and their limit in bytes; 0 where not known.
        by: the number of the user who cancelled it; empty where not known.
    """

    submission: Submission
    array: Array
    index: int
    chunks: tuple[int, ...]
    stems: frozenset[str]
    state: str = ""
    node: str = ""
    took: int = 0
    of: int = 0
    by: str = ""
    cause: str = UNKNOWN
    said: str = ""

    @property
    def task(self) -> str:
        return f"{self.array.job_id or self.array.name}_{self.index}"


@dataclass(frozen=True)
class Ended:
    """Array tasks that left shards, all for one cause.

    Attributes:
        cause: the key of `MEANINGS`.
        tasks: `job_index` of each.
        shards: the number of shards that they left.
        help: what helps; may be empty.
        said: the last words of the first one's log.
    """

    cause: str
    tasks: list[str]
    shards: int
    what: str
    help: str
    said: str

    def __str__(self) -> str:
        tasks, shards = counted(len(self.tasks), "array task"), counted(self.shards, "shard")
        help_ = f"; {self.help}" if self.help else ""
        log = f"; `d2m logs CONFIG --task {self.tasks[0]}`: {self.said}" if self.said else ""
        return f"{tasks} ended with {shards} left ({self.what}){help_}{log}"


def told(ends: Iterable[End], config: Slurm) -> list[Ended]:
    """Group ends by cause, those of most tasks first; what helps is by the config."""
    groups: dict[str, list[End]] = defaultdict(list)
    for end in ends:
        groups[end.cause].append(end)
    found = [_group(cause, group, config) for cause, group in groups.items()]
    return sorted(found, key=lambda e: -len(e.tasks))


def _group(cause: str, ends: list[End], config: Slurm) -> Ended:
    _, what, help_ = MEANINGS[cause]
    help_ = _bounded(cause, ends, config) or help_
    most = max(ends, key=lambda e: e.took)
    if cause == MEMORY and most.took and most.of:
        what += f", {most.took / 1e9:.1f} GB of {most.of / 1e9:.1f} GB"
    if cause == "cancelled" and (by := next((e.by for e in ends if e.by), "")):
        with suppress(KeyError, ValueError):  # a user of another machine
            what += f" by {pwd.getpwuid(int(by)).pw_name}"
    nodes = sorted({e.node for e in ends if e.node})
    if nodes and cause in ("node", NOT_LAUNCHED, "not begun", KILLED):
        what += f", on {', '.join(nodes[:3])}{', ...' if nodes[3:] else ''}"
    ends = sorted(ends, key=lambda e: not e.said)
    shards = len(frozenset[str]().union(*(e.stems for e in ends)))
    return Ended(cause, [e.task for e in ends], shards, what, help_, ends[0].said)


def _bounded(cause: str, ends: Iterable[End], config: Slurm) -> str:
    """What helps where submits double what was too little, up to a bound; empty elsewhere."""
    if cause == MEMORY and config.max_mem:
        had = [memory.given(e.array.mem) if e.array.mem else e.of for e in ends]
        name, most, raised = "mem", memory.given(config.max_mem), "raise it, or lower batch_size"
    elif cause == WALLTIME and config.max_time:
        had = [minutes(e.array.time) if e.array.time else 0 for e in ends]
        name, most, raised = "time", minutes(config.max_time), "raise it"
    else:
        return ""
    if not any(had):  # the config did not say, and a cluster's own value is not known
        return f"set slurm.{name}, which submits double up to slurm.max_{name}"
    if max(had) >= most:
        return f"slurm.max_{name} is reached: {raised}"
    return f"a submit doubles slurm.{name} for them, up to slurm.max_{name}"


def find(
    run: RunDir, queue: Queue, tasks: Iterable[Progress], is_done: Callable[[str], bool]
) -> list[End]:
    """Find the elements of the newest submission that ended and left shards.

    All that an earlier submission left is in the newest one, or in the hands of live tasks. One
    without arrays, of a submit for which no shard was left, does not count.

    Args:
        tasks: the attempts of the run's tasks.
    """
    submission = next((s for s in reversed(run.submissions()) if s.arrays.exists()), None)
    if submission is None:
        return []
    arrays, newest = queue.submitted[submission.name], dict[int, Progress]()
    for task in tasks:
        name, index, _ = task.task.split("-")
        if name == submission.name and task.started >= newest.get(int(index), task).started:
            newest[int(index)] = task
    gone = [end for array in arrays for end in _gone(submission, array, queue, newest)]
    left = _accounted([*_with_stems(submission, gone, newest, is_done)])
    read = (_read(run, end) if i < LOGS else _judged(end, []) for i, end in enumerate(left))
    return [end for end in read if end.state != "COMPLETED" and end.said != NOTHING_LEFT]


def _gone(
    submission: Submission, array: Array, queue: Queue, newest: dict[int, Progress]
) -> Iterator[End]:
    """The elements of an array that are over, with those chunks that they did not finish."""
    known = {e.index: e for e in queue.of(array)}
    if not array.job_id and not known:  # never started, or by hand on another cluster
        return
    skipped = {e.index for e in queue.live(array)}
    skipped |= {i for i, e in known.items() if e.state in (COMPLETING, "COMPLETED")}
    for index in range(array.elements):
        chunks = array.chunks_of(index)
        open_ = tuple(c for c in chunks if c not in newest or newest[c].state != "finished")
        if index not in skipped and open_:
            seen = known.get(index, known.get(REST))
            state = f"{seen.state} {seen.reason}" if seen else ""
            node = seen.node if seen else ""
            yield End(submission, array, index, open_, frozenset(), state, node)


def _with_stems(
    submission: Submission,
    gone: list[End],
    newest: dict[int, Progress],
    is_done: Callable[[str], bool],
) -> Iterator[End]:
    """Those ends that left shards: of their own chunks, or one that they took from others."""
    chunks = Chunks(submission)
    failed = submission.failed("")
    failed_stems = {p.name for p in failed.iterdir()} if failed.is_dir() else set()
    numbers = [n for end in gone for n in end.chunks if n < len(chunks)]
    jobs = dict(zip(numbers, chunks.read(numbers), strict=True))
    for end in gone:
        stems = {job.stem for n in end.chunks for job in jobs.get(n, ())}
        stems |= {newest[n].shard for n in end.chunks if n in newest and newest[n].shard}
        if left := {s for s in stems if s not in failed_stems and not is_done(s)}:
            yield replace(end, stems=frozenset(left))


def _accounted(ends: Sequence[End]) -> list[End]:
    """With the states, nodes and memory that sacct has, where there is accounting."""
    ids = tuple(e.task for e in ends if e.array.job_id)[:AT_ONCE]
    known = _sacct(ids, int(time.monotonic() // SACCT_SECONDS)) if ids else {}
    return [_with_account(end, known.get(end.task, {})) for end in ends]


def _with_account(end: End, said: dict[str, str]) -> End:
    if not said:
        return end
    took, of = _bytes(said["MaxRSS"]), _bytes(said["ReqMem"])
    state = said["State"].partition(" ")[0]
    if state == "COMPLETED":
        return replace(end, state=state)
    signal = max(int(code.partition(":")[2] or 0) for code in said["codes"].split())
    told = f"{end.state} {state} " + (f"signal {signal}" if signal else "")
    if took and of and (took > of or (signal == 9 and took > NEAR * of)):
        told += " memory limit"
    by = said["State"].partition(" by ")[2]
    return replace(end, state=told, node=said["NodeList"] or end.node, took=took, of=of, by=by)


FIELDS = ("JobID", "State", "ExitCode", "DerivedExitCode", "MaxRSS", "ReqMem", "NodeList")


@lru_cache(maxsize=1)
def _sacct(ids: tuple[str, ...], minute: int) -> dict[str, dict[str, str]]:
    """sacct's fields of array elements, with the most memory of their steps; empty without
    accounting."""
    words = ("--noheader", "--parsable2", f"--jobs={','.join(ids)}", f"--format={','.join(FIELDS)}")
    try:
        return parse_sacct(ask("sacct", *words))
    except SlurmError:
        return {}


def parse_sacct(shown: str) -> dict[str, dict[str, str]]:
    """Parse sacct's lines: one for an element, then one for each of its steps."""
    found: dict[str, dict[str, str]] = {}
    rows = (line.split("|") for line in shown.splitlines() if line.count("|") == len(FIELDS) - 1)
    for row in rows:
        values = dict(zip(FIELDS, row, strict=True))
        task, _, step = values["JobID"].partition(".")
        values["codes"] = f"{values['ExitCode']} {values['DerivedExitCode']}"
        seen = found.setdefault(task, values)
        if step and _bytes(values["MaxRSS"]) > _bytes(seen["MaxRSS"]):
            seen["MaxRSS"] = values["MaxRSS"]
    return found


def _bytes(text: str) -> int:
    """A number of bytes such as `423028K` or `4G`; 0 for others, such as `2Gc`, by the core."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)n?", text)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else 0


def _read(run: RunDir, end: End) -> End:
    """With a cause, by Slurm's word and the ends of its logs, and with their last words."""
    paths = [run.logs / f"slurm-{end.task}.out"]
    paths += [run.log_of(end.submission.name, chunk) for chunk in end.chunks]
    batch, *tasks = ([*_tail(path)] for path in paths)
    own = [line for lines in tasks for line in lines]
    if "JobLaunchFailure" in end.state and not paths[0].exists():
        return replace(end, cause=NOT_LAUNCHED)  # a script that is killed has its output file
    plain = [line for line in batch if not HEARSAY.search(line)]
    lines = (own, plain) if plain and not own else (own, plain, batch)
    errors = (s[i : i + 2] for s in lines for i in reversed(range(len(s))) if "error: " in s[i])
    first, *rest = next(errors, [] if own else plain[-1:]) or [""]
    if setup := next(filter(SETUP.fullmatch, batch), ""):
        first, rest = "; ".join([*plain[-1:], setup]), []
    said = "; ".join([first, *rest] if MISTAKES.search(first) else [first]).removeprefix("error: ")
    if own and own[-1] == NOTHING_LEFT:
        said = NOTHING_LEFT
    return _judged(replace(end, said=safe(said, SAID)), [*own, *batch])


def _judged(end: End, lines: list[str]) -> End:
    story = "\n".join([end.state, *lines])
    if not re.search(MEANINGS[MEMORY][0], story) and re.search(DEFINITE, end.state):
        story = end.state
    cause = next(name for name, (words, *_) in MEANINGS.items() if re.search(words, story))
    return replace(end, cause=cause)


def _tail(path: Path) -> Iterator[str]:
    """The last lines of a log without warnings; none where it is missing."""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        lines = file.read().decode(errors="replace").splitlines()
        said = (line.strip() for line in lines)
        yield from [line for line in said if line and not WARNING.match(line)][-LINES:]


def logs(run: RunDir, task: str) -> list[Path]:
    """The log of an array element's batch script, and those of its tasks.

    Args:
        task: `job_index`, as Slurm names the element.

    Raises:
        ConfigError: no array of the run has such an element, or it has written no log.
    """
    job, _, index = task.rpartition("_")
    for submission in run.submissions() if index.isdecimal() else ():
        for array in read_arrays(submission):
            if job in (array.job_id, array.name):
                chunks = array.chunks_of(int(index))
                paths = [run.logs / f"slurm-{task}.out"]
                paths += [run.log_of(submission.name, chunk) for chunk in chunks]
                if found := [path for path in paths if path.exists()]:
                    return found
    what = f"no array task {task!r} of this run has a log; `squeue` and `d2m status` name them"
    raise ConfigError(str(run.root), [what])
