"""Commands that look at a run or change its plan."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from d2m_hpc import api
from d2m_hpc.cli.common import (
    AsJson,
    SeedOfDraw,
    Target,
    counted,
    echo,
    named,
    number,
    print_json,
    whole,
)


def status(
    target: Target,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="again every few seconds")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="by the run folder alone; do not ask Slurm")
    ] = False,
) -> None:
    from d2m_hpc.watch import terminal

    if as_json and watch:
        raise typer.BadParameter("--json prints the run once; leave out --watch")
    run = api.open(target)
    if as_json:
        print_json(run.status(offline).to_dict())
    elif watch:
        terminal.watch(lambda: run.status(offline))
    else:
        terminal.summary(run.status(offline))


def top(target: Target) -> None:
    from d2m_hpc.watch import terminal

    run = api.open(target)
    terminal.watch(run.status, lambda found: terminal.top(found, run.tasks()))


def cancel(target: Target) -> None:
    print(f"cancelled {counted(api.open(target).cancel(), 'array task')}")


def forget(
    target: Target,
    shards: Annotated[
        list[str], typer.Argument(metavar="PATTERN|STEM...", help="of stems, paths or URLs")
    ],
    undo: Annotated[bool, typer.Option("--undo", help="put them back into the plan")] = False,
) -> None:
    run = api.open(target)
    if undo:
        print(f"put {counted(len(run.remember(shards)), 'shard')} back into the plan")
        return
    gone, kept = run.forget(shards)
    print(f"took {counted(len(gone), 'shard')} out of the plan: {', '.join(gone[:3])}")
    if kept:
        print(f"the outputs of {len(kept)} of them stay where they are: {', '.join(kept[:3])}")


def logs(
    target: Target,
    shard: Annotated[str, typer.Argument(metavar="[SHARD]")] = "",
    task: Annotated[
        str, typer.Option("--task", metavar="JOB_INDEX", help="an array task, in place of a shard")
    ] = "",
) -> None:
    if bool(shard) == bool(task):
        raise typer.BadParameter("name a shard, or an array task by --task")
    run = api.open(target)
    for path in run.task_logs(task) if task else [run.log(shard)]:
        if task:
            echo(f"--- {path}")
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                echo(line.removesuffix("\n"))


def verify(
    target: Target,
    as_json: AsJson = False,
    sample: Annotated[
        int | None,
        typer.Option(parser=whole(1), metavar="N", help="only N shards, drawn at random"),
    ] = None,
    seed: SeedOfDraw = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="shards that are not finished are no fault")
    ] = False,
) -> None:
    from d2m_hpc.watch import terminal

    report = api.open(target).verify(sample, seed)
    if as_json:
        print_json(report.to_dict())
    else:
        terminal.report(report)
    raise typer.Exit(1 if report.faults or (report.unfinished and not partial) else 0)


def report(
    target: Target,
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=named, metavar="FILE", help="the HTML file")
    ] = Path("report.html"),
    score: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="sorts the contact sheet")
    ] = None,
    samples: Annotated[
        int, typer.Option(parser=whole(0, 60), metavar="N", help="at each end of the score")
    ] = 8,
    serve: Annotated[
        bool, typer.Option("--serve", help="show it to a browser, anew while the run works")
    ] = False,
    port: Annotated[
        int, typer.Option(parser=whole(0, 65535), metavar="N", help="of --serve; 0: a free one")
    ] = 0,
    host: Annotated[str, typer.Option(help="address of --serve")] = "127.0.0.1",
) -> None:
    run = api.open(target)
    if not serve:
        echo(f"wrote {run.report(output, score, samples)}")
        return
    with run.serve(port, host, score, samples) as server, suppress(KeyboardInterrupt):
        taken, node = server.server_address[1], socket.gethostname()
        echo(f"{server.url} (Ctrl-C ends it)")
        echo(f"from elsewhere: ssh -L {taken}:127.0.0.1:{taken} {node}, and open the same address")
        sys.stdout.flush()
        server.serve_forever()


def diff(
    first: Target,
    second: Target,
    by: Annotated[str, typer.Option(metavar="COLUMN", help="tells rows, such as uid")] = "key",
    tolerance: Annotated[
        float,
        typer.Option(
            parser=number(0), metavar="X", help="numbers that differ by no more are equal"
        ),
    ] = 0.0,
    features: Annotated[bool, typer.Option("--features", help="compare these, too")] = False,
    as_json: AsJson = False,
) -> None:
    found = api.open(first).diff(api.open(second), by, tolerance, features)
    if as_json:
        print_json({**asdict(found), "is_equal": found.is_equal})
    else:
        from d2m_hpc.subsets.diff import lines

        for line in lines(found, (str(first), str(second))):
            echo(line)
    raise typer.Exit(0 if found.is_equal else 1)
