"""Let a run's live arrays follow its config: tasks at once, nodes to leave out."""

from __future__ import annotations

from collections.abc import Sequence

from d2m_hpc.errors import SlurmError
from d2m_hpc.launch import slurm
from d2m_hpc.launch.commands import ask
from d2m_hpc.plan.workload import Workload
from d2m_hpc.storage.texts import counted


def follow(workload: Workload, queue: slurm.Queue, broken: Sequence[str]) -> list[str]:
    """Change live arrays whose limit or nodes are no longer those of the config.

    Args:
        broken: the nodes to leave out besides the config's own.

    Returns:
        What was changed, and what Slurm refused.
    """
    config, told = workload.config.slurm, []
    for name, arrays in queue.submitted.items():
        if not any(queue.live(array) for array in arrays):
            continue
        try:
            # First the nodes, as elements start at once where more may run.
            if any(workload.run.node_failures.glob("*.json")):
                _leave_out(arrays, queue, ",".join(filter(None, [config.exclude or "", *broken])))
            if changed := _throttle(arrays, queue, config.max_parallel):
                slurm.write_arrays(workload.run.submission(name), arrays)
                most = counted(config.max_parallel or 0, "task")
                at_once = f"at most {most}" if config.max_parallel else "all tasks"
                live = counted(changed, "live array")
                told.append(f"{at_once} may run at once now, in {live}")
        except SlurmError as error:
            told.append(f"live array tasks stay as they are: {error}")
    return told


def _throttle(arrays: list[slurm.Array], queue: slurm.Queue, most: int | None) -> int:
    """Give each array its share of `max_parallel`, and at least one; returns how many changed."""
    elements = max(1, most // arrays[0].tasks_per_node) if most else 0
    abreast, changed = sum(array.after is None for array in arrays), 0
    for place, array in enumerate(arrays):
        share = max(1, slurm.share(elements, abreast, place)) if elements else 0
        if share != array.parallel and (live := queue.live(array)):
            ask("scontrol", "update", f"jobid={live[0].job_id}", f"arraytaskthrottle={share}")
            array.parallel = share
            changed += 1
    return changed


def _leave_out(arrays: list[slurm.Array], queue: slurm.Queue, wanted: str) -> None:
    """Replace the nodes that elements which failed have left out for their pending siblings.

    Nodes are forgotten that were mended, or are gone.
    """
    for array in arrays:
        if pending := [e for e in queue.live(array) if e.state == slurm.PENDING]:
            job = pending[0].job_id
            words = ("--noheader", f"--jobs={job}", "--states=PENDING", "--format=%x")
            if {*ask("squeue", *words).split()} - {wanted or "(null)"}:
                # By index, as Slurm refuses it for elements that run.
                which = ",".join(str(e.index) for e in pending)
                ask("scontrol", "update", f"jobid={job}_[{which}]", f"excnodelist={wanted}")
