"""What became of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from d2m_hpc.cli.common import AsJson, Target, echo, print_json


def status(
    target: Target,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="again every few seconds")] = False,
) -> None:
    from d2m_hpc.watch import terminal
    from d2m_hpc.watch.status import find_run, look

    run, config = find_run(target)
    if as_json:
        print_json(look(run, config).to_dict())
    elif watch:
        terminal.watch(lambda: look(run, config))
    else:
        terminal.summary(look(run, config))


def cancel(target: Target) -> None:
    from d2m_hpc.launch.arrays import cancel as cancel_all
    from d2m_hpc.watch.status import find_run

    run, _ = find_run(target)
    print(f"cancelled {cancel_all(run)} array tasks")


def forget(
    target: Target,
    shards: Annotated[
        list[str], typer.Argument(metavar="PATTERN|STEM...", help="of stems, paths or URLs")
    ],
    undo: Annotated[bool, typer.Option("--undo", help="put them back into the plan")] = False,
) -> None:
    from d2m_hpc.launch.arrays import live_stems
    from d2m_hpc.plan import forget as forgetting
    from d2m_hpc.run.outputs import OutputDir
    from d2m_hpc.watch.status import find_run

    run, config = find_run(target)
    if undo:
        found = forgetting.remember(run, shards)
        print(f"put {len(found)} shards back into the plan")
        return
    found = forgetting.forget(run, shards, live_stems(run))
    print(f"took {len(found)} shards out of the plan: {', '.join(s.stem for s in found[:3])}")
    present = OutputDir(config.output_metadata_dir).stems()
    if kept := [s.stem for s in found if s.stem in present]:
        print(f"the outputs of {len(kept)} of them stay where they are: {', '.join(kept[:3])}")


def logs(target: Target, shard: Annotated[str, typer.Argument(metavar="SHARD")]) -> None:
    from d2m_hpc.watch.status import find_run, log_of

    run, _ = find_run(target)
    with open(log_of(run, shard), encoding="utf-8", errors="replace") as lines:
        for line in lines:
            echo(line.removesuffix("\n"))


def verify(
    target: Target,
    as_json: AsJson = False,
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="only N shards, drawn at random")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the draw")] = 0,
    partial: Annotated[
        bool, typer.Option("--partial", help="shards that are not finished are no fault")
    ] = False,
) -> None:
    from d2m_hpc.watch import terminal
    from d2m_hpc.watch.status import find_run
    from d2m_hpc.watch.verify import verify as check

    report = check(*find_run(target), sample, seed)
    if as_json:
        print_json(report.to_dict())
    else:
        terminal.report(report)
    raise typer.Exit(1 if report.faults or (report.unfinished and not partial) else 0)
