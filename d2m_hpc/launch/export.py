"""Start the tasks of an export as an array on Slurm, and wait for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2m_hpc.config import Slurm
from d2m_hpc.config.load import load
from d2m_hpc.config.mistakes import slurm_mistakes
from d2m_hpc.errors import ConfigError, SlurmError
from d2m_hpc.launch import arrays, rounds, sbatch, slurm
from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage.files import atomic_write

CPUS = 4
"""Cores of a task, which writes four parts at once."""


@dataclass(frozen=True)
class ExportTasks:
    """The tasks of an export into a folder: shares, numbered from 1, are an array's elements.

    Attributes:
        live: the shares whose tasks waited or ran before.
        started: the shares whose tasks were started.
        job: the id of their array; empty where none was started.
    """

    live: Collection[int]
    started: Collection[int]
    job: str
    _run: RunDir
    _folder: Path
    _left: Callable[[], Collection[int]]

    def wait(self) -> dict[int, Path]:
        """Wait until no task waits or runs; returns the logs of shares that are not complete.

        Raises:
            SlurmError: no remaining task can start, or squeue has failed for minutes.
        """
        arrays.wait_for(self._run, lambda: not self._left(), {"": [_array(self._folder)]})
        return {n: _log(self._run, self._folder, str(n)) for n in sorted(self._left())}


def live(run: RunDir, folder: Path) -> set[int]:
    """The shares of tasks that wait or run for a folder, whoever started them.

    Raises:
        SlurmError: squeue fails, or there is no Slurm.
    """
    if not slurm.is_here():
        raise SlurmError("there is no sbatch here; go to a login node, or leave out --tasks")
    array = _array(folder)
    return {*slurm.queue(run, arrays.PATIENCE_OF_A_SUBMIT, {"": [array]}).elements(array)}


def start(
    run: RunDir,
    folder: Path,
    lists: Iterable[bytes],
    tasks: int,
    shares: Collection[int],
    given: Mapping[str, Any],
) -> str:
    """Start a task for each of some shares of `subset-tars`; returns the array's job id.

    Args:
        lists: the lines of the kept keys, which are copied: later changes do not reach the tasks.
        tasks: the number of all shares.
        given: `slurm:` keys of the user's, before those of the config.

    Raises:
        ConfigError: a key of `slurm:` is wrong.
        SlurmError: Slurm refused.
    """
    if unknown := given.keys() - Slurm.model_fields.keys():
        raise ConfigError("export", [f"slurm.{min(unknown)}: unknown key"])
    chosen = load(run.config, options=given, frozen=True).slurm
    if mistakes := _ignored(given):
        raise ConfigError("export", mistakes)
    kept = run.exports / f"{_token(folder)}.jsonl"
    atomic_write(kept, lists)
    # No GPU is asked for, as for the rounds of --until-done, unless the user asks.
    own = {"time": chosen.time, "cpus-per-task": CPUS, "exclude": chosen.exclude}
    users = sbatch.options(Slurm(**given))
    options = {**rounds.options(chosen), **own, **users, "signal": None, "ntasks-per-node": None}
    limit = f"%{chosen.max_parallel}" if chosen.max_parallel else ""
    options |= {
        "job-name": _array(folder).name,
        "array": ",".join(map(str, sorted(shares))) + limit,
        "output": _log(run, folder, "%a").name,
    }
    python = [chosen.python or sys.executable, "-P", "-u", "-m", "d2m_hpc", "export", "subset-tars"]
    words = [*python, str(run.root), "-o", str(folder), "--lists", str(kept)]
    words += ["--tasks", str(tasks), "--part"]
    script = sbatch.single(chosen, words, options["cpus-per-task"])
    return rounds.start(run, f'{script} "$SLURM_ARRAY_TASK_ID"', options)


def _ignored(given: Mapping[str, Any]) -> list[str]:
    """Mistakes in a user's keys that the tasks of an export would ignore."""
    alone = [name for name in ("tasks_per_node", "max_time", "max_mem") if name in given]
    found = [f"slurm.{n}: found {given[n]!r}; it is of a submit alone, leave it out" for n in alone]
    if len(sbatch.kinds(Slurm(**given))) > 1:
        found.append("slurm.gres: found several kinds of nodes; valid is one for an export")
    for name in {"signal", "ntasks-per-node"} & {*given.get("extra", {})}:
        found.append(f"slurm.extra: found {name!r}, which is of a submit alone; leave it out")
    return [*found, *slurm_mistakes(Slurm(**given))]


def _array(folder: Path) -> slurm.Array:
    """The array of a folder's tasks, as `Queue` finds it."""
    return slurm.Array(f"d2m-{_token(folder)}-tars", 0, 0)


def _log(run: RunDir, folder: Path, share: str) -> Path:
    return run.logs / f"tars-{_token(folder)}-{share}.out"


def _token(folder: Path) -> str:
    return slurm.token(Path(os.path.realpath(folder)))
