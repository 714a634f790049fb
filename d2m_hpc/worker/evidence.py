"""Attempts that never ended, as whoever claims their shards next finds them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

from d2m_hpc.run.attempts import Attempt, Attempts
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import Job, Recorder, died

log = logging.getLogger(__name__)


class Evidence:
    """Puts attempts on record whose process, and whoever watched it, are gone.

    Args:
        task: `submission-index-attempt` of the task that finds them.
        fingerprint: of its config.
    """

    def __init__(self, run: RunDir, task: str, fingerprint: str, recorder: Recorder) -> None:
        self._run, self._task, self._fingerprint = run, task, fingerprint
        self._recorder, self._attempts = recorder, Attempts(run.attempts)

    def weigh(self, job: Job, last: Attempt) -> int:
        """Count an attempt that never ended; the shard's lease is held.

        The first one that ended when Slurm requeued the whole task is taken for its node's loss,
        and counts for nothing.

        Returns:
            How many attempts at the shard have failed by now.
        """
        failures = job.failures
        if last.lost == 0 and self._is_requeued(last.task):
            log.warning("%s: attempt %d was lost with its node", job.stem, last.number)
            last = replace(last, lost=1)
        else:
            made_by = self._made_by(last.task)
            error = (
                f"the process that worked on {job.stem} never came to an end, nor did the one "
                f"that watches it: killed as a whole, or lost with {last.host or 'its node'}"
            )
            self._recorder.append(died(job.stem, last, made_by, error))
            log.warning("%s: attempt %d never ended", job.stem, last.number)
            failures += made_by == self._fingerprint
        self._attempts.end(job.stem, replace(last, died=True))
        return failures

    def _is_requeued(self, earlier: str) -> bool:
        """Whether Slurm has started the same task again since."""
        same = earlier.rpartition("-")[0] == self._task.rpartition("-")[0]
        return same and earlier != self._task

    def _made_by(self, task: str) -> str:
        """The fingerprint that the attempt was to make."""
        intent = self._run.submission(task.partition("-")[0]).intent
        try:
            return str(json.loads(intent.read_bytes())["fingerprint"])
        except (OSError, ValueError, LookupError, TypeError):
            return self._fingerprint
