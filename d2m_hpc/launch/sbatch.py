"""Hand job arrays to sbatch: options, script, and hints on what sbatch refuses."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from d2m_hpc.config import Slurm
from d2m_hpc.errors import SlurmError
from d2m_hpc.launch import commands
from d2m_hpc.launch.slurm import Array, Kind, Need, Proposal
from d2m_hpc.run.folder import RunDir, Submission
from d2m_hpc.storage.files import atomic_write
from d2m_hpc.storage.urls import has_secret

USR2_SECONDS = 120
"""Seconds before the end of its walltime at which a task is told to stop."""


def options(config: Slurm, excluded: Sequence[str] = ()) -> dict[str, Any]:
    """sbatch's options by long names; `extra` wins over all, also by `false` and null."""
    exclude = ",".join(filter(None, [config.exclude or "", *excluded])) or None
    chosen = {
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "time": config.time,
        "cpus-per-task": config.cpus_per_task,
        "mem": config.mem,
        "gres": config.gres[0] if len(config.gres) == 1 else None,
        "constraint": config.constraint[0] if len(config.constraint) == 1 else None,
        "exclude": exclude,
        "ntasks-per-node": config.tasks_per_node,
        "requeue": True if config.requeue else None,
        "no-requeue": None if config.requeue else True,
        "open-mode": "append",
        "signal": f"USR2@{USR2_SECONDS}",
        **config.extra,
    }
    return given(chosen)


def kinds(config: Slurm) -> list[Kind]:
    """The kinds of nodes that each get arrays of their own; one of any nodes without lists."""
    columns = [values if len(values) > 1 else [] for values in (config.gres, config.constraint)]
    return [Kind(*row) for row in zip_longest(*columns, fillvalue="")] or [Kind()]


def given(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are left out."""
    return {k: v for k, v in chosen.items() if v is not None and v is not False}


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as they stand on a command line.

    Example:
        >>> flags({"exclusive": True, "nice": 100})
        ['--exclusive', '--nice=100']
    """
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in options.items()]


TEMPLATE = Path(__file__).with_name("array.sbatch")


def filled(setup: Sequence[str], failures: Path, task: str, most: int = 3) -> str:
    """`array.sbatch` with a run's own lines: notes for broken nodes, each setup line, the task.

    A node is broken where a setup line fails, or srun ends before the task has begun.

    Args:
        most: failures in a row on a node after which the array's pending elements leave it out.
    """
    lines = (f"d2m_setup {i} {shlex.quote(line)}" for i, line in enumerate(setup, 1))
    values = {"nodes": shlex.quote(str(failures)), "setup": "\n".join(lines), "task": task}
    values["most"] = str(most)
    # In one pass: what is filled in may hold such a mark, too.
    return re.sub("@(nodes|setup|task|most)@", lambda mark: values[mark[1]], TEMPLATE.read_text())


def command(
    run: RunDir, submission: Submission, config: Slurm, array: Array, options: dict[str, Any]
) -> str:
    """The command of an array element, in `array.sbatch`: one process for each of its tasks."""
    chosen = {
        "kill-on-bad-exit": 0,
        "unbuffered": True,
        "cpus-per-task": options.get("cpus-per-task"),  # from 22.05 on, srun ignores sbatch's
        **config.srun,
    }
    srun = ["d2m_task", "srun", *flags(given(chosen)), *config.launcher]
    # -P: a json.py in the folder where sbatch was called must not take the place of Python's own.
    python = [config.python or sys.executable, "-P", "-u", "-m", "d2m_hpc.worker"]
    told = [str(run.root), submission.name, str(array.first), str(array.tasks_per_node)]
    return shlex.join([*srun, *python, *told])


def single(config: Slurm, words: Sequence[str], cpus: int | None = None) -> str:
    """The script of a job of one process, which runs as an array task's would; its last line is the
    command."""
    srun = flags(given({"cpus-per-task": cpus, **config.srun}))
    # A line may say nothing where it fails, and may hold a secret.
    ended = "{ echo 'setup line %d failed' >&2; exit 4; }"
    setup = (f"eval {shlex.quote(s)} || {ended % i}" for i, s in enumerate(config.setup, 1))
    return "\n".join([*setup, shlex.join(["srun", "-n1", *srun, *config.launcher, *words])])


def script(
    run: RunDir,
    submission: Submission,
    config: Slurm,
    array: Array,
    options: dict[str, Any],
    most: int = 3,
) -> str:
    """The script for sbatch; all options stand on sbatch's command line.

    A folder in an #SBATCH line would be read for quotes and %, and SBATCH_* variables win over such
    lines. The one line left is a default that `slurm.extra` may change.

    Args:
        most: as `filled` takes it.
    """
    task = command(run, submission, config, array, options)
    return filled(config.setup, run.node_failures, task, most)


def made(
    run: RunDir, submission: Submission, config: Slurm, array: Array, proposal: Proposal
) -> tuple[list[str], str]:
    """The sbatch command that starts an array, but for the script's path; and the script."""
    options = flags(_array_options(array, proposal))
    failures = proposal.node_failures
    text = script(run, submission, config, array, proposal.options, failures)
    return ["sbatch", f"--chdir={run.logs}", *options], text


