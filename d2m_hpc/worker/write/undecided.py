"""Results that do not tell all of their types wait for others that may."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from d2m_hpc.run.manifest import Job
from d2m_hpc.worker.write.thread import Result

ROWS = 10_000
"""In results that wait, for they are held in memory."""


def last_if_undecided(results: Iterable[Result], chunk: Sequence[Job]) -> Iterator[Result]:
    """Results in their order, but last those of which the run does not know all types yet.

    Args:
        chunk: of the task. Only shards of it wait: for those of another task's chunk that task
            waits, and each of the two would wait for the other.
    """
    own = {job.stem for job in chunk}
    waiting: list[Result] = []
    left = ROWS
    for result in results:
        waits = result.error is None and result.work.shard.stem in own
        if waits and result.rows.rows <= left and result.rows.undecided:
            left -= result.rows.rows
            waiting.append(result)
            if result.work.held is not None:
                result.work.held.rest()
        else:
            yield result
    for result in waiting:
        if result.work.held is not None:
            result.work.held.resume()
        result.record.notices += [
            f"{name!r} has no value that tells its type, neither here nor in the shards so far"
            for name in result.rows.undecided
        ]
        yield result
