"""One at a time in a run, of submits and of what else writes its plan."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from d2m_hpc.errors import D2MError
from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage.lease import LEASE_SECONDS, Lease
from d2m_hpc.storage.texts import safe

SILENT_SECONDS, SUBMIT_SECONDS = 3.0, 600.0
"""Waiting for another submit: said after so long, given up after so long."""


@contextmanager
def alone(run: RunDir) -> Iterator[None]:
    """Hold the submit lock of a run.

    Raises:
        D2MError: another submit has held it for too long.
    """
    lease = Lease(run.submit_lock)
    _take(lease, run)
    try:
        yield
    finally:
        lease.release()


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
