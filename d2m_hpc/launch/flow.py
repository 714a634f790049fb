"""Do what is left: in this process, or as array tasks of Slurm."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING

import yaml

from d2m_hpc import __version__
from d2m_hpc.errors import SlurmError
from d2m_hpc.gc_paused import uncollected
from d2m_hpc.launch import sbatch, slurm, waiting
from d2m_hpc.launch.alone import submitting
from d2m_hpc.plan import balance as chunking
from d2m_hpc.plan import patterns
from d2m_hpc.plan.decide import Decision, Workload, canonical, decide
from d2m_hpc.run import fingerprints, nodes
from d2m_hpc.run.attempts import Attempts
from d2m_hpc.run.chunks import Chunks, write_chunks
from d2m_hpc.run.folder import RunDir, Submission
from d2m_hpc.run.manifest import Recorder, Shard
from d2m_hpc.run.user import user_name
from d2m_hpc.storage.files import atomic_write, is_private
from d2m_hpc.storage.lease import Lease
from d2m_hpc.storage.urls import has_secret

if TYPE_CHECKING:
    from d2m_hpc.worker.board import Board
    from d2m_hpc.worker.progress import Listener

SHARDS_PER_TASK = 16
SHORTEST_WAIT, LONGEST_WAIT = 2.0, 30.0
"""Seconds between two looks at the queue: longer for longer runs, as slurmctld serves everybody."""
PATIENCE = 900.0
"""Seconds without an answer: a controller that restarts is no reason to give up."""
STUCK_SECONDS = 10.0
"""How long nothing may be able to start before `wait` gives up: some reasons pass by themselves."""


def commit(decision: Decision, chunks: Iterable[list[Shard]]) -> Submission:
    """Write a submission to the run folder; nothing has been started yet when it returns."""
    submission = decision.workload.run.new_submission()
    write(submission, decision, chunks)
    return submission


@uncollected()
def write(submission: Submission, decision: Decision, chunks: Iterable[list[Shard]]) -> None:
    workload, run = decision.workload, decision.workload.run
    values = workload.config.model_dump(mode="json")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()
    intent = {
        "fingerprint": workload.fingerprint_id,
        "created": time.time(),
        "user": user_name(),
        "host": socket.gethostname(),
        "version": __version__,
    }
    private = has_secret(values)
    if not decision.is_planned:
        patterns.write_shards(run.shards, decision.shards, private)
    write_chunks(submission, chunks, private or is_private(run.shards))
    document = run.fingerprint(workload.fingerprint_id), canonical(workload.document)
    for path, data in ((submission.config, text), (run.config, text), document):
        atomic_write(path, data, private=private)
    atomic_write(submission.intent, json.dumps(intent).encode())


def repair(decision: Decision) -> None:
    """Put lost records back, and drop leases and attempts that killed tasks left of done shards.

    An earlier config by which all is done again, and a plan that was lost, are put on record too.
    """
    run, left = decision.workload.run, decision.pending or decision.in_flight
    as_before = decision.is_planned and (
        fingerprints.newest(run) == decision.workload.fingerprint_id
    )
    if not left and not as_before:
        commit(decision, [])
    recorder = Recorder(run.records / "rebuilt.jsonl")
    for record in decision.lost:
        recorder.append(record)
    Attempts(run.attempts).drop(decision.done)
    for path in run.leases.glob("*.lock*"):
        stem = path.name.rpartition(".lock")[0]
        if stem in decision.done:
            lease = Lease(run.lease(stem), decision.workload.config.lease_seconds)
            if lease.claim():
                if path.suffix != ".lock":  # what a kill left of a take-over
                    path.unlink(missing_ok=True)
                lease.release()


def in_flight(run: RunDir, live: slurm.Queue) -> set[str]:
    """The stems of all chunks of live array tasks."""
    stems: set[str] = set()
    for submission in run.submissions():
        for array in slurm.read_arrays(submission):
            if elements := live.elements(array):
                stems |= _stems(submission, (i for e in elements for i in array.chunks_of(e)))
    return stems


def _stems(submission: Submission, numbers: Iterable[int]) -> set[str]:
    """Of the shards in some chunks; the last element of an array may have fewer than its ranks."""
    chunks = Chunks(submission)
    count = len(chunks)
    return {s.stem for chunk in chunks.read(i for i in numbers if i < count) for s in chunk}


def live_stems(run: RunDir) -> set[str]:
    """Of shards with live array tasks; Slurm is asked only where such tasks were submitted."""
    asked = slurm.is_here() and any(s.arrays.exists() for s in run.submissions())
    return in_flight(run, slurm.queue()) if asked else set()


def look(workload: Workload, queue: slurm.Queue | None = None) -> Decision:
    """Decide, with Slurm's word where array tasks were ever submitted and it can be had."""
    run = workload.run
    if queue is None:
        if not slurm.is_here() or not any(s.arrays.exists() for s in run.submissions()):
            return decide(workload)
        queue = slurm.queue()
    decision = decide(workload, in_flight(run, queue))
    decision.notices += map(str, waiting.why(queue, slurm.all_arrays(run)))
    return decision


