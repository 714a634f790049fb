"""What became of a run."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from d2m_hpc.cli.common import AsJson, Target


def status(
    target: Target,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="again every few seconds")] = False,
) -> None:
    from d2m_hpc.launch import show
    from d2m_hpc.launch.status import find_run, summarise

    run, config = find_run(target)
    if as_json:
        print(json.dumps(summarise(run, config).to_dict(), indent=1))
    elif watch:
        show.watch(lambda: summarise(run, config))
    else:
        show.summary(summarise(run, config))


def cancel(target: Target) -> None:
    from d2m_hpc.launch.status import find_run
    from d2m_hpc.launch.submit import cancel as cancel_all

    run, _ = find_run(target)
    print(f"cancelled {cancel_all(run)} array tasks")


def forget(
    target: Target,
    shards: Annotated[
        list[str], typer.Argument(metavar="PATTERN|STEM...", help="of stems, paths or URLs")
    ],
    undo: Annotated[bool, typer.Option("--undo", help="put them back into the plan")] = False,
) -> None:
    from d2m_hpc.launch import forget as forgetting
    from d2m_hpc.launch.status import find_run
    from d2m_hpc.launch.submit import live_stems
    from d2m_hpc.outputs import OutputDir

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
    from d2m_hpc.launch.status import find_run, log_of

    run, _ = find_run(target)
    print(log_of(run, shard).read_text(encoding="utf-8", errors="replace"), end="")


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
    from d2m_hpc.launch import show
    from d2m_hpc.launch.status import find_run
    from d2m_hpc.launch.verify import verify as check

    report = check(*find_run(target), sample, seed)
    if as_json:
        faults = [vars(f) for f in report.faults]
        print(json.dumps({**vars(report), "faults": faults}, indent=1))
    else:
        show.report(report)
    raise typer.Exit(1 if report.faults or (report.unfinished and not partial) else 0)
