"""squeue's reasons, in words that help."""

from __future__ import annotations

import pytest

from d2m_hpc.launch import slurm, waiting
from d2m_hpc.launch.slurm import Array

ARRAY = Array("d2m-r-000-0", 0, 5, job_id="31")
OTHER = Array("d2m-r-000-1", 5, 2, job_id="32")


def queue(*rows: str) -> slurm.Queue:
    """Of rows such as `31_0 PENDING Resources`."""
    lines = []
    for row in rows:
        job, state, reason = row.split(" ", 2)
        array, _, index = job.partition("_")
        name = {"31": ARRAY.name, "32": OTHER.name}.get(array, "mine")
        lines.append(f"{array}|{index}|{state}|{reason}||{name}")
    return slurm.parse_queue("\n".join(lines))


@pytest.mark.parametrize(
    ("reason", "says", "helps", "never"),
    [
        ("launch failed requeued held", "a node could not start them", "scontrol release 31", True),
        ("user_env_retrieval_failed_requeued_held", "could not start", "scontrol release 31", True),
        ("JobHeldUser", "held by their user", "`scontrol release 31`", True),
        ("JobHeldAdmin", "held by an administrator", "scontrol release 31", True),
        ("job_requeued_in_held_state", "or by Slurm", "scontrol release 31", True),
        ("BadConstraints", "slurm.constraint, gres", "d2m cancel", True),
        ("DependencyNeverSatisfied", "or Slurm does not know it", "jobid=31 dependency=", True),
        ("DependencyNeverSatisfied", "did not end as", "change slurm.extra's dependency", True),
        ("InvalidQOS", "slurm.qos may not", "sacctmgr", True),
        ("PartitionTimeLimit", "more than a limit allows", "scontrol show partition", True),
        ("QOSMaxWallDurationPerJobLimit", "more than a limit allows", "sacctmgr", True),
        ("AssocMaxCpuPerJobLimit", "more than a limit allows", "sacctmgr", True),
        ("QOSMaxJobsPerUserLimit", "a limit of the QOS", "sacctmgr show qos", False),
        ("AssocGrpGRES", "a limit of the QOS or account", "sacctmgr show assoc", False),
        ("AssocGrpCPUMinutesLimit", "budget is spent", "sshare", False),
        ("MaxGRESPerAccount", "a limit of the QOS", "sacctmgr", False),
        ("PartitionDown", "the partition is down", "sinfo -s", False),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-4]", "down, drained or res", "sinfo -R", False),
        ("Nodes required for job are DOWN, DRAINED", "down, drained or res", "sinfo -R", False),
        ("JobArrayTaskLimit", "slurm.max_parallel", "in turn", False),
        ("Dependency", "another array or job", "squeue", False),
        ("Priority", "wait for their turn", "squeue --me --start", False),
        ("None", "wait for their turn", "squeue --me --start", False),
        ("Licenses", "licence", "scontrol show licenses", False),
        ("SomethingNewIn2031", "squeue says no more", "man squeue", False),
    ],
)
def test_each_reason_is_told_with_what_helps(
    reason: str, says: str, helps: str, never: bool
) -> None:
    [found] = waiting.why(queue(f"31_0 PENDING {reason}", f"31_3 PENDING {reason}"), [ARRAY])
    assert (found.tasks, found.never) == (2, never)
    assert says in str(found)
    [one] = waiting.why(queue(f"31_0 PENDING {reason}"), [ARRAY])
    assert str(one).startswith("1 array task does not run (")
    assert helps in str(found)
    assert reason.partition(",")[0].replace(" ", "_") in str(found)


def test_what_needs_a_hand_comes_first_and_other_jobs_do_not_count() -> None:
    asked = queue(
        "31_0 RUNNING None",
        "31_1 PENDING Resources",
        "31_2 PENDING Resources",
        "32_0 PENDING JobHeldUser",
        "32_1 SUSPENDED None",
        "40_0 PENDING BadConstraints",
        "31_4 COMPLETING None",
    )
    found = waiting.why(asked, [ARRAY, OTHER])
    assert [(w.reason, w.tasks) for w in found] == [
        ("JobHeldUser", 1),
        ("Resources", 2),
        ("SUSPENDED", 1),
    ]
    assert "scontrol resume 32" in str(found[2])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["31_0 PENDING JobHeldUser", "32_0 PENDING BadConstraints"], True),
        (["31_0 PENDING JobHeldUser", "32_0 PENDING Priority"], False),
        (["31_0 PENDING JobHeldUser", "32_0 RUNNING None"], False),
        (["31_0 PENDING JobHeldUser", "32_0 REQUEUED None"], False),
        (["31_0 PENDING JobHeldUser", "32_0 COMPLETING None"], True),
        (["31_0 PENDING PartitionDown"], False),
        (["31_0 COMPLETING None"], False),
        ([], False),
    ],
)
def test_a_run_is_stuck_when_nothing_of_it_can_start(rows: list[str], expected: bool) -> None:
    assert bool(waiting.stuck(queue(*rows), [ARRAY, OTHER])) == expected


def test_a_command_names_a_few_jobs() -> None:
    arrays = [Array(f"a-{i}", i, 1, job_id=str(50 + i)) for i in range(5)]
    lines = [f"{a.job_id}|0|PENDING|JobHeldUser||{a.name}" for a in arrays]
    [found] = waiting.why(slurm.parse_queue("\n".join(lines)), arrays)
    assert "`scontrol release 50,51,52,...`" in str(found)
