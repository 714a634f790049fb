"""What is left of a submission, without torch: an array element looks before it loads its nets.

With stealing, the tasks that began early leave nothing to those that Slurm starts late.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from d2m_hpc.config import Config
from d2m_hpc.run.chunks import Chunks
from d2m_hpc.run.folder import RunDir, Submission
from d2m_hpc.run.outputs import NPZ, PARQUET, OutputDir
from d2m_hpc.run.records import Job


class Left:
    """The shards of a submission that are neither done nor failed."""

    def __init__(self, run: RunDir, submission: str, config: Config) -> None:
        self._submission, self._config = run.submission(submission), config
        self._chunks = Chunks(self._submission)
        self._output = OutputDir(config.output_metadata_dir)

    def nothing_for(self, index: int) -> bool:
        """Whether the task of a chunk has no shard to do, nor to take from others.

        Shards that other tasks have in hand count as left, lest these tasks die.
        """
        if index >= len(self._chunks):
            return True  # the last element of an array may have fewer chunks than ranks
        # One look at a file tells most tasks that their own first shard is left; thousands that
        # start together must not each list the whole output folder.
        own = self._are_settled([index], self._is_there)
        return own and (not self._config.steal or self.nothing())

    def _is_there(self, job: Job) -> bool:
        """Whether a shard's pair is there.

        A client of NFS remembers for up to a minute that a name was missing. A parquet that appears
        meanwhile would be overlooked when the shard is claimed, so the npz is asked for first.
        """
        return all(self._output.has(f"{job.stem}{suffix}") for suffix in (NPZ, PARQUET))

    def nothing(self) -> bool:
        """Whether no task of the submission has any shard left."""
        present = self._output.stems()
        return self._are_settled(range(len(self._chunks)), lambda job: job.stem in present)

    def _are_settled(self, numbers: Iterable[int], is_present: Callable[[Job], bool]) -> bool:
        failed, extended = _names(self._submission.failed("")), _names(self._submission.extended)

        def is_settled(job: Job) -> bool:
            if job.stem in failed:
                return True
            if job.again or self._config.reprocess:
                return False
            return job.stem in extended if job.extends else is_present(job)

        return all(is_settled(job) for chunk in self._chunks.read(numbers) for job in chunk)


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def cancel_pending(submission: Submission, own: str) -> str:
    """Cancel the pending elements of a submission's arrays; returns why not, if Slurm did not.

    Each would take an allocation for seconds to find nothing.

    Args:
        own: the job id of the task's own array, which somebody may have started by hand.
    """
    arrays = {array["job_id"] for array in json.loads(submission.arrays.read_bytes())} - {""}
    words = ["scancel", "--state=PENDING", *sorted({own, *arrays})]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip() or "scancel failed" if done.returncode else ""