def prepared(
    run: RunDir, submission: Submission, config: Slurm, array: Array, proposal: Proposal
) -> list[str]:
    """Write an array's script into the run folder; return the sbatch command that starts it."""
    words, text = made(run, submission, config, array, proposal)
    path = run.logs / f"{array.name}.sh"
    secret = has_secret([config.setup, config.srun, config.launcher, words])
    atomic_write(path, text.encode(), private=secret)
    return [*words, str(path)]


def asked(words: Sequence[str], script: str) -> str:
    """Ask Slurm when an array would start, without submitting it.

    Raises:
        SlurmError: it would be refused, with sbatch's words.
    """
    # The run folder need not be there yet, nor the array that this one waits for.
    kept = [w for w in words[1:] if not w.startswith(("--chdir=", "--dependency="))]
    done = commands.call(words[0], "--test-only", *kept, seconds=commands.SECONDS, told=script)
    if done.returncode:
        raise SlurmError(refusal(done.stderr or done.stdout, done.returncode))
    return (done.stderr or done.stdout).strip().removeprefix("sbatch: ")


def submit(command: Sequence[str], script: str = "") -> str:
    """Hand a job to sbatch; return its job id.

    Not by submitit's executor: it renames a pickle an element to a name with the job id, so that
    no element of an array can start whose submit was killed between sbatch and these renames.

    Args:
        script: the script, where no word of the command names one.

    Raises:
        SlurmError: sbatch refused, with its words.
    """
    # Without a time limit: sbatch asks a slurmctld that restarts again and again.
    done = commands.call(*command, seconds=None, told=script)
    if done.returncode:
        raise SlurmError(refusal(done.stderr or done.stdout, done.returncode))
    return job_id(done.stdout)


def job_id(said: str) -> str:
    """The job id in sbatch's answer: `Submitted batch job 7`, `7` or `7;cluster`; raises without
    one."""
    found = re.search(r"job (\d+)|^\s*(\d+)(?:;.*)?$", said, re.MULTILINE)
    if found is None:
        raise SlurmError(
            f"sbatch answered {said.strip()[:200]!r}, which names no job: see whether `squeue "
            "--me` shows it, and whether sbatch is a wrapper here; the same command goes on from "
            "here"
        )
    return found[1] or found[2]


def _array_options(array: Array, proposal: Proposal) -> dict[str, Any]:
    limit = f"%{array.parallel}" if array.parallel else ""
    own = {
        "job-name": array.name,
        "array": f"0-{array.elements - 1}{limit}",
        "output": "slurm-%A_%a.out",
    }
    names = (*Need._fields, *Kind._fields)
    own |= {name: value for name in names if (value := getattr(array, name))}
    if array.after is not None:
        own["dependency"] = f"afterany:{proposal.arrays[array.after].job_id}"
    return {**proposal.options, **own}


HINTS = {
    r"submit limit|MaxSubmitJob|GrpSubmitJob|accounting/QOS policy": "the account or QOS takes no "
    "more jobs, or none so large or so long; `sacctmgr show assoc user=$USER` and `sacctmgr show "
    "qos` show the limits. Wait until array tasks have ended, or submit fewer at once by a larger "
    "shards_per_task",
    r"[Ii]nvalid account|account/partition": "check slurm.account, and whether the partition takes "
    "it, against `sacctmgr show assoc user=$USER`",
    r"QOS|qos": "check slurm.qos against `sacctmgr show assoc user=$USER format=account,qos`",
    r"time limit": "check slurm.time against `sinfo -o '%P %l'`",
    r"group not permitted|[Pp]ermission denied": "ask the administrators who may use the partition",
    r"partition": "check slurm.partition against `sinfo`",
    r"[Gg]eneric [Rr]esource|gres|[Ff]eature": "check slurm.gres and slurm.constraint against "
    "`sinfo -o '%P %G %f'`",
    r"[Rr]eservation|[Ll]icense": "check slurm.extra against `scontrol show reservation` and "
    "`scontrol show licenses`",
    r"dependency": "check the dependency in slurm.extra: it names jobs that Slurm still knows, as "
    "`scontrol show job` does",
    r"job array": "`scontrol show config` says what MaxArraySize is",
    r"node name": "check slurm.exclude against `sinfo -N`",
    r"node configuration|[Mm]emory specification|processors|Node count": "no node has what "
    "slurm.gres, mem and cpus_per_task ask for; `sinfo -o '%P %c %m %G'`",
    r"contact slurm controller|[Tt]imed out|connect": commands.PING,
}
"""What helps, by a pattern of sbatch's words; the first that is found."""


def refusal(words: str, code: int) -> str:
    """What sbatch refuses, in its own words, with a hint."""
    # Of an option that it does not know, its last line only says how to get help.
    said = re.findall(r"sbatch: error: (.*)", words) or re.findall(r"(?m)^sbatch: (.*)", words)
    said = said or words.strip().splitlines()[-1:]
    said = said or [f"sbatch ended with exit code {code} and said nothing"]
    told = " ".join(said)
    hint = next((h for words, h in HINTS.items() if re.search(words, told)), "see `man sbatch`")
    return f"Slurm refused: {'; '.join(said)} ({hint}; the same command goes on from here)"
