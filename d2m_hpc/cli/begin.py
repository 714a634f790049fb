"""Commands to begin with: a first config, a look at its first samples, a look at this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2m_hpc import api
from d2m_hpc.cli.common import (
    AsJson,
    ConfigFile,
    Overrides,
    echo,
    load,
    named,
    print_json,
    whole,
)


def init(
    inputs: Annotated[
        list[str], typer.Argument(metavar="FOLDER|PATTERN|URL...", help="the shards")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=named, metavar="FILE", help="the new config")
    ] = Path("d2m.yml"),
    metadata: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="of the outputs; by default beside it")
    ] = None,
) -> None:
    sight = api.init(inputs, output, metadata)
    echo(f"looked at {sight.looked_at}")
    if sight.warning:
        echo(f"{sight.warning}: see `max_rejected_fraction` in {output}")
    echo(f"wrote {output}; next: d2m head {output}; d2m-submit {output} --local")


def head(
    config: ConfigFile,
    count: Annotated[int, typer.Argument(parser=whole(1), metavar="[N]", help="samples")] = 5,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    from d2m_hpc.watch import terminal

    with api.every_mistake():
        loaded = load(config, set_)
    found = api.head(loaded, count, str(config))
    if as_json:
        print_json(found.to_dict())
    else:
        terminal.samples(found)
    raise typer.Exit(0 if found.table.num_rows else 1)


def doctor(
    config: Annotated[Path | None, typer.Argument(parser=named, metavar="[CONFIG]")] = None,
    as_json: AsJson = False,
) -> None:
    from d2m_hpc.watch.doctor import checks

    sick, told = False, list[dict[str, str]]()
    for check in checks(load(config) if config else None, str(config)):
        sick, told = sick or bool(check.mend), [*told, check._asdict()]
        if not as_json:  # at once, as torch takes seconds
            advice = f"; {check.mend}" if check.mend else ""
            echo(f"{'mend' if check.mend else 'ok':5}{check.name}: {check.found}{advice}")
    if as_json:
        print_json(told)
    raise typer.Exit(1 if sick else 0)
