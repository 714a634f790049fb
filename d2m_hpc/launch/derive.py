"""Start `d2m derive`: the first steps, in this process or in a job, then tasks like a submit's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError, D2MError, SlurmError
from d2m_hpc.launch import arrays, commands, flow, sbatch
from d2m_hpc.launch.guest import guest
from d2m_hpc.plan.decide import Decision
from d2m_hpc.plan.derive import UNKNOWN, FirstStep, NotPrepared, derived, lacking
from d2m_hpc.plan.standing import Standings, standings
from d2m_hpc.plan.workload import Workload
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.owner import require_own
from d2m_hpc.run.pair import Pair
from d2m_hpc.storage.files import atomic_write
from d2m_hpc.storage.urls import has_secret

SEEN_SECONDS = 90.0
"""Seconds after which every node sees a new file; NFS keeps a folder's list for up to 60."""

if TYPE_CHECKING:
    from d2m_hpc.launch.flow import Backend


def derive(
    workload: Workload,
    backend: Backend,
    first_step: Callable[[Workload, Standings], None] | None = None,
    on_decision: Callable[[Decision], None] = lambda decision: None,
    left_out: Collection[str] = (),
    allow_missing: bool = False,
) -> Decision:
    """Let a back end extend all finished pairs by the derived columns that they lack.

    Args:
        first_step: has the first steps done elsewhere; by default they are done here.

    Raises:
        ConfigError: an entry of `derive` cannot be computed.
        D2MError: shards are not finished, unless that is allowed.
    """
    found = _finished(workload, allow_missing)
    if first_step and not _is_prepared(workload, found):
        first_step(workload, found)
    with guest():
        # A login node does none, even where the files of the job are not to be seen yet.
        digests = derived(workload, found.done, lacking if first_step else _here(workload, found))
    return flow.submit(_asked(workload, digests), backend, on_decision, left_out)


def dry_run(workload: Workload, allow_missing: bool = False) -> Decision:
    """Decide what a derive would do; change nothing."""
    found = _finished(workload, allow_missing)
    digests = derived(workload, found.done, None)
    decision = arrays.look(_asked(workload, digests))
    if left := [name for name, digest in digests.items() if digest.endswith(UNKNOWN)]:
        decision.notices.append(f"first steps are done before: {', '.join(left)}")
    return decision


def _asked(workload: Workload, digests: dict[str, str]) -> Workload:
    """The workload without tars: what is new among them is for a submit."""
    config = workload.config.model_copy(update={"reprocess": False})
    return replace(workload, config=config, sizes={}, derived=digests)


def prepare(workload: Workload, allow_missing: bool = False) -> None:
    """Do the first steps in this process, where they are not done yet."""
    found = _finished(workload, allow_missing)
    with guest():
        derived(workload, found.done, _here(workload, found))


def _finished(workload: Workload, allow_missing: bool) -> Standings:
    run, config = workload.run, workload.config
    if not config.derive:
        raise ConfigError(workload.where, ["derive: found nothing; valid are columns to derive"])
    require_own(OutputDir(config.output_metadata_dir), run, take=False)
    found = standings(run, config, asked=workload.fingerprint_id)
    found.require_finished(allow_missing)
    if not found.done:
        raise D2MError(f"{run.root}: no shard is finished by this config; `d2m submit` first")
    return found


def _is_prepared(workload: Workload, found: Standings) -> bool:
    try:
        derived(workload, found.done)
        return True
    except NotPrepared:
        return False


def _here(workload: Workload, found: Standings) -> FirstStep:
    output = OutputDir(workload.config.output_metadata_dir)

    @cache
    def steps() -> FirstStep:
        from d2m_hpc.worker.first_steps import FirstSteps
        from d2m_hpc.worker.task import choose_device

        pairs = [(Pair(output, stem), outcome.rows) for stem, outcome in found.done.items()]
        device = choose_device(workload.config.device, local=True)
        return FirstSteps(workload.config, pairs, device)

    return lambda name, entry, kept: steps()(name, entry, kept)


def in_a_job(workload: Workload, found: Standings) -> None:
    """Do the first steps in a job of Slurm's, with the options of a task, and wait for its end.

    Raises:
        SlurmError: Slurm refused, or the job failed.
    """
    run, chosen = workload.run, workload.config.slurm
    path = run.derived / "config.yml"
    _write(path, workload.config)
    python = [chosen.python or sys.executable, "-P", "-m", "d2m_hpc", "derive", str(path)]
    words = [*python, "--prepare", *["--allow-missing"] * bool(found.unfinished)]
    script = f"#!/bin/bash\n{sbatch.single(chosen, words)}\n"
    options = {**sbatch.options(chosen), "nodes": 1, "ntasks-per-node": 1, "wait": True}
    options |= {"job-name": "d2m-derive", "output": "derive-%j.out"}
    words = ["sbatch", f"--chdir={run.logs}", *sbatch.flags(options)]
    done = commands.call(*words, seconds=None, told=script)
    if done.returncode and not done.stdout.strip():
        raise SlurmError(sbatch.refusal(done.stderr, done.returncode))
    if done.returncode:
        log = run.logs / f"derive-{sbatch.job_id(done.stdout)}.out"
        raise SlurmError(f"the job of the first steps failed; {log} says why")
    began = time.monotonic()
    while not _is_prepared(workload, found):
        if time.monotonic() - began > SEEN_SECONDS:
            what = "the job of the first steps has ended, and its files are not to be seen here"
            raise SlurmError(f"{what}: is {run.derived} on a filesystem that all nodes share?")
        time.sleep(1)


def _write(path: Path, config: Config) -> None:
    values = config.model_dump(mode="json")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, yaml.safe_dump(values, sort_keys=False).encode(), has_secret(values))
