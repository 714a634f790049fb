"""The cores that a task may use."""

from __future__ import annotations

import os
from contextlib import suppress

from d2m_hpc.worker import death

OF_SLURM = "SLURM_CPUS_PER_TASK"


def cores(in_slurm: bool) -> int:
    """The cores of this process, by its affinity, by the quotas of its cgroups, and by Slurm, which
    need not bind a task to its cores.

    Args:
        in_slurm: this is a task of an array, and no process that somebody started in an allocation.
    """
    found = [len(os.sched_getaffinity(0))]
    if in_slurm and (given := os.environ.get(OF_SLURM, "")).isdigit():
        found.append(int(given))
    for folder in death.cgroups():
        with suppress(OSError, ValueError):  # also where there is no quota, which is "max"
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            found.append(round(quota / period))
    return max(1, min(found))
