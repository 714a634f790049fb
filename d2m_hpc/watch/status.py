"""Summarise a run from its run folder and from squeue."""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

from d2m_hpc.config import Config, glance
from d2m_hpc.errors import ConfigError, SlurmError, TruncatedShard
from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.launch import ended, slurm
from d2m_hpc.launch.ended import Ended
from d2m_hpc.launch.waiting import Waiting, why
from d2m_hpc.plan import changed
from d2m_hpc.plan.changed import Changed
from d2m_hpc.plan.standing import Standings, standings
from d2m_hpc.plan.workload import run_dir
from d2m_hpc.run import nodes, rounds
from d2m_hpc.run.attempts import Attempts
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest, Outcome
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.shards import read_some
from d2m_hpc.run.tasks import Progress, attempts, log_file
from d2m_hpc.storage.texts import ERROR, safe
from d2m_hpc.storage.urls import is_local
from d2m_hpc.watch import eta, spent
from d2m_hpc.watch.spent import Limits, Spent

NOTICES = 20
"""Kinds of notices that are shown; each tar may have another."""
_WORD = re.compile(r"'[^']*'|[^\s']+")


@dataclass
class Failure:
    """Shards that failed for reasons of one kind, with one shard's message and log file."""

    kind: str
    error: str
    shards: list[str]
    log: str = ""


@dataclass
class Summary:
    """A run in figures.

    Attributes:
        done: shards that have all that the last submit asked for, but for derived columns.
        underived: done shards that lack derived columns which could not be computed.
        recomputed: rows that were computed again in float32.
        eta_seconds: None where no task runs, or none has finished a shard yet.
        spent: hours of tasks, by what became of them.
        limits: whether the tasks wait for samples, or for their GPU.
        hardware: tasks by a GPU's model, or `CPU`.
        tasks: array elements by Slurm's state; empty where Slurm does not answer.
        lost: tasks that said they work, and do not by Slurm's word.
        silent: the node of each array element that runs and has told nothing for minutes.
        working: tasks at work; without one, `samples_per_second` is the mean over the time in
            which any task worked on a shard that is done.
        outdated: shards that have all that an earlier submit asked for; also counted as pending,
            running or failed.
        removed: shards that are done on record, without their parquet; counted likewise.
        given_up: failed shards that the next submit leaves out.
        waiting: reasons why array elements do not run.
        ended: causes for which array elements ended before their shards were done.
        unasked: why Slurm could not be asked.
        odd: paths of folders, pipes and devices in the place of parquets.
        changed: shards whose tars have changed, of the tars that were checked.
        notices: done shards by their notices, such as on members that are no samples.
        rounds: how far a run is that goes on by itself; empty for others.
        goes_on: whether another round follows.
    """

    run_dir: str
    output: str
    shards: int
    done: int
    failed: int
    pending: int
    running: int
    rows: int
    rejected: int
    recomputed: int
    samples_per_second: float
    eta_seconds: float | None
    gpu_hours: float = 0.0
    spent: Spent = field(default_factory=Spent)
    limits: Limits = field(default_factory=Limits)
    hardware: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)
    working: int = 0
    stragglers: list[str] = field(default_factory=list)
    broken_nodes: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    rejections: dict[str, int] = field(default_factory=dict)
    outdated: int = 0
    removed: int = 0
    given_up: int = 0
    underived: int = 0
    waiting: list[Waiting] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    unasked: str = ""
    odd: list[str] = field(default_factory=list)
    changed: Changed | None = None
    notices: dict[str, int] = field(default_factory=dict)
    rounds: str = ""
    goes_on: bool = False

    @property
    def complete(self) -> bool:
        return self.done == self.shards

    @property
    def state(self) -> str:
        """One word: complete, running, failed (no shard is left to try) or pending."""
        if self.complete:
            return "complete"
        if self.running or self.tasks.get("running"):  # one that starts has no shard in hand yet
            return "running"
        return "pending" if self.pending else "failed"

    @property
    def is_alive(self) -> bool:
        """Whether a task works on the run or will, as far as can be known."""
        over = {state.lower() for state in slurm.OVER}
        return bool(self.running or self.unasked or self.goes_on or self.tasks.keys() - over)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_run(path: Path) -> tuple[RunDir, Config]:
    """The run of a config file or of a run folder.

    Needs no custom file, and no config that is valid beyond the place of its run.

    Raises:
        ConfigError: there is no such run.
    """
    run = RunDir(path.absolute()) if path.is_dir() else run_dir(glance(path))
    if not run.config.exists():
        raise ConfigError(
            str(path), [f"there is no run in {run.root}; start one with `d2m-submit CONFIG`"]
        )
    config = glance(run.config, frozen=True)
    if config.run_dir is None and is_local(config.output_metadata_dir):
        # The run lies beside its outputs, and may have been moved with them.
        config = config.model_copy(update={"output_metadata_dir": str(run.root.parent)})
    return run, config


