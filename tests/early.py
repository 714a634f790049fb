"""Tasks that launch each shard ahead that can be, whatever the threads' speed."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

from d2m_hpc.worker.batch import Batch
from d2m_hpc.worker.claims import Claims
from d2m_hpc.worker.read.loader import Loader, Reading
from d2m_hpc.worker.work import Clock


def launch_ahead(patch: Any) -> None:
    """Have loaders wait for a next shard that is on its way, and for none that cannot come yet.

    Args:
        patch: as `pytest.MonkeyPatch.setattr`, or `setattr`.
    """
    own_poll, own_wait, waiting = Loader.poll, Claims._wait_for_settled, set[object]()

    def wait_for_settled(claims: Claims) -> None:
        waiting.add(claims)
        own_wait(claims)
        waiting.clear()

    def poll(loader: Loader) -> tuple[Clock, Batch] | None:
        while (found := own_poll(loader)) is None and not waiting and not _is_over(loader):
            time.sleep(0.001)
        return found

    patch(Claims, "_wait_for_settled", wait_for_settled)
    patch(Loader, "poll", poll)


def _is_over(loader: Loader) -> bool:
    """Whether what comes next is no batch: an error, or an end."""
    coming = next(iter([*loader._next.queue]), loader)
    if isinstance(coming, Reading):
        coming = next(iter([*coming._queue.queue]), loader)
    return coming is not loader and not (isinstance(coming, Future) and not coming.done())
