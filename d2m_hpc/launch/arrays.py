"""The Slurm back end: propose, submit, count, wait for and cancel a run's array tasks."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

from d2m_hpc.config import Config
from d2m_hpc.errors import SlurmError
from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.launch import ended, live, sbatch, sizes, slurm, waiting
from d2m_hpc.launch.commands import AWAY, ask, wait_for_next_look
from d2m_hpc.launch.flow import Backend
from d2m_hpc.plan import balance
from d2m_hpc.plan.decide import Decision, decide
from d2m_hpc.plan.standing import standings
from d2m_hpc.plan.workload import Workload
from d2m_hpc.run import nodes
from d2m_hpc.run.chunks import Chunks
from d2m_hpc.run.folder import RunDir, Submission
from d2m_hpc.run.records import Job
from d2m_hpc.run.tasks import attempts
from d2m_hpc.run.user import user_name
from d2m_hpc.storage.texts import counted

PATIENCE = 900.0
"""Seconds without an answer before `wait` gives up; a controller may restart meanwhile."""
PATIENCE_OF_A_SUBMIT = 120.0
"""Seconds for which a submit waits for a controller that is away."""
STUCK_SECONDS = 10.0
"""Seconds in which no task can start before `wait` gives up: some reasons pass by themselves."""

LEFT = (
    "every shard is done, so what Slurm has listed without a change for minutes is not waited for: "
    "%d elements (%s, ...); `d2m cancel` or scancel ends them"
)

log = logging.getLogger(__name__)


class _Arrays(Backend):
    """A back end that divides a decision into job arrays.

    Attributes:
        arrays: the job arrays, each with its job id once submitted.
    """

    def __init__(self) -> None:
        self.arrays: list[slurm.Array] = []

    def chunks(self, decision: Decision, submission: Submission) -> Iterable[list[Job]]:
        self._proposal = proposal = propose(decision, submission.name)
        self.arrays = proposal.arrays
        return _chunks(proposal, decision.workload.config.slurm.tasks_per_node)

    def finish(self) -> None:
        """Do nothing: array tasks run by themselves."""

    def _command(self, workload: Workload, submission: Submission, array: slurm.Array) -> list[str]:
        config = workload.config.slurm
        return sbatch.prepared(workload.run, submission, config, array, self._proposal)


def _chunks(proposal: slurm.Proposal, tasks_per_node: int) -> Iterator[list[Job]]:
    """The chunk of each task; ranks without one, before the next part's first element, have an
    empty one."""
    for part in proposal.parts:
        for group in part.groups:
            yield from balance.balanced(group, proposal.most)
        yield from ([] for _ in range(-part.tasks % tasks_per_node))


class SlurmArrays(_Arrays):
    """Array tasks that sbatch starts; raises `SlurmError` where there is no Slurm."""

    def __init__(self) -> None:
        super().__init__()
        if not slurm.is_here():
            raise SlurmError("there is no sbatch here; go to a login node, or run with --local")

    def look(self, workload: Workload) -> Decision:
        """Decide by Slurm's word; raise `SlurmError` without it, as live tasks look like dead
        ones.

        Live tasks follow the config's `max_parallel`, and the nodes that are to be left out now.
        """
        queue = slurm.queue(workload.run, PATIENCE_OF_A_SUBMIT)
        decision = look(workload, queue)
        decision.notices += live.follow(workload, queue, _excluded(decision))
        return decision

    def start(self, decision: Decision, submission: Submission) -> AbstractContextManager[None]:
        """Submit the arrays; raise `SlurmError` where sbatch refuses, with earlier arrays on
        record."""
        # First without job ids: a job whose id is never recorded is found by its array's name.
        slurm.write_arrays(submission, self.arrays)
        workload = decision.workload
        for taken, array in enumerate(self.arrays):
            try:
                array.job_id = sbatch.submit(self._command(workload, submission, array))
            except SlurmError as error:
                if not taken:
                    raise
                part = f"Slurm took {taken} of {len(self.arrays)} arrays, which go on"
                raise SlurmError(f"{error}; {part}") from None
            slurm.write_arrays(submission, self.arrays)
        return nullcontext()


class ByHand(_Arrays):
    """Array tasks that the user starts.

    Attributes:
        commands: an sbatch command for each array.
    """

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[str] = []

    def look(self, workload: Workload) -> Decision:
        return look(workload)

    def start(self, decision: Decision, submission: Submission) -> AbstractContextManager[None]:
        slurm.write_arrays(submission, self.arrays)
        commands = (self._command(decision.workload, submission, a) for a in self.arrays)
        self.commands = [*map(shlex.join, commands)]
        return nullcontext()


def look(workload: Workload, queue: slurm.Queue | None = None) -> Decision:
    """Decide; ask Slurm about live tasks where any were ever submitted and Slurm is here."""
    run = workload.run
    queue = queue or _queue_of(run)
    if queue is None:
        return decide(workload)
    decision = decide(workload, in_flight(run, queue))
    decision.notices += map(str, waiting.why(queue, queue.arrays))
    if len(decision.done) < len(decision.shards):
        ends = ended.find(run, queue, attempts(run), decision.done.__contains__)
        decision.notices += map(str, ended.told(ends, workload.config.slurm))
        decision.raised = sizes.raised(run, workload.config.slurm, ends, decision.starved)
        decision.notices += sizes.told(decision.raised)
    return decision


def live_stems(run: RunDir) -> set[str]:
    """The stems of shards with live array tasks."""
    queue = _queue_of(run)
    return in_flight(run, queue) if queue else set()


def _queue_of(run: RunDir) -> slurm.Queue | None:
    """The queue of a run; None where no array tasks were submitted, or Slurm is not here."""
    return slurm.queue(run) if slurm.is_here() and slurm.has_arrays(run) else None


def in_flight(run: RunDir, queue: slurm.Queue) -> set[str]:
    """The stems of shards in the chunks of live array tasks."""
    stems: set[str] = set()
    for name, arrays in queue.submitted.items():
        for array in arrays:
            if elements := queue.elements(array):
                chunks = (i for e in elements for i in array.chunks_of(e))
                stems |= _stems(run.submission(name), chunks)
    return stems


def _stems(submission: Submission, numbers: Iterable[int]) -> set[str]:
    """The stems in some chunks; an array's last element may have fewer chunks than ranks."""
    chunks = Chunks(submission)
    count = len(chunks)
    return {s.stem for chunk in chunks.read(i for i in numbers if i < count) for s in chunk}