def run_local(
    workload: Workload,
    on_decision: Callable[[Decision], AbstractContextManager[Listener]],
    board: Board | None = None,
    left_out: Collection[str] = (),
) -> None:
    """Do all pending shards in this process: as one task, and one for each base of others.

    Args:
        on_decision: told what will be done; gives the listener to the tasks' progress.
        board: read by the process that watches this one.
        left_out: stems of shards that are not to be tried.
    """
    with ExitStack() as working:
        with submitting(workload):
            decision = look(workload)
            repair(decision)
            pending = (s for s in decision.pending if s.stem not in left_out)
            if chunks := chunking.by_base(pending):
                submission = commit(decision, chunks)
                working.enter_context(fingerprints.working(submission))
        with on_decision(decision) as listener:
            if chunks:
                _run_here(workload.run, submission, len(chunks), listener, board)


def _run_here(
    run: RunDir, submission: Submission, tasks: int, listener: Listener, board: Board | None
) -> None:
    from d2m_hpc.worker.progress import Progress
    from d2m_hpc.worker.task import run_task

    before = Progress("")
    for index in range(tasks):
        earlier = before
        task = partial(run_task, run.root, submission.name, index, local=True, board=board)
        before = task(listener=lambda now: listener(now.after(earlier))).after(before)  # noqa: B023


@uncollected()
def propose(workload: Workload, decision: Decision, submission: str) -> slurm.Proposal:
    """The arrays that a submit would make; asks Slurm only for its MaxArraySize."""
    config = workload.config
    per_task = config.shards_per_task or config.tars_per_wds or SHARDS_PER_TASK
    groups = chunking.by_base(decision.pending)
    most = min(per_task, max(map(len, groups)))
    tasks = sum(chunking.count(group, most) for group in groups)
    token = slurm.token(workload.run.root)
    arrays = slurm.split(
        tasks,
        slurm.max_array_size(),
        config.slurm.tasks_per_node,
        config.slurm.max_parallel,
        f"d2m-{token}-{submission}",
    )
    excluded = nodes.to_exclude(
        workload.run, decision.last_finished, config.max_node_failures, slurm.node_names()
    )
    return slurm.Proposal(groups, most, tasks, arrays, sbatch.options(config.slurm, excluded))


def run_slurm(workload: Workload, on_decision: Callable[[Decision], None]) -> list[slurm.Array]:
    """Submit all pending shards; returns the arrays, of which those submitted have a job id.

    Raises:
        SlurmError: sbatch refused; what it took before is on record.
    """
    run = workload.run
    with submitting(workload):
        decision = look(workload, slurm.queue())
        repair(decision)
        on_decision(decision)
        if not decision.pending:
            return []
        submission, proposal = _intend(workload, decision)
        for array in proposal.arrays:
            sbatch.submit(run, submission, workload.config.slurm, array, proposal)
            slurm.write_arrays(submission, proposal.arrays)
    return proposal.arrays


def _intend(workload: Workload, decision: Decision) -> tuple[Submission, slurm.Proposal]:
    """Put on disk what Slurm will be asked for; a job is found again by its array's name."""
    submission = workload.run.new_submission()
    proposal = propose(workload, decision, submission.name)
    chunks = (c for group in proposal.groups for c in chunking.balanced(group, proposal.most))
    write(submission, decision, chunks)
    slurm.write_arrays(submission, proposal.arrays)
    return submission, proposal


def prepare(workload: Workload, on_decision: Callable[[Decision], None]) -> list[str]:
    """As `run_slurm`, but leave sbatch to the user; returns the commands to run, one an array."""
    with submitting(workload):
        decision = look(workload)
        repair(decision)
        on_decision(decision)
        if not decision.pending:
            return []
        submission, proposal = _intend(workload, decision)
    return [sbatch.by_hand(workload.run, submission, a, proposal) for a in proposal.arrays]


def live_jobs(run: RunDir) -> list[str]:
    """`job_index` of every pending or running array task of a run."""
    queue = slurm.queue()
    live = (e for array in slurm.all_arrays(run) for e in queue.live(array))
    return [f"{e.job_id}_{e.index}" for e in live]


def cancel(run: RunDir) -> int:
    """Cancel all of a run's array tasks, array by array; returns how many there were.

    Raises:
        SlurmError: scancel failed, and tasks are still there.
    """
    live = live_jobs(run)
    try:
        slurm.cancel(list(dict.fromkeys(job.partition("_")[0] for job in live)))
    except SlurmError:
        if live_jobs(run):  # else they ended meanwhile
            raise
    return len(live)


def wait(run: RunDir) -> None:
    """Until no array task of the run is pending or running; says why, where none can start.

    Raises:
        SlurmError: nothing that is left can start, or squeue has failed for minutes.
    """
    began = heard = moved = time.monotonic()
    while True:
        try:
            queue, arrays = slurm.queue(), slurm.all_arrays(run)
            if not any(queue.live(array) for array in arrays):
                return
            heard = time.monotonic()
            if not (reasons := waiting.stuck(queue, arrays)):
                moved = heard
            elif heard - moved > STUCK_SECONDS:
                raise waiting.Stuck(reasons)
        except waiting.Stuck:
            raise
        except SlurmError:
            if time.monotonic() - heard > PATIENCE:
                raise
        time.sleep(min(LONGEST_WAIT, max(SHORTEST_WAIT, (time.monotonic() - began) / 20)))
