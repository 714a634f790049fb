"""One submit at a time in a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2m_hpc.errors import D2MError
from d2m_hpc.plan.workload import Workload
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.merge import merge_silent
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.owner import require_own
from d2m_hpc.run.staging import STAGING, Staging
from d2m_hpc.storage.lease import LEASE_SECONDS, Lease
from d2m_hpc.storage.texts import safe

SILENT_SECONDS, SUBMIT_SECONDS = 3.0, 600.0
"""Waiting for another submit: said after so long, given up after so long."""


@contextmanager
def submitting(workload: Workload) -> Iterator[None]:
    """One submit at a time in a run.

    What a killed one left half-written is swept away, and the many small files of tasks that the
    watchdog would have ended twice over become few.
    """
    run, output = workload.run, OutputDir(workload.config.output_metadata_dir)
    require_own(output, run, take=True)
    run.create()
    lease = Lease(run.submit_lock)
    _take(lease, run)
    try:
        folders = [
            run.root,
            run.fingerprints,
            run.records,
            run.progress,
            run.node_failures,
            run.schema,
            run.attempts,
        ]
        for folder in (*folders, *(s.folder for s in run.submissions())):
            for left in folder.glob(".*.tmp"):
                left.unlink(missing_ok=True)
        _sweep(workload, output)
        merge_silent(run, 2 * workload.config.stall_seconds)
        yield
    finally:
        lease.release()


def _sweep(workload: Workload, output: OutputDir) -> None:
    """Remove what killed tasks left of commits, of whatever shard nobody has in hand."""
    staging = Staging(Path(output.root) / STAGING) if output.is_local else None
    for stem in staging.stems() if staging else ():
        lease = Lease(workload.run.lease(stem), workload.config.lease_seconds)
        if staging and lease.claim():
            with suppress(OSError):
                staging.fence(stem)
            lease.release()
    if staging:
        staging.close()


def _take(lease: Lease, run: RunDir) -> None:
    """Wait for another submit of the run to end, and say so.

    Raises:
        D2MError: it has gone on for too long.
    """
    began, said = time.monotonic(), False
    while not lease.claim():
        waited = time.monotonic() - began
        if waited > SILENT_SECONDS and not said:
            said = True
            _note(
                f"another submit of this run has its lock ({_holder(run)}); waiting for it to end, "
                f"or, if it was killed, {LEASE_SECONDS:.0f} s for a sign of life"
            )
        if waited > SUBMIT_SECONDS:
            raise D2MError(
                f"another submit of this run has worked for {waited:.0f} s ({_holder(run)}); end "
                "it, or try again when it has ended"
            )
        time.sleep(0.2)


def _holder(run: RunDir) -> str:
    """Who holds the submit lock, as its file says: `host=login1, pid=7`."""
    try:
        lines = run.submit_lock.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it is just ending"
    return ", ".join(safe(x) for x in lines if x.startswith(("host=", "pid="))) or "no name in it"


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