@gc_paused()
def look(run: RunDir, config: Config, offline: bool = False) -> Summary:
    """Summarise a run and check some tars for changes, which asks their file server.

    Args:
        offline: ask neither the tars' file server nor Slurm.
    """
    # Before other large lists are in memory.
    asks = run.shards.exists() and not offline
    some = read_some(run.shards, changed.LOOKED_AT) if asks else []
    manifest = Manifest.load(run)
    found = standings(run, config, manifest)
    summary = summarise(run, config, manifest, found, offline)
    summary.changed = changed.among(some, config, found) if asks else None
    return summary


@gc_paused()
def summarise(
    run: RunDir,
    config: Config,
    manifest: Manifest | None = None,
    found: Standings | None = None,
    offline: bool = False,
) -> Summary:
    """Read records, leases and progress files, and list the outputs.

    Args:
        manifest: the run's records, if read already.
        found: where the shards stand, if known already.
        offline: do not ask Slurm.
    """
    manifest = manifest or Manifest.load(run)
    found = found or standings(run, config, manifest)
    stems, done, failed = found.stems, list(found.done.values()), found.failed
    tries, useful = failed | found.underived, chain(done, manifest.underived.values())
    queue, unasked = _asked(run, offline)
    tasks, at_work = _tasks(run, queue)
    running, silent = _running(run, config, found, tasks, at_work), slurm.silent(queue, tasks)
    pending = len(stems) - len(done) - len(failed) - len(running - failed.keys())
    pair = done, [*manifest.computed(found.done).values()]
    return Summary(
        run_dir=str(run.root),
        output=config.output_metadata_dir,
        shards=len(stems),
        done=len(done),
        failed=len(failed.keys() - running),
        pending=pending,
        running=len(running),
        **_made(done),
        **_pace(tasks, pair, pending + len(running), config.steal, slurm.counts(queue, silent)),
        **_ran_on(tasks),
        spent=spent.account(tasks, useful, chain.from_iterable(tries.values())),
        **_queued(run, queue, tasks),
        silent=silent,
        unasked=unasked,
        ended=_ended(run, config, found, queue, tasks),
        stragglers=_stragglers([t for t in tasks if t.is_active]),
        broken_nodes=nodes.broken(run, manifest),
        failures=_grouped(run, tries),
        odd=[OutputDir(config.output_metadata_dir).path(f"{s}.parquet") for s in found.odd],
        **_rare(found),
    )


def _rare(found: Standings) -> dict[str, Any]:
    """Counts of shards that most runs do not have."""
    names = ("outdated", "removed", "given_up", "underived")
    return {name: len(getattr(found, name)) for name in names}


def _made(done: list[Outcome]) -> dict[str, Any]:
    """What the done shards' records count."""
    rejections = _by_reason(done)
    return {
        "rows": sum(map(attrgetter("rows"), done)),
        "rejected": sum(rejections.values()),
        "rejections": rejections,
        "recomputed": sum(map(attrgetter("recomputed"), done)),
        "notices": noticed(done),
    }


