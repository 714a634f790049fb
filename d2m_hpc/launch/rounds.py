"""A run that goes on by itself: a small job submits again what the array tasks have left.

The job waits, by `--dependency=afterany`, for the arrays of a submit. It looks at the run, submits
what is left, and starts its own successor; so nothing runs on a login node. All that a round must
know lies in the run folder: `rounds.json`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from d2m_hpc.config import Config, Slurm
from d2m_hpc.config.load import load
from d2m_hpc.errors import ConfigError, D2MError, SlurmError, WeightsError
from d2m_hpc.launch import derive, ended, flow, sbatch, slurm
from d2m_hpc.launch.arrays import SlurmArrays
from d2m_hpc.plan import workload
from d2m_hpc.plan.decide import Decision
from d2m_hpc.plan.standing import standings
from d2m_hpc.run import fingerprints
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.run.records import DERIVED
from d2m_hpc.run.rounds import IDLE, Chain, Round, Rounds, read, write
from d2m_hpc.run.tasks import attempts
from d2m_hpc.storage.texts import ERROR, safe

PATIENCE = 600.0
"""Seconds for which a round waits for a controller that is away."""
SOON, LATE = 30, 3600
"""Seconds until the next round, where a submit failed: first, and at most."""
PAUSES = "60 120 240 480"
"""Seconds until a round that has not come to its end is tried again, in its job."""
TRIES, PAUSE = 5, 60.0
"""How often a round asks for its successor, and the seconds between."""
ON_DISK = 15.0
"""Seconds after which slurmctld has surely written down a job that it took (5, by its source)."""


def begin(run: RunDir, config: Config, wish: Rounds) -> str:
    """Let a run that was just submitted go on by itself; returns the first round's job id.

    Rounds that an earlier submit began are cancelled.

    Raises:
        SlurmError: Slurm refused, or does not answer.
    """
    slurm.cancel(sorted(slurm.live_rounds(run, PATIENCE)))
    write(run, Chain(wish, os.getcwd()))
    return _follow(run, config)


def again(run: RunDir) -> Chain:
    """Do one round: look, submit what is left, and let another round follow.

    Raises:
        D2MError: the run does not go on by itself.
        SlurmError: no other round can be submitted.
    """
    chain = read(run)
    if chain is None:
        raise D2MError(f"{run.root} does not go on by itself; submit with --until-done")
    if chain.ended:  # by this job, before it was requeued
        return chain
    known = len(run.submissions())
    config = _config(run)
    this = _look(run, config, chain)
    if not chain.ended:
        _submit_rest(run, config, known, chain, this)
    is_kept = _keep(run, chain)
    if chain.ended:
        _tell(run, config, chain)
    elif not _is_followed(run):
        # Rounds that cannot be counted, as on a full disk, must be few.
        _follow_in_the_end(run, config, chain, _pause(chain) if is_kept else LATE)
    return chain


def secure(run: RunDir, chain: Chain) -> None:
    """Stay until Slurm has the next round on its disk; submit it again where Slurm forgot it.

    slurmctld takes jobs before it writes them down: one that is killed in between knows nothing of
    them when it starts again.

    Args:
        chain: as `again` has left it.
    """
    if chain.ended or not _own():
        return
    time.sleep(ON_DISK)
    now = read(run)
    is_last = now is not None and not now.ended and len(now.rounds) <= len(chain.rounds)
    if is_last and not _is_followed(run):
        print("Slurm has forgotten the next round; submitting it again", file=sys.stderr)
        _follow_in_the_end(run, _config(run), chain, _pause(chain))


def _is_followed(run: RunDir) -> bool:
    """Whether a round after this job's waits or runs; those before it may not have ended yet."""
    return any(int(job) > _own() for job in slurm.live_rounds(run, PATIENCE))


def _own() -> int:
    """The id of this job; 0 where somebody does a round by hand."""
    return int(os.environ.get("SLURM_ARRAY_JOB_ID", 0))


def _pause(chain: Chain) -> int:
    """Seconds until the next round, where no array task is left to wait for."""
    troubles = chain.troubles()
    return min(LATE, SOON << min(troubles - 1, 10)) if troubles else 0


def _keep(run: RunDir, chain: Chain) -> bool:
    """Write the chain; whether that went well."""
    try:
        write(run, chain)
    except OSError as error:
        print(f"this round is not on record: {error}", file=sys.stderr)
        return False
    return True


def _config(run: RunDir) -> Config:
    config = load(run.config, frozen=True)
    if workload.run_dir(config).root == run.root:
        return config
    return config.model_copy(update={"run_dir": str(run.root)})  # of a store, beside the user


