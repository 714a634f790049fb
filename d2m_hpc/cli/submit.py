"""`d2m-submit`, and what it would do."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2m_hpc.cli.common import ConfigFile, Overrides, load
from d2m_hpc.errors import SlurmError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from d2m_hpc.config import Config
    from d2m_hpc.plan.decide import Workload
    from d2m_hpc.worker.board import Board
    from d2m_hpc.worker.supervise import Past


def _slurm(help_text: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel="Slurm (the config's slurm: keys)")


SUBMIT_HELP = (
    "Compute what is left of a config's shards. The same command again goes on from there."
)


def submit(
    config: ConfigFile,
    set_: Overrides = None,
    local: Annotated[bool, typer.Option("--local", help="run in this process, no Slurm")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="until the last task has ended")] = False,
    no_sbatch: Annotated[bool, typer.Option("--no-sbatch", help="only print commands")] = False,
    preflight: Annotated[bool, typer.Option(help="look for what would fail on every node")] = True,
    recompute_changed: Annotated[
        bool, typer.Option("--recompute-changed", help="compute tars again that were replaced")
    ] = False,
    moved: Annotated[
        bool | None,
        typer.Option("--moved/--not-moved", help="tars elsewhere are those that were planned"),
    ] = None,
    partition: Annotated[str | None, _slurm("partition")] = None,
    account: Annotated[str | None, _slurm("account to charge")] = None,
    qos: Annotated[str | None, _slurm("quality of service")] = None,
    time: Annotated[str | None, _slurm("walltime of a task")] = None,
    cpus_per_task: Annotated[int | None, _slurm("cores of a task")] = None,
    mem: Annotated[str | None, _slurm("memory of a task")] = None,
    gres: Annotated[str | None, _slurm("such as gpu:1")] = None,
    constraint: Annotated[str | None, _slurm("node features")] = None,
    exclude: Annotated[str | None, _slurm("nodes to leave out")] = None,
    max_parallel: Annotated[int | None, _slurm("tasks at once")] = None,
    tasks_per_node: Annotated[int | None, _slurm("tasks in one array element")] = None,
    requeue: Annotated[bool | None, _slurm("let Slurm requeue preempted tasks")] = None,
    setup: Annotated[list[str] | None, _slurm("shell line before the task; repeatable")] = None,
    extra: Annotated[list[str] | None, _slurm("OPTION=VALUE of sbatch; repeatable")] = None,
) -> None:
    given = dict(locals())
    loaded = load(config, set_, _slurm_options(given))
    inspect = partial(_inspect, loaded, config, recompute_changed=recompute_changed, moved=moved)
    if dry_run:
        _dry_run(inspect(), local)
    elif local:
        raise typer.Exit(_supervised(inspect))
    elif no_sbatch:
        _write_only(inspect(preflight=preflight))
    else:
        raise typer.Exit(_run_slurm(inspect(preflight=preflight), wait))


def plan(config: ConfigFile, set_: Overrides = None) -> None:
    _dry_run(_inspect(load(config, set_), config), local=False)


def _slurm_options(given: dict[str, Any]) -> dict[str, Any]:
    """The command line's values of the config's `slurm:` keys."""
    from d2m_hpc.config import Slurm

    options = {key: given[key] for key in Slurm.model_fields if key in given}
    if options["extra"] is not None:
        pairs = (text.partition("=") for text in options["extra"])
        options["extra"] = {key: _plain(value) if equals else True for key, equals, value in pairs}
    return options


def _plain(value: str) -> Any:
    """As in the config: `true`, `false` and `null` are no texts."""
    return {"true": True, "false": False, "null": None}.get(value, value)


def _inspect(
    config: Config,
    path: Path,
    preflight: bool = False,
    recompute_changed: bool = False,
    moved: bool | None = None,
) -> Workload:
    from d2m_hpc.plan import decide

    workload = decide.inspect(config, str(path), thorough=preflight)
    workload.recompute_changed, workload.moved = recompute_changed, moved
    return workload


def _require_slurm() -> None:
    from d2m_hpc.launch import slurm

    if not slurm.is_here():
        raise SlurmError("there is no sbatch here; go to a login node, or run with --local")


def _dry_run(workload: Workload, local: bool) -> None:
    from d2m_hpc.launch import arrays
    from d2m_hpc.run.outputs import OutputDir
    from d2m_hpc.run.owner import require_own
    from d2m_hpc.watch import terminal

    require_own(OutputDir(workload.config.output_metadata_dir), workload.run, take=False)
    decision = arrays.look(workload)
    terminal.decision(decision)
    if decision.pending and not local:
        terminal.proposal(arrays.propose(decision, "next"))


def _run_slurm(workload: Workload, wait: bool) -> int:
    from d2m_hpc.launch import arrays, flow
    from d2m_hpc.watch import terminal
    from d2m_hpc.watch.status import summarise

    slurm = arrays.SlurmArrays()
    flow.submit(workload, slurm, terminal.decision)
    terminal.submitted(slurm.arrays)
    if not wait:
        return 0
    arrays.wait(workload.run)
    summary = summarise(workload.run, workload.config)
    terminal.summary(summary)
    return 0 if summary.complete else 1


def _write_only(workload: Workload) -> None:
    from d2m_hpc.launch import arrays, flow
    from d2m_hpc.watch import terminal

    by_hand = arrays.ByHand()
    flow.submit(workload, by_hand, terminal.decision)
    for command in by_hand.commands:
        print(command)


def _supervised(inspect: Callable[[], Workload]) -> int:
    """Run in a child of this process, which tells what becomes of it."""
    from d2m_hpc.stopping import interrupt_once
    from d2m_hpc.worker.supervise import supervised

    def unfit(why: str) -> int:
        print(f"error: {why}", file=sys.stderr)
        return 1

    def work(board: Board | None, past: Past) -> int:
        if board is not None:
            interrupt_once()
        return _run_local(inspect(), board, past.blamed)

    return supervised(work, unfit)


def _run_local(workload: Workload, board: Board | None, left_out: Collection[str]) -> int:
    """Run, show how it ended; 1 when a shard failed, now or before."""
    from d2m_hpc.launch import flow
    from d2m_hpc.launch.local import ThisProcess
    from d2m_hpc.watch import live, terminal
    from d2m_hpc.watch.status import summarise

    try:
        here = ThisProcess(live.progress, board)
        flow.submit(workload, here, terminal.decision, left_out)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    summary = summarise(workload.run, workload.config)
    terminal.summary(summary)
    return 0 if summary.complete else 1
