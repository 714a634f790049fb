"""`d2m-submit`, and `d2m plan`, which only shows what a submit would do."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2m_hpc import api
from d2m_hpc.cli.common import ConfigFile, Overrides, echo, load, outlive_readers, waiting, whole
from d2m_hpc.cli.options import WithSlurmOptions
from d2m_hpc.errors import ConfigError, D2MError

if TYPE_CHECKING:
    from collections.abc import Callable

    from d2m_hpc.launch.flow import Backend
    from d2m_hpc.plan.decide import Decision
    from d2m_hpc.plan.workload import Workload
    from d2m_hpc.worker.board import Board
    from d2m_hpc.worker.supervise import Past


ROUNDS = 20

UntilDone = Annotated[
    bool, typer.Option("--until-done", help="let small jobs submit again what is left")
]
MaxRounds = Annotated[int, typer.Option(parser=whole(1), metavar="N", help="of --until-done")]
Then = Annotated[
    str, typer.Option(metavar="LINE", help="shell line of a job, once --until-done is complete")
]
Notify = Annotated[
    str, typer.Option(metavar="LINE", help="shell line to run, once --until-done has ended")
]
RecomputeChanged = Annotated[
    bool, typer.Option("--recompute-changed", help="compute tars again that were replaced")
]
PrintSbatch = Annotated[
    bool, typer.Option("--print-sbatch", help="show the batch script; change nothing")
]
TestOnly = Annotated[
    bool, typer.Option("--test-only", help="ask Slurm whether it would start the tasks, when")
]
WithReport = Annotated[
    bool,
    typer.Option(envvar="D2M_REPORT", help="write a page on the run once --local or --wait ends"),
]


@WithSlurmOptions
def submit(
    config: ConfigFile,
    slurm: dict[str, Any],
    set_: Overrides = None,
    local: Annotated[bool, typer.Option("--local", help="run in this process, no Slurm")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="until the last task has ended")] = False,
    until_done: UntilDone = False,
    max_rounds: MaxRounds = ROUNDS,
    then: Then = "",
    notify: Notify = "",
    no_sbatch: Annotated[bool, typer.Option("--no-sbatch", help="only print commands")] = False,
    print_sbatch: PrintSbatch = False,
    test_only: TestOnly = False,
    preflight: Annotated[bool, typer.Option(help="look for what would fail on every node")] = True,
    recompute_changed: RecomputeChanged = False,
    moved: Annotated[
        bool | None,
        typer.Option("--moved/--not-moved", help="tars elsewhere are those that were planned"),
    ] = None,
    report: WithReport = True,
) -> None:
    instead = {"--local": local, "--no-sbatch": no_sbatch}
    wish = _wish(until_done, max_rounds, then, notify, instead)
    if no_sbatch and (local or wait):
        both = "--no-sbatch starts no tasks; leave it out, or --local and --wait"
        raise ConfigError("d2m", [both])
    with api.every_mistake():
        loaded = load(config, set_, slurm)
    inspect = partial(
        api.inspect, loaded, recompute_changed=recompute_changed, moved=moved, where=str(config)
    )
    if print_sbatch or test_only:
        _asked(inspect(), test_only)
    elif dry_run:
        _show_plan(api.dry_run(inspect()), local)
    elif local:
        begin = lambda *given: api.begin(inspect(), *given)  # noqa: E731
        raise typer.Exit(_supervised(begin, report))
    elif no_sbatch:
        _write_only(inspect(thorough=preflight))
    else:
        thorough = lambda *given: api.begin(inspect(thorough=preflight), *given)  # noqa: E731
        raise typer.Exit(_to_slurm(thorough, wait, wish, report))


@WithSlurmOptions
def derive(
    config: ConfigFile,
    slurm: dict[str, Any],
    set_: Overrides = None,
    local: Annotated[bool, typer.Option("--local", help="run in this process, no Slurm")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done")] = False,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="only the first steps, such as k-means, and here")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="until the last task has ended")] = False,
    until_done: UntilDone = False,
    max_rounds: MaxRounds = ROUNDS,
    then: Then = "",
    notify: Notify = "",
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="though shards are not finished")
    ] = False,
) -> None:
    wish = _wish(until_done, max_rounds, then, notify, {"--local": local, "--prepare": prepare})
    with api.every_mistake():
        loaded = load(config, set_, slurm)

    def begin(backend: Backend, *told: Any) -> api.Run:
        inspected = api.inspect(loaded, where=str(config))
        return api.begin_derive(inspected, backend, allow_missing, *told)

    if prepare or dry_run:
        from d2m_hpc.launch import derive as first

        inspected = api.inspect(loaded, where=str(config))
        if dry_run:
            _show_plan(first.dry_run(inspected, allow_missing), local)
        else:
            first.prepare(inspected, allow_missing)
    elif local:
        raise typer.Exit(_supervised(begin, False))
    else:
        raise typer.Exit(_to_slurm(begin, wait, wish))


def _wish(
    until_done: bool, max_rounds: int, then: str, notify: str, instead: dict[str, bool]
) -> tuple[int, str, str] | None:
    """How the run is to go on by itself; None if it is not.

    Args:
        instead: options that start no array tasks, and whether they are given.

    Raises:
        ConfigError: an option would be ignored, such as the line that starts a training.
    """
    of_rounds = {"--max-rounds": max_rounds != ROUNDS, "--then": then, "--notify": notify}
    if not until_done and (given := [name for name, value in of_rounds.items() if value]):
        raise ConfigError("d2m", [f"{given[0]} is of --until-done, which is not given; add it"])
    if until_done and (given := [name for name, value in instead.items() if value]):
        raise ConfigError("d2m", [f"--until-done is of array tasks on Slurm; leave out {given[0]}"])
    return (max_rounds, then, notify) if until_done else None


def again(folder: Path) -> None:
    """One round of a run that goes on by itself; a job calls this."""
    from d2m_hpc.launch import rounds
    from d2m_hpc.run.folder import RunDir

    run = RunDir(folder)
    chain = rounds.again(run)
    print(chain, flush=True)
    rounds.secure(run, chain)


def plan(config: ConfigFile, set_: Overrides = None) -> None:
    with api.every_mistake():
        loaded = load(config, set_)
    _show_plan(api.dry_run(api.inspect(loaded, where=str(config))), local=False)


def _show_plan(decision: Decision, local: bool) -> None:
    from d2m_hpc.launch import arrays
    from d2m_hpc.watch import terminal

    terminal.decision(decision)
    if decision.pending and not local:
        terminal.proposal(arrays.propose(decision, "next"))


def _asked(workload: Workload, test_only: bool) -> None:
    """Print the script of the first array, or what Slurm says of each array."""
    from d2m_hpc.launch import arrays, sbatch

    decision = api.dry_run(workload)
    run, config = workload.run, workload.config.slurm
    if not decision.pending:
        print("nothing is left to submit")
        return
    proposal = arrays.propose(decision, "next")
    for array in proposal.arrays:
        words, text = sbatch.made(run, run.submission("next"), config, array, proposal)
        if not test_only:
            print(f"# {shlex.join(words)} <this script>", text, sep="\n", end="")
            return
        print(f"{array.name}: {sbatch.asked(words, text)}")


def _to_slurm(
    begin: Callable[..., api.Run],
    wait: bool,
    wish: tuple[int, str, str] | None = None,
    report: bool = False,
) -> int:
    from d2m_hpc.launch.arrays import SlurmArrays
    from d2m_hpc.watch import terminal

    outlive_readers()
    slurm = SlurmArrays()  # first, as it raises an error if there is no Slurm here
    run = begin(slurm, terminal.decision)
    terminal.submitted(slurm.arrays)
    if wish:
        print(f"job {run.go_on(*wish)} submits again what these leave")
    if not wait:
        return 0
    with waiting("`d2m status` shows how far they are, `d2m cancel` ends them"):
        run.wait()
    return _ended(run, report)


def _write_only(workload: Workload) -> None:
    from d2m_hpc.launch.arrays import ByHand
    from d2m_hpc.watch import terminal

    by_hand = ByHand()
    api.begin(workload, by_hand, terminal.decision)
    for command in by_hand.commands:
        print(command)


def _supervised(begin: Callable[..., api.Run], report: bool) -> int:
    """Run in a child of this process, which reports how the child ends.

    Args:
        begin: given a back end, what to do with the decision, and shards to leave out.
    """
    from d2m_hpc.stopping import interrupt_once
    from d2m_hpc.worker.supervise import supervised

    outlive_readers()

    def unfit(why: str) -> int:
        print(f"error: {why}", file=sys.stderr)
        return 1

    def work(board: Board | None, past: Past) -> int:
        from d2m_hpc.launch.local import ThisProcess
        from d2m_hpc.watch import live, terminal

        if board is not None:
            interrupt_once()
        here = ThisProcess(live.progress, board)
        try:
            return _ended(begin(here, terminal.decision, past.blamed), report)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return 130

    return supervised(work, unfit)


def _ended(run: api.Run, report: bool) -> int:
    """Show how a run ended, and write its page; returns 1 if it lacks anything asked for."""
    from d2m_hpc.watch import terminal

    summary = run.status()
    terminal.summary(summary)
    if report:
        try:
            echo(f"report: {run.report(run.path / 'report.html')}")
        except D2MError as error:  # the run itself is as it is
            echo(f"no report is written: {error}")
    return 0 if summary.complete and not summary.underived else 1
