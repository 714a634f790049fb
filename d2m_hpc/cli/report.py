"""A run as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2m_hpc.cli.common import Target, echo


def report(
    target: Target,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="the HTML file")
    ] = Path("report.html"),
    score: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="sorts the contact sheet")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, max=60, metavar="N", help="at each end of the score")
    ] = 8,
) -> None:
    from d2m_hpc.watch.page import write
    from d2m_hpc.watch.status import find_run

    write(*find_run(target), output, score, samples)
    echo(f"wrote {output}")