@gc_paused()
def propose(decision: Decision, submission: str) -> slurm.Proposal:
    """The arrays that a submit would make; asks Slurm only for sizes and nodes."""
    workload, config = decision.workload, decision.workload.config
    options = sbatch.options(config.slurm, _excluded(decision))
    most = sizes.shards_per_task(decision)
    parts = sizes.parts(decision, most, options)
    most = min(most, max(len(group) for part in parts for group in part.groups))
    arrays = slurm.split(
        [(part.tasks, part.need) for part in parts],
        slurm.max_array_size(),
        config.slurm.tasks_per_node,
        config.slurm.max_parallel,
        f"d2m-{slurm.token(workload.run.root)}-{submission}",
        sbatch.kinds(config.slurm),
    )
    return slurm.Proposal(parts, most, arrays, options, config.max_node_failures)


def _excluded(decision: Decision) -> list[str]:
    """The nodes that fail tasks, of those that the cluster has."""
    run, most = decision.workload.run, decision.workload.config.max_node_failures
    if not any(run.node_failures.glob("*.json")):
        return []
    return nodes.to_exclude(run, decision.last_finished, most, slurm.node_names())


def live_jobs(run: RunDir) -> list[str]:
    """`job_index` of every pending or running array task of a run."""
    queue = slurm.queue(run)
    found = (e for array in queue.arrays for e in queue.live(array))
    return [f"{e.job_id}_{e.index}" for e in found]