def _tasks(run: RunDir, queue: slurm.Queue | None) -> tuple[list[Progress], dict[str, set[int]]]:
    """The tasks, and which ones are at work by Slurm's word; others that said so are lost."""
    tasks, at_work = attempts(run), slurm.at_work(queue) if queue else {}
    for task in tasks:
        if task.state == "running" and not _may_work(task.task, at_work):
            task.state = "lost"
    return tasks, at_work


def _may_work(task: str, at_work: dict[str, set[int]]) -> bool:
    """Whether a task is at work by Slurm's word, or none that Slurm knows of."""
    submission, index, _ = task.split("-")
    return submission not in at_work or int(index) in at_work[submission]


def _ended(
    run: RunDir, config: Config, found: Standings, queue: slurm.Queue | None, tasks: list[Progress]
) -> list[Ended]:
    """Why tasks left shards; nothing where none is left, or Slurm was not asked."""
    if found.is_complete or not queue:
        return []
    return ended.told(ended.find(run, queue, tasks, found.has_all), config.slurm)


def _running(
    run: RunDir,
    config: Config,
    found: Standings,
    tasks: list[Progress],
    at_work: dict[str, set[int]],
) -> set[str]:
    """Shards that are not done, with a recent heartbeat of their lease by a task at work.

    This is for display alone: a reader whose clock is off by minutes is shown too many or too few,
    and tasks do not look at it.
    """
    oldest = time.time() - config.lease_seconds
    paths = run.leases.glob("*.lock") if run.leases.is_dir() else ()
    held = {p.stem for p in paths if _mtime(p) > oldest} - found.done.keys()
    held = held.intersection(found.stems) if held else held
    if not any(t.state == "lost" and t.updated > oldest for t in tasks):
        return held
    last = Attempts(run.attempts).last
    by = {stem: attempt.task for stem in held if (attempt := last(stem)) and attempt.task}
    return {stem for stem in held if stem not in by or _may_work(by[stem], at_work)}


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _asked(run: RunDir, offline: bool) -> tuple[slurm.Queue | None, str]:
    """Slurm's word on a run; None without array tasks or Slurm, or with the reason why not."""
    known = {} if offline else slurm.arrays_of(run)
    if not any(known.values()) or not slurm.is_here():
        return None, ""
    try:
        return slurm.queue(run, known=known), ""
    except SlurmError as error:
        return None, str(error)


def _queued(run: RunDir, queue: slurm.Queue | None, tasks: Iterable[Progress]) -> dict[str, Any]:
    """Array elements by state, why some wait, lost tasks, and how the run goes on by itself."""
    chain = rounds.read(run)
    if queue is None:
        return {"rounds": str(chain or "")}
    elements = (e for array in queue.arrays for e in queue.of(array))
    states = dict(Counter(e.state.lower() for e in elements if e.is_listed))
    lost = [t.task for t in tasks if t.state == "lost"]
    following = slurm.rounds_of(run)
    held = [wait for wait in why(queue, [following]) if wait.never]
    goes_on = bool(chain and not chain.ended and queue.live(following) and not held)
    told = str(chain or "")
    if chain and not chain.ended and held:
        told = f"{chain}; Slurm does not start the next one"
    elif chain and not chain.ended and not goes_on:
        told = f"{chain}; no further round waits: submit again with --until-done"
    found = {"tasks": states, "lost": lost, "waiting": [*why(queue, queue.arrays), *held]}
    return {**found, "goes_on": goes_on, "rounds": told}


def _ran_on(tasks: list[Progress]) -> dict[str, Any]:
    """GPU hours, tasks by hardware, the most frequent first, and what bounds them."""
    newest = {t.lane: t.hardware for t in tasks}
    hours = sum(t.seconds for t in tasks if t.has_gpu) / 3600
    hardware = dict(Counter(newest.values()).most_common())
    return {"gpu_hours": round(hours, 3), "hardware": hardware, "limits": spent.limits(tasks)}


