"""The local back end: tasks run in this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from d2m_hpc.config.load import located
from d2m_hpc.errors import ConfigError
from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.launch import arrays
from d2m_hpc.launch.flow import Backend
from d2m_hpc.launch.guest import guest
from d2m_hpc.plan import balance
from d2m_hpc.plan.decide import Decision
from d2m_hpc.plan.workload import Workload
from d2m_hpc.run import fingerprints
from d2m_hpc.run.folder import Submission
from d2m_hpc.run.records import Job

if TYPE_CHECKING:
    from d2m_hpc.worker.board import Board
    from d2m_hpc.worker.progress import Listener


def _deaf(shards: int) -> AbstractContextManager[Listener]:
    return nullcontext(lambda progress: None)


class ThisProcess(Backend):
    """Run one task after another; the shards of each need the same models.

    Args:
        listening: makes a listener to the tasks' progress, from the number of shards.
        board: shared with the process that watches this one.
    """

    def __init__(
        self,
        listening: Callable[[int], AbstractContextManager[Listener]] = _deaf,
        board: Board | None = None,
    ) -> None:
        self._listening, self._board = listening, board

    def look(self, workload: Workload) -> Decision:
        return arrays.look(workload)

    def chunks(self, decision: Decision, submission: Submission) -> list[list[Job]]:
        self._chunks = balance.groups(decision.pending)
        return self._chunks

    def start(self, decision: Decision, submission: Submission) -> AbstractContextManager[None]:
        self._workload, self._submission = decision.workload, submission
        return fingerprints.working(submission)

    def finish(self) -> None:
        with guest(), self._listening(sum(map(len, self._chunks))) as listener:
            try:
                self._work(listener)
            except ConfigError as error:
                if error.where != str(self._workload.run.config):
                    raise
                where = self._workload.where  # not that of the copy for tasks
                raise ConfigError(where, located(where, error.mistakes)) from error

    def _work(self, listener: Listener) -> None:
        from d2m_hpc.run.tasks import Progress

        with gc_paused():  # importing torch takes a tenth less without it
            from d2m_hpc.worker.task import run_task

        before = Progress("")
        root, name = self._workload.run.root, self._submission.name
        for index in range(len(self._chunks)):
            earlier = before
            task = partial(run_task, root, name, index, local=True, board=self._board)
            before = task(listener=lambda now: listener(now.after(earlier))).after(before)  # noqa: B023
