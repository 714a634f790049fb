"""Work on a million of things at once."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from d2m_hpc.stopping import is_own_process


@contextmanager
def uncollected() -> Iterator[None]:
    """Also a decorator: run without the garbage collector.

    A plan is millions of objects that stay, in no cycle. The collector would go through all of them
    each time that they are a quarter more, and once more at the end: half of a submit's time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_own_process():
            # What is frozen still is not torn down, of which compiled libraries complain for pages.
            atexit.unregister(gc.unfreeze)
            atexit.register(gc.unfreeze)
            gc.freeze()
        if enabled:
            gc.enable()
