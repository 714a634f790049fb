"""One submit, or other change of the plan, at a time in a run."""

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
"""The wait for another submit is reported after the first, and given up after the second."""


@contextmanager
def alone(run: RunDir) -> Iterator[None]:
    """Hold the submit lock of a run; wait until another submit has released the lock.

    Raises:
        D2MError: another submit has held the lock for too long.
    """
    lease, began, is_told = Lease(run.submit_lock), time.monotonic(), False
    while not lease.claim():
        waited = time.monotonic() - began
        if waited > SILENT_SECONDS and not is_told:
            is_told = True
            text = (
                f"note: another submit of this run has its lock ({_holder(run)}); waiting for it "
                f"to end, or, if it was killed, {LEASE_SECONDS:.0f} s for a sign of life"
            )
            print(text, file=sys.stderr, flush=True)
        if waited > SUBMIT_SECONDS:
            raise D2MError(
                f"another submit of this run has worked for {waited:.0f} s ({_holder(run)}); end "
                "it, or try again when it has ended"
            )
        time.sleep(0.2)
    try:
        yield
    finally:
        lease.release()


def _holder(run: RunDir) -> str:
    """The holder of the submit lock, as the lock's file says: `host=login1, pid=7`."""
    try:
        lines = run.submit_lock.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it is just ending"
    return ", ".join(safe(x) for x in lines if x.startswith(("host=", "pid="))) or "no name in it"