def _look(run: RunDir, config: Config, chain: Chain) -> Round:
    """Add a round to the chain; end the chain where no further round would help."""
    manifest = Manifest.load(run)
    found = standings(run, config, manifest)
    tries = sum(map(len, manifest.failures.values()))
    this = Round(time.time(), sum(map(found.has_all, found.stems)), len(found.stems), tries)
    why: list[str] = []
    with suppress(SlurmError):  # the submit that follows tells it
        ends = ended.find(run, slurm.queue(run, PATIENCE), attempts(run), found.has_all)
        this.causes = sorted({end.cause for end in ends})
        this.taken = not ended.TAKEN.isdisjoint(this.causes)
        why = [*map(str, ended.told(ends, config.slurm))]
    chain.rounds.append(this)
    if found.is_complete:
        chain.end("complete", "the run is complete")
    elif len(chain.rounds) > chain.wish.most:
        chain.end("stopped", "there were as many rounds as --max-rounds allows")
    elif chain.is_idle():
        chain.end("stopped", "; ".join([f"{IDLE} rounds in a row came to nothing", *why]))
    return this


class _Newer(D2MError):
    """A user has submitted the run meanwhile, maybe with another config."""


class _Arrays(SlurmArrays):
    """Array tasks of a config that is still the run's newest; looked up under the run's lock."""

    def __init__(self, submissions: int) -> None:
        super().__init__()
        self._submissions = submissions

    def look(self, workload: workload.Workload) -> Decision:
        if len(workload.run.submissions()) != self._submissions:
            raise _Newer("another submit came before; the next round follows its config")
        return super().look(workload)


def _submit_rest(run: RunDir, config: Config, known: int, chain: Chain, this: Round) -> None:
    """
    Args:
        known: the number of submissions when the config was read.
    """
    try:
        asked = workload.inspect(config, str(run.config), thorough=False)
        if DERIVED in fingerprints.newest(run):
            decision = derive.derive(asked, _Arrays(known), allow_missing=True)
        else:
            decision = flow.submit(asked, _Arrays(known))
    except _Newer as error:
        print(error, file=sys.stderr)
    except (ConfigError, WeightsError) as error:  # which somebody must mend
        chain.end("stopped", f"the submit failed: {safe(str(error), ERROR)}")
    except (D2MError, OSError) as error:
        this.trouble = safe(str(error), ERROR)
        print(f"{error}; the next round tries again", file=sys.stderr)
    else:
        if not (decision.pending or decision.in_flight):
            what = "no shard is left that may be tried again; `d2m status` says what failed"
            chain.end("stopped", what)


def _follow_in_the_end(run: RunDir, config: Config, chain: Chain, later: int) -> None:
    """Submit the next round; try again where Slurm refuses, as at a limit of jobs."""
    for left in reversed(range(TRIES)):
        try:
            _follow(run, config, later)
            return
        except SlurmError as error:
            if not left:
                chain.end("stopped", f"the next round could not be submitted: {error}")
                _keep(run, chain)
                _tell(run, config, chain)
                raise
        time.sleep(PAUSE)


def _follow(run: RunDir, config: Config, later: int = 0) -> str:
    """Submit the next round, behind all live array tasks."""
    queue = slurm.queue(run, PATIENCE)
    live = sorted({e.job_id for a in queue.arrays for e in queue.live(a)}, key=int)
    when = {"dependency": f"afterany:{':'.join(live)}"} if live else {"begin": f"now+{later}"}
    # An array of one element, as the queue lists the run's other jobs.
    own = {"job-name": slurm.rounds_of(run).name, "array": "0-0", "output": "next-%A.out", **when}
    words = [sys.executable, "-P", "-m", "d2m_hpc", "again", str(run.root)]
    # A node may lack the run folder's mount for a while, or the venv's.
    line = f"for wait in {PAUSES}; do {shlex.join(words)} && exit; sleep $wait; done\nexit 1"
    return start(run, line, {**options(config.slurm), **own})


def options(chosen: Slurm) -> dict[str, Any]:
    """sbatch's options of a job that needs no GPU."""
    return {
        "partition": chosen.partition,
        "account": chosen.account,
        "qos": chosen.qos,
        "time": 60,
        "cpus-per-task": 1,
        "nodes": 1,
        "requeue": True,
        **chosen.rounds,
    }


def start(run: RunDir, line: str, options: dict[str, Any]) -> str:
    """Submit a job; its script is in no file, which a full disk would not take."""
    flags = sbatch.flags(sbatch.given(options))
    words = ["sbatch", f"--chdir={run.logs}", *flags]
    return sbatch.submit(words, f"#!/bin/bash\n{line}\n")


def _tell(run: RunDir, config: Config, chain: Chain) -> None:
    """Start the job of `then`, if the run is complete; run `notify`."""
    if chain.wish.then and chain.state == "complete":
        line = f"cd {shlex.quote(chain.folder)}\nexport D2M_RUN={shlex.quote(str(run.root))}"
        own = {"job-name": "d2m-then", "output": "then-%j.out"}
        start(run, f"{line}\n{chain.wish.then}", {**options(config.slurm), **own})
    if chain.wish.notify:
        told = {"D2M_RUN": str(run.root), "D2M_STATE": chain.state, "D2M_WHY": chain.ended}
        environment = {**os.environ, **told}
        subprocess.run(["bash", "-c", chain.wish.notify], env=environment, check=False)
