"""Disable the garbage collector while building large plans."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from d2m_hpc.stopping import is_own_process


@contextmanager
def gc_paused() -> Iterator[None]:
    """Run a block, or as a decorator a function, without the garbage collector.

    A plan is millions of objects that stay, without cycles. The collector would visit all of them
    whenever their number has grown by a quarter, and at the end: half of a submit's time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_own_process():
            # Objects must not be frozen at exit: compiled libraries complain of those not freed.
            atexit.unregister(gc.unfreeze)
            atexit.register(gc.unfreeze)
            gc.freeze()
        if enabled:
            gc.enable()