def _stragglers(active: list[Progress]) -> list[str]:
    """Running tasks that are less than half as far as the median."""
    shares = {t.task: t.done / max(t.shards, 1) for t in active}
    median = statistics.median(shares.values()) if len(shares) > 2 else 0.0
    return sorted(task for task, share in shares.items() if share < median / 2)


def _pace(
    tasks: list[Progress],
    made: tuple[list[Outcome], list[Outcome]],
    left: int,
    steal: bool,
    live: tuple[int, int],
) -> dict[str, Any]:
    """Samples a second, now or in the mean, and the seconds for the remaining shards.

    Args:
        made: the newest record of each shard that is done, and the one of its models.
        live: the tasks that Slurm has running and pending.
    """
    done, computed = made
    active = [t for t in tasks if t.is_active]
    speed = sum(task.speed for task in active)
    at_work = {t.task.partition("-")[0] for t in active}
    recent = [t for t in tasks if t.task.partition("-")[0] in at_work] or tasks
    seconds = eta.seconds_left(
        time.time(), recent, done, left, steal=steal, running=live[0], pending=live[1]
    )
    return {
        "working": len(active),
        "samples_per_second": round(speed or _past_speed(computed), 2),
        "eta_seconds": None if seconds is None else round(seconds, 1),
    }


def _past_speed(done: list[Outcome]) -> float:
    """Samples a second of all tasks together, over the time in which any of them worked."""
    seconds = spent.at_work(done)
    return sum(map(attrgetter("rows"), done)) / seconds if seconds > 0 else 0.0


def _grouped(run: RunDir, failed: dict[str, list[Outcome]]) -> list[Failure]:
    groups: dict[tuple[str, str], Failure] = {}
    for stem, outcomes in failed.items():
        last = outcomes[-1]
        error = safe(last.error, ERROR)  # earlier versions did not bound its length
        same = "" if last.kind == TruncatedShard.__name__ else alike(error)
        log = str(log_file(run, last.task) or "")
        group = groups.setdefault((last.kind, same), Failure(last.kind, error, [], log))
        group.shards.append(stem)
    return sorted(groups.values(), key=lambda g: -len(g.shards))


def _by_reason(done: Iterable[Outcome]) -> dict[str, int]:
    """Rejections by reason, the most frequent first."""
    counts: Counter[str] = Counter()
    for reason, count in chain.from_iterable(map(attrgetter("rejected"), done)):
        counts[reason] += count
    return dict(counts.most_common())


def alike(error: str) -> str:
    """A message without its paths, names and figures, which differ from shard to shard.

    Word by word: one pattern for the whole text takes time quadratic in a word's length.
    """
    return _WORD.sub(lambda word: "#" if re.search(r"['/\d]", word[0]) else word[0], error)


def noticed(done: Iterable[Outcome]) -> dict[str, int]:
    """Count shards by their notices, grouped by `alike`, the most frequent of `NOTICES` kinds
    first.

    Each group is shown by one of its notices.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    texts = Counter(chain.from_iterable(map(attrgetter("notices"), done)))
    for notice, count in texts.items():
        text = safe(notice)
        counts[examples.setdefault(alike(text), text)] += count
    return dict(counts.most_common(NOTICES))


def log_of(run: RunDir, stem: str) -> Path:
    """The log of the newest task that has a record of a shard, or works on it.

    Raises:
        ConfigError: no task has worked on the shard.
    """
    newest: dict[str, float] = {}
    for task in attempts(run):
        if task.shard == stem:
            newest[task.task] = task.updated
    manifest = Manifest.load(run)
    outcomes = manifest.failures.get(stem, []) + [r for r in [manifest.done.get(stem)] if r]
    newest |= {r.task: r.finished for r in outcomes}
    logs = {path: newest[task] for task in newest if (path := log_file(run, task))}
    if not logs:
        raise ConfigError(str(run.root), [f"no task has worked on shard {stem!r} yet"])
    return max(logs, key=lambda path: logs[path])
