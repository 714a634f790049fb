"""Tell why array tasks do not run, by squeue's reasons, and what helps."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from d2m_hpc.errors import SlurmError
from d2m_hpc.launch.slurm import Array, Element, Queue
from d2m_hpc.storage.texts import counted

WAITING = {"PENDING", "SUSPENDED", "REQUEUE_HOLD", "SPECIAL_EXIT", "STOPPED", "RESV_DEL_HOLD"}
FEW = 3
"""Job ids in a command."""


RELEASE = "`scontrol release {jobs}` lets them go"
AGAIN = "`d2m cancel CONFIG` or `scancel {jobs}`, mend the config, and submit again"
Meanings = dict[str, tuple[str, str]]
"""By a pattern of reasons: the meaning and the command that helps; `{jobs}` are the arrays."""

NEVER: Meanings = {
    r"launch_?failed|user_env_retrieval_failed": (
        "a node could not start them; Slurm holds them",
        f"`sinfo -R`; {RELEASE}",
    ),
    r"JobHeldUser": ("held by their user", RELEASE),
    r"JobHeldAdmin|requeued_?in_?held_?state|JobHoldMaxRequeue|held": (
        "held by an administrator, or by Slurm",
        f"ask them, or: {RELEASE}",
    ),
    r"BadConstraints|PartitionNodeLimit|PartitionConfig": (
        "no node of the partition has what slurm.constraint, gres, mem, cpus_per_task and exclude "
        "leave",
        f"`sinfo -N -o '%N %P %f %G %c %m'`; {AGAIN}",
    ),
    r"DependencyNeverSatisfied": (
        "the job that they wait for did not end as they need it, or Slurm does not know it",
        "`scontrol update jobid={jobs} dependency=` takes the condition away; or `d2m cancel "
        "CONFIG`, change slurm.extra's dependency, and submit again",
    ),
    r"InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed|AssocNotAllowed": (
        "slurm.account or slurm.qos may not be used here",
        f"`sacctmgr show assoc user=$USER`; {AGAIN}",
    ),
    r"PartitionTimeLimit|(QOS|Association|Assoc)(TimeLimit|MaxWall)|PerJob(Limit)?$|MaxMemPerLimit"
    r"|MaxWallDurationPerJob|DeadLine": (
        "a single task asks for more than a limit allows",
        f"`scontrol show partition`, `sacctmgr show qos`; {AGAIN}",
    ),
}
"""Reasons for which a task never starts by itself."""

PASSING: Meanings = {
    r"Minutes|RunMinutes|UsageThreshold|GrpBilling": (
        "the account's or QOS' budget is spent",
        "`sshare -l`; ask who keeps the account",
    ),
    r"^(QOS|Assoc|Max)|JobLimit|ResourceLimit": (
        "a limit of the QOS or account is reached",
        "they start as other jobs end; `sacctmgr show qos`, `sacctmgr show assoc user=$USER`",
    ),
    r"PartitionDown|PartitionInactive": (
        "the partition is down",
        "`sinfo -s`; its administrators know until when",
    ),
    r"ReqNodeNotAvail|NodeDown|Nodes_?required|DOWN|DRAINED|Reservation|FrontEndDown|NotAvail": (
        "the nodes are down, drained or reserved",
        "`sinfo -R`, `scontrol show res`",
    ),
    r"JobArrayTaskLimit": ("slurm.max_parallel tasks run already", "they start in turn"),
    r"^Dependency$": ("they wait for another array or job to end", "`squeue --me -o '%F %E'`"),
    r"^(Resources|Priority|None|)$|SchedDefer|Cleaning|Prolog|Reboot": (
        "they wait for their turn",
        "`squeue --me --start` says when",
    ),
    r"BeginTime": ("their start time has not come", "`squeue --me --start` says when"),
    r"License": ("a licence is in use", "`scontrol show licenses`"),
    r"": ("squeue says no more", "`man squeue`, JOB REASON CODES"),
}
SUSPENDED: Meanings = {r"": ("they are suspended", "`scontrol resume {jobs}`, by an administrator")}


@dataclass(frozen=True)
class Waiting:
    """Array tasks that do not run, for one of Slurm's reasons.

    Attributes:
        reason: squeue's word.
        tasks: the number of array elements.
        help: the command that helps.
        never: the tasks cannot start until somebody acts.
    """

    reason: str
    tasks: int
    what: str
    help: str
    never: bool

    def __str__(self) -> str:
        tasks = counted(self.tasks, "array task does", "array tasks do")
        return f"{tasks} not run ({self.reason}): {self.what}; {self.help}"


def why(queue: Queue, arrays: Iterable[Array]) -> list[Waiting]:
    """The reasons of a run's waiting elements; reasons that need somebody come first."""
    groups: dict[str, list[Element]] = defaultdict(list)
    for array in arrays:
        for element in queue.live(array):
            if element.state in WAITING:
                held = element.state if element.state != "PENDING" else ""
                groups[_reason(element.reason) or held or "None"].append(element)
    found = [_waiting(reason, elements) for reason, elements in groups.items()]
    return sorted(found, key=lambda w: (not w.never, -w.tasks))


def _reason(said: str) -> str:
    """squeue's reason without node names: `ReqNodeNotAvail, UnavailableNodes:n[1-4]`."""
    word = said.strip().strip("()").partition(",")[0].replace(" ", "_")
    return "" if word == "None" else word


def _waiting(reason: str, elements: list[Element]) -> Waiting:
    tables = (SUSPENDED,) if elements[0].state == "SUSPENDED" else (NEVER, PASSING)
    meanings = ((table, words) for table in tables for words in table)
    table, words = next(m for m in meanings if re.search(m[1], reason, re.IGNORECASE))
    what, help_ = table[words]
    ids = list(dict.fromkeys(e.job_id for e in elements))
    jobs = ",".join(ids[:FEW]) + (",..." if len(ids) > FEW else "")
    return Waiting(reason, len(elements), what, help_.format(jobs=jobs), table is NEVER)


def stuck(queue: Queue, arrays: Iterable[Array]) -> list[Waiting]:
    """The reasons where no live element runs or can start by itself; else an empty list."""
    arrays = list(arrays)
    live = sum(len(queue.live(array)) for array in arrays)
    never = [w for w in why(queue, arrays) if w.never]
    return never if sum(w.tasks for w in never) == live else []


def silence(silent: Mapping[str, str]) -> str:
    """What array tasks by `slurm.silent` may be at, and what helps."""
    first, node = next(iter(silent.items()))
    who = f"{len(silent)} array tasks ({first} on {node}, ...) have"
    if len(silent) == 1:
        who = f"array task {first} on {node} has"
    return (
        f"{who} told nothing for minutes: a disk or an import may hang, or Slurm calls running "
        f"what its node has lost; `d2m logs CONFIG --task {first}`; `scancel {first}` leaves its "
        "shards to the next submit"
    )


class Stuck(SlurmError):
    """No remaining task of a run can start until somebody acts."""

    def __init__(self, reasons: Sequence[Waiting]) -> None:
        super().__init__("nothing that is left can start: " + "; ".join(map(str, reasons)))