def cancel(run: RunDir) -> int:
    """Cancel a run's array tasks, array by array; return their number.

    Raises:
        SlurmError: scancel failed, as at another user's tasks, and tasks are still there.
    """
    try:
        return _cancel(run)
    except SlurmError as error:
        if AWAY.search(str(error)):
            what = "once slurmctld answers, cancel again: array tasks go on without it"
            raise SlurmError(f"{error}; {what}") from None
        raise


def _cancel(run: RunDir) -> int:
    # First the round that waits for the tasks to end, and then submits again.
    rounds = sorted(slurm.live_rounds(run))
    elements = live_jobs(run)
    jobs = list(dict.fromkeys(job.partition("_")[0] for job in elements))
    try:
        slurm.cancel(rounds)
        slurm.cancel(jobs)
    except SlurmError as error:
        if left := [*slurm.live_rounds(run), *live_jobs(run)]:  # else they ended meanwhile
            raise SlurmError(f"{error}; {_whose(left)}") from None
    return len(elements)


def _whose(left: list[str]) -> str:
    """The users of array tasks that cannot be cancelled, and what these users can do."""
    jobs = ",".join(list(dict.fromkeys(job.partition("_")[0] for job in left))[: slurm.AT_ONCE])
    try:
        users = sorted({*ask("squeue", "--noheader", f"--jobs={jobs}", "--format=%u").split()})
    except SlurmError:
        users = []
    others = [user for user in users if user != user_name()]
    if not others:
        return f"{counted(len(left), 'array task is', 'array tasks are')} still there"
    whose = ", ".join(others)
    there = counted(len(left), f"array task of {whose} is", f"array tasks of {whose} are")
    return (
        f"{there} still there: their user or an "
        f"operator of Slurm may `scancel {jobs}`, and you may not"
    )


def wait(run: RunDir, config: Config) -> None:
    """Wait until no array task of the run is pending or running, and no round of `--until-done`.

    Raises:
        SlurmError: no remaining task can start, or squeue has failed for minutes.
    """
    if slurm.has_arrays(run):  # else of `--local` submits alone: Slurm need not be there
        wait_for(run, lambda: standings(run, config).is_complete)


def wait_for(
    run: RunDir,
    is_complete: Callable[[], bool],
    known: Mapping[str, list[slurm.Array]] | None = None,
) -> None:
    """Wait as `wait` does, or for some arrays alone.

    A slurmctld that died may call tasks running that are gone. So the wait also ends where all is
    done and Slurm's list has not changed for minutes; a warning names what it lists. Where not all
    is done, it names the tasks that have told nothing meanwhile.
    """
    began = heard = moved = changed = time.monotonic()
    before: list[slurm.Element] = []
    silent: dict[str, str] = {}
    while True:
        try:
            queue = slurm.queue(run, known=known)
            arrays = queue.arrays if known else [*queue.arrays, slurm.rounds_of(run)]
            if not (found := [e for array in arrays for e in queue.live(array)]):
                return
            heard = time.monotonic()
            if found != before:
                before, changed = found, heard
            elif heard - changed > slurm.SILENT:
                if is_complete():
                    log.warning(LEFT, len(found), f"{found[0].job_id}_{found[0].index}")
                    return
                changed, earlier = heard, silent
                silent = {} if known else slurm.silent(queue, attempts(run))
                if silent and silent != earlier:
                    log.warning("%s", waiting.silence(silent))
            if not (reasons := waiting.stuck(queue, arrays)):
                moved = heard
            elif heard - moved > STUCK_SECONDS:
                raise waiting.Stuck(reasons)
        except waiting.Stuck:
            raise
        except SlurmError:
            if time.monotonic() - heard > PATIENCE:
                raise
        wait_for_next_look(began)
