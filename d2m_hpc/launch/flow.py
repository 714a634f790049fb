"""Submit: decide what is left, put that on record, start tasks by a `Backend`."""

from __future__ import annotations

import json
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.plan.decide import Decision
from d2m_hpc.plan.workload import Workload, canonical
from d2m_hpc.run import fingerprints, frozen
from d2m_hpc.run.alone import alone
from d2m_hpc.run.attempts import Attempts
from d2m_hpc.run.chunks import write_chunks
from d2m_hpc.run.folder import Submission
from d2m_hpc.run.merge import merge_silent
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.owner import require_own
from d2m_hpc.run.records import Job, Recorder
from d2m_hpc.run.shards import write_shards
from d2m_hpc.run.staging import STAGING, Staging
from d2m_hpc.run.user import user_name
from d2m_hpc.storage.files import atomic_write, is_private
from d2m_hpc.storage.lease import Lease
from d2m_hpc.storage.urls import has_secret
from d2m_hpc.version import __version__


class Backend(ABC):
    """A place where a submission's tasks run: see `local` and `arrays`."""

    @abstractmethod
    def look(self, workload: Workload) -> Decision:
        """Decide what is left, with all that this back end knows of live tasks."""

    @abstractmethod
    def chunks(self, decision: Decision, submission: Submission) -> Iterable[list[Job]]:
        """Divide the pending jobs among tasks, a chunk each; start nothing."""

    @abstractmethod
    def start(self, decision: Decision, submission: Submission) -> AbstractContextManager[None]:
        """Start the tasks of a recorded submission; the context is held until `finish` has
        returned."""

    @abstractmethod
    def finish(self) -> None:
        """Do the work that remains after other submits may work on the run."""


def submit(
    workload: Workload,
    backend: Backend,
    on_decision: Callable[[Decision], None] = lambda decision: None,
    left_out: Collection[str] = (),
) -> Decision:
    """Let a back end do all pending shards.

    A killed submit leaves a submission that names every task it may have started.

    Args:
        on_decision: called with the decision before anything starts.
        left_out: stems of shards to leave out this time.
    """
    with ExitStack() as held:
        with submitting(workload):
            decision = backend.look(workload)
            decision.left_out |= set(left_out)
            repair(decision)
            on_decision(decision)
            if not decision.pending:
                return decision
            submission = workload.run.new_submission()
            write(submission, decision, backend.chunks(decision, submission))
            held.enter_context(backend.start(decision, submission))
        backend.finish()
    return decision


@contextmanager
def submitting(workload: Workload) -> Iterator[None]:
    """Hold the run for one submit; sweep up half-written files, merge the records of silent tasks.

    A task is silent when its watchdog would have ended it twice over.
    """
    run, output = workload.run, OutputDir(workload.config.output_metadata_dir)
    require_own(output, run, take=True)
    run.create()
    with alone(run):
        folders = [
            run.root,
            run.fingerprints,
            run.records,
            run.progress,
            run.node_failures,
            run.schema,
            run.attempts,
        ]
        submitted = chain.from_iterable((s.folder, s.frozen) for s in run.submissions())
        for folder in (*folders, *submitted):
            for left in folder.glob(".*.tmp"):
                left.unlink(missing_ok=True)
        _sweep(workload, output)
        merge_silent(run, 2 * workload.config.stall_seconds)
        yield


def _sweep(workload: Workload, output: OutputDir) -> None:
    """Remove unfinished commits of killed tasks, for shards that nobody holds."""
    staging = Staging(Path(output.root) / STAGING) if output.is_local else None
    for stem in staging.stems() if staging else ():
        lease = Lease(workload.run.lease(stem), workload.config.lease_seconds)
        if staging and lease.claim():
            with suppress(OSError):
                staging.fence(stem)
            lease.release()
    if staging:
        staging.close()


def commit(decision: Decision, chunks: Iterable[list[Job]]) -> Submission:
    """Write a new submission to the run folder; nothing is started."""
    submission = decision.workload.run.new_submission()
    write(submission, decision, chunks)
    return submission


@gc_paused()
def write(submission: Submission, decision: Decision, chunks: Iterable[list[Job]]) -> None:
    workload, run = decision.workload, decision.workload.run
    values = workload.config.model_dump(mode="json")
    text = _text(values)
    intent = {
        "fingerprint": workload.fingerprint_id,
        "created": time.time(),
        "user": user_name(),
        "host": socket.gethostname(),
        "version": __version__,
    }
    private = has_secret(values)
    if not decision.is_planned:
        write_shards(run.shards, decision.shards, private)
    write_chunks(submission, chunks, private or is_private(run.shards))
    if workload.custom.sources:
        frozen.write(submission.frozen, workload.custom)
    frozen.write_checkpoints(submission.frozen, workload.checkpoints)
    document = run.fingerprint(workload.fingerprint_id), canonical(workload.document)
    for path, data in ((submission.config, text), (run.config, text), document):
        atomic_write(path, data, private=private)
    atomic_write(submission.intent, json.dumps(intent).encode())


def _text(values: dict[str, Any]) -> bytes:
    """A config's file, with marks of start and end that show where a full disk has cut it."""
    return yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, explicit_start=True, explicit_end=True
    ).encode()


def repair(decision: Decision) -> None:
    """Restore lost records; drop leases and attempts that killed tasks left at done shards.

    Records the config and the plan, too, where no shard is pending: an earlier config makes every
    shard done, or has live tasks for them, whose end a round or another submit follows up.
    """
    workload, run = decision.workload, decision.workload.run
    as_before = decision.is_planned and fingerprints.newest(run) == workload.fingerprint_id
    if as_before and decision.in_flight and run.config.exists():
        as_before = run.config.read_bytes() == _text(workload.config.model_dump(mode="json"))
    if not decision.pending and not as_before:
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
                if path.suffix != ".lock":  # left by a kill during a take-over
                    path.unlink(missing_ok=True)
                lease.release()
