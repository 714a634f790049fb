"""How Slurm's own commands are run: with which environment, and for how long."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

from d2m_hpc.errors import SlurmError

SECONDS = 120.0
"""How long a command may take; a slurmctld that restarts is given up by the commands before."""

CALLERS = re.compile(r"S(LURM|LURMD|BATCH|RUN|ALLOC|QUEUE|INFO|CANCEL|CONTROL)_")
"""Options in the environment: those of an allocation that we are called in, or of the user's for
their own commands. A config says how tasks run; where it is silent, the cluster does."""

WHERE = {
    "SLURM_CONF",
    "SLURM_CONF_SERVER",
    "SLURM_CLUSTERS",
    "SLURM_JWT",
    "SLURM_SACK_SOCKET",
    "SLURM_SACK_KEY",
}
"""Which cluster it is, and how one proves who one is."""

DEVICES = {"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"} | {
    "GPU_DEVICE_ORDINAL",
    "ZE_AFFINITY_MASK",
}
"""Set by Slurm in an allocation, for that allocation."""


def callers(environment: Mapping[str, str]) -> set[str]:
    """The variables that must not reach Slurm's commands, nor through sbatch the tasks."""
    gone = {name for name in environment if CALLERS.match(name)} - WHERE
    if job := environment.get("SLURM_JOB_ID"):
        gone |= DEVICES & environment.keys()
        # A folder for that job's own time, as many sites' prologs make one.
        if re.search(rf"(?<!\d){re.escape(job)}(?!\d)", environment.get("TMPDIR", "")):
            gone.add("TMPDIR")
    return gone


def environment() -> dict[str, str]:
    """Ours, without what is the caller's."""
    gone = callers(os.environ)
    return {name: value for name, value in os.environ.items() if name not in gone}


def ask(*words: str, seconds: float = SECONDS) -> str:
    """What a command of Slurm's prints.

    Raises:
        SlurmError: it is not here, failed or does not answer, with its words.
    """
    done = call(*words, seconds=seconds)
    if done.returncode:
        raise SlurmError(f"{words[0]} failed: {done.stderr.strip()}")
    return done.stdout


def call(*words: str, seconds: float | None) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's, without the variables that are for others.

    Raises:
        SlurmError: it is not here, or does not answer in time.
    """
    try:
        return subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=seconds,
            env=environment(),
        )
    except FileNotFoundError:
        raise SlurmError(f"there is no {words[0]} here; go to a login node") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{words[0]} did not answer within {seconds:g} s; `scontrol ping` says whether "
            "slurmctld is up"
        ) from None
    except OSError as error:
        raise SlurmError(f"{words[0]} cannot be started: {error}") from None
