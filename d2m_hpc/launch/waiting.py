"""Why array tasks do not run, by squeue's reasons, and what helps."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from d2m_hpc.errors import SlurmError
from d2m_hpc.launch.slurm import Array, Element, Queue

WAITING = {"PENDING", "SUSPENDED", "REQUEUE_HOLD", "SPECIAL_EXIT", "STOPPED", "RESV_DEL_HOLD"}
FEW = 3
"""Job ids that a command names."""


@dataclass(frozen=True)
class Meaning:
    """What a reason of Slurm's says.

    Attributes:
        help: the command that helps; `{jobs}` are the arrays' ids.
        never: nothing but somebody's hand will let such a task start.
    """

    what: str
    help: str
    never: bool = False


RELEASE = "`scontrol release {jobs}` lets them go"
AGAIN = "`d2m cancel CONFIG`, mend the config, and submit again"
MEANINGS: tuple[tuple[str, Meaning], ...] = (
    (
        r"launch_?failed|user_env_retrieval_failed",
        Meaning("a node could not start them; Slurm holds them", f"`sinfo -R`; {RELEASE}", True),
    ),
    (r"JobHeldUser", Meaning("held by their user", RELEASE, True)),
    (
        r"JobHeldAdmin|requeued_?in_?held_?state|JobHoldMaxRequeue|held",
        Meaning("held by an administrator, or by Slurm", f"ask them, or: {RELEASE}", True),
    ),
    (
        r"BadConstraints|PartitionNodeLimit|PartitionConfig",
        Meaning(
            "no node of the partition has what slurm.constraint, gres, mem, cpus_per_task and "
            "exclude leave",
            f"`sinfo -N -o '%N %P %f %G %c %m'`; {AGAIN}",
            True,
        ),
    ),
    (
        r"DependencyNeverSatisfied",
        Meaning(
            "the job that they wait for did not end as they need it",
            "`scontrol update jobid={jobs} dependency=` takes the condition away; or `d2m cancel "
            "CONFIG`, and submit again",
            True,
        ),
    ),
    (
        r"InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed|AssocNotAllowed",
        Meaning(
            "slurm.account or slurm.qos may not be used here",
            f"`sacctmgr show assoc user=$USER`; {AGAIN}",
            True,
        ),
    ),
    (
        r"PartitionTimeLimit|(QOS|Association|Assoc)(TimeLimit|MaxWall)|PerJob(Limit)?$|MaxMemPerLimit"
        r"|MaxWallDurationPerJob|DeadLine",
        Meaning(
            "a single task asks for more than a limit allows",
            f"`scontrol show partition`, `sacctmgr show qos`; {AGAIN}",
            True,
        ),
    ),
    (
        r"Minutes|RunMinutes|UsageThreshold|GrpBilling",
        Meaning("the account's or QOS' budget is spent", "`sshare -l`; ask who keeps the account"),
    ),
    (
        r"^(QOS|Assoc|Max)|JobLimit|ResourceLimit",
        Meaning(
            "a limit of the QOS or account is reached",
            "they start as other jobs end; `sacctmgr show qos`, `sacctmgr show assoc user=$USER`",
        ),
    ),
    (
        r"PartitionDown|PartitionInactive",
        Meaning("the partition is down", "`sinfo -s`; its administrators know until when"),
    ),
    (
        r"ReqNodeNotAvail|NodeDown|Nodes_?required|DOWN|DRAINED|Reservation|FrontEndDown|NotAvail",
        Meaning("the nodes are down, drained or reserved", "`sinfo -R`, `scontrol show res`"),
    ),
    (r"JobArrayTaskLimit", Meaning("slurm.max_parallel tasks run already", "they start in turn")),
    (r"^Dependency$", Meaning("they wait for another array to end", "`squeue --me -o '%F %E'`")),
    (
        r"^(Resources|Priority|None|)$|SchedDefer|Cleaning|Prolog|Reboot",
        Meaning("they wait for their turn", "`squeue --me --start` says when"),
    ),
    (
        r"BeginTime",
        Meaning("their start time has not come", "`squeue --me --start` says when"),
    ),
    (r"License", Meaning("a licence is in use", "`scontrol show licenses`")),
)
SUSPENDED = Meaning("they are suspended", "`scontrol resume {jobs}`, by an administrator")
OTHER = Meaning("squeue says no more", "`man squeue`, JOB REASON CODES")


@dataclass(frozen=True)
class Waiting:
    """Array tasks that do not run, for one of Slurm's reasons.

    Attributes:
        reason: squeue's word.
        tasks: how many array elements.
        help: the command that helps.
        never: they cannot start until somebody does something.
    """

    reason: str
    tasks: int
    what: str
    help: str
    never: bool

    def __str__(self) -> str:
        return f"{self.tasks} array tasks do not run ({self.reason}): {self.what}; {self.help}"


def why(queue: Queue, arrays: Iterable[Array]) -> list[Waiting]:
    """The reasons of a run's elements that wait, first those that do not pass of themselves."""
    groups: dict[str, list[Element]] = defaultdict(list)
    for array in arrays:
        for element in queue.live(array):
            if element.state in WAITING:
                held = element.state if element.state != "PENDING" else ""
                groups[_reason(element.reason) or held or "None"].append(element)
    found = [_waiting(reason, elements) for reason, elements in groups.items()]
    return sorted(found, key=lambda w: (not w.never, -w.tasks))


def _reason(said: str) -> str:
    """Without what names nodes: `ReqNodeNotAvail, UnavailableNodes:n[1-4]`."""
    word = said.strip().strip("()").partition(",")[0].replace(" ", "_")
    return "" if word == "None" else word


def _waiting(reason: str, elements: list[Element]) -> Waiting:
    found = _meaning(reason, elements[0].state)
    ids = list(dict.fromkeys(e.job_id for e in elements))
    jobs = ",".join(ids[:FEW]) + (",..." if len(ids) > FEW else "")
    return Waiting(reason, len(elements), found.what, found.help.format(jobs=jobs), found.never)


def _meaning(reason: str, state: str) -> Meaning:
    if state == "SUSPENDED":
        return SUSPENDED
    return next((m for words, m in MEANINGS if re.search(words, reason, re.IGNORECASE)), OTHER)


def stuck(queue: Queue, arrays: Iterable[Array]) -> list[Waiting]:
    """The reasons, where no live element of a run runs or can start by itself; else nothing."""
    arrays = list(arrays)
    live = sum(len(queue.live(array)) for array in arrays)
    never = [w for w in why(queue, arrays) if w.never]
    return never if sum(w.tasks for w in never) == live else []


class Stuck(SlurmError):
    """What is left of a run cannot start until somebody does something."""

    def __init__(self, reasons: Sequence[Waiting]) -> None:
        super().__init__("nothing that is left can start: " + "; ".join(map(str, reasons)))
