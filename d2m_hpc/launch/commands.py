"""Run Slurm's own commands: with a clean environment, and a time limit."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Mapping

from d2m_hpc.errors import SlurmError

log = logging.getLogger(__name__)

SECONDS = 120.0
"""Seconds that a command may take; shorter tries of its own end before."""

PAUSE = 3.0
"""Seconds between two tries."""
AWAY = re.compile(r"contact slurm controller|timed out|Zero Bytes|[Cc]onnect|not answer")
"""Words of Slurm's commands where slurmctld is away."""
PING = "slurmctld does not answer; `scontrol ping` says whether it is up"

CALLERS = re.compile(r"S(LURM|LURMD|BATCH|RUN|ALLOC|QUEUE|INFO|CANCEL|CONTROL)_")
"""Variables with options: of an allocation around this process, or the user's for other commands.
Tasks run as the config says; where it is silent, as the cluster's defaults say."""

WHERE = {
    "SLURM_CONF",
    "SLURM_CONF_SERVER",
    "SLURM_CLUSTERS",
    "SLURM_JWT",
    "SLURM_SACK_SOCKET",
    "SLURM_SACK_KEY",
}
"""Variables that name the cluster and prove the user's identity."""

DEVICES = {"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"} | {
    "GPU_DEVICE_ORDINAL",
    "ZE_AFFINITY_MASK",
}
"""Variables that Slurm sets for the devices of an allocation."""


def callers(environment: Mapping[str, str]) -> set[str]:
    """The variables that must reach neither Slurm's commands nor, through sbatch, the tasks."""
    gone = {name for name in environment if CALLERS.match(name)} - WHERE
    if job := environment.get("SLURM_JOB_ID"):
        gone |= DEVICES & environment.keys()
        # Many sites' prologs make a folder for the time of that job only.
        if re.search(rf"(?<!\d){re.escape(job)}(?!\d)", environment.get("TMPDIR", "")):
            gone.add("TMPDIR")
    return gone


SHORTEST_WAIT, LONGEST_WAIT = 2.0, 60.0


def wait_for_next_look(began: float) -> None:
    """Sleep between two looks at the queue: longer the longer one has waited, as slurmctld serves
    everybody.

    Args:
        began: the first look, by `time.monotonic`.
    """
    time.sleep(min(LONGEST_WAIT, max(SHORTEST_WAIT, (time.monotonic() - began) / 20)))


def environment() -> dict[str, str]:
    """This process's environment without the caller's variables."""
    gone = callers(os.environ)
    return {name: value for name, value in os.environ.items() if name not in gone}


def ask(*words: str, seconds: float = SECONDS) -> str:
    """Run a command of Slurm's and return its output; raise `SlurmError` where it fails."""
    done = call(*words, seconds=seconds)
    if done.returncode:
        said = done.stderr.strip()
        hint = f"; {PING}" if AWAY.search(said) else ""
        raise SlurmError(f"{words[0]} failed: {said}{hint}")
    return done.stdout


def asked_again(patience: float, *words: str) -> str:
    """Like `ask`; again while slurmctld is away, as when it restarts.

    Args:
        patience: seconds after which no further try begins.
    """
    began, told = time.monotonic(), False
    while True:
        try:
            return ask(*words)
        except SlurmError as error:
            waited = time.monotonic() - began
            if waited + PAUSE > patience or not AWAY.search(str(error)):
                raise
            if not told:
                log.warning("%s; asking again for up to %g s", error, patience)
                told = True
            time.sleep(PAUSE)


def call(*words: str, seconds: float | None, told: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's in a clean environment.

    Args:
        told: what the command reads from its standard input.

    Raises:
        SlurmError: the command is not here, or does not answer in time.
    """
    try:
        return subprocess.run(
            words,
            input=told,
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
