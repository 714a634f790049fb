"""Commands on finished outputs: subsets of samples, and exports for other tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2m_hpc import api
from d2m_hpc.cli.common import (
    AsJson,
    SeedOfDraw,
    Target,
    at_interrupt,
    counted,
    echo,
    named,
    number,
    print_json,
    waiting,
    whole,
)
from d2m_hpc.cli.options import WithSlurmOptions
from d2m_hpc.errors import ConfigError

if TYPE_CHECKING:
    from d2m_hpc.subsets.datacomp import Export
    from d2m_hpc.subsets.exports import Exported
    from d2m_hpc.subsets.select import Selection

app = typer.Typer(no_args_is_help=True, help="The outputs as other tools read them.")

Folder = Annotated[Path, typer.Option("--output", "-o", parser=named, metavar="FOLDER")]
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing", help="though shards are not finished")
]
FeatureNames = Annotated[
    list[str] | None,
    typer.Option("--feature", metavar="NAME", help="again for several; by default all"),
]


@app.command(help="Links to the parquets: pandas, pyarrow, polars, ... take the folder as a table.")
def links(target: Target, output: Folder, allow_missing: AllowMissing = False) -> None:
    _show_exported(api.open(target).export("links", output, allow_missing=allow_missing))


@app.command(help="Arrays to map into memory: FEATURE.npy, and columns of the same rows.")
def npy(
    target: Target,
    output: Folder,
    features: FeatureNames = None,
    allow_missing: AllowMissing = False,
) -> None:
    _export("npy", target, output, features=features, allow_missing=allow_missing)


@app.command(help="Parquets of columns and features with a card, for Hugging Face's datasets.")
def hf(
    target: Target,
    output: Folder,
    features: FeatureNames = None,
    allow_missing: AllowMissing = False,
) -> None:
    _export("hf", target, output, features=features, allow_missing=allow_missing)


@app.command(help="A Lance data set of columns and features.")
def lance(
    target: Target,
    output: Folder,
    features: FeatureNames = None,
    allow_missing: AllowMissing = False,
) -> None:
    _export("lance", target, output, features=features, allow_missing=allow_missing)


@app.command(help="img_emb/, text_emb/ and metadata/, for clip-retrieval and autofaiss.")
def clip_retrieval(
    target: Target,
    output: Folder,
    image: Annotated[str, typer.Option(metavar="NAME", help="the feature for img_emb/")] = "",
    text: Annotated[str, typer.Option(metavar="NAME", help="the feature for text_emb/")] = "",
    allow_missing: AllowMissing = False,
) -> None:
    options = {"image": image, "text": text, "allow_missing": allow_missing}
    _export("clip-retrieval", target, output, **options)


@app.command(
    help="Tars of the kept samples, from the run's shards, with all of their members.",
    epilog="Example: d2m export subset-tars laion.yml --lists kept.jsonl -o kept --tasks 8 --wait",
)
@WithSlurmOptions
def subset_tars(
    target: Target,
    slurm: dict[str, Any],
    output: Folder,
    lists: Annotated[
        Path, typer.Option(parser=named, metavar="KEPT.jsonl", help="of `d2m select -o`")
    ],
    tasks: Annotated[
        int | None,
        typer.Option(
            parser=whole(), metavar="N", help="write them by so many array tasks on Slurm"
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="until the last task has ended")] = False,
    part: Annotated[
        int | None,
        typer.Option(parser=whole(), metavar="I", help="write what the I-th of N tasks writes"),
    ] = None,
) -> None:
    given = {name: value for name, value in slurm.items() if value is not None}
    if tasks is None and (extra := [*["part"] * (part is not None), *["wait"] * wait, *given]):
        what = f"--{extra[0].replace('_', '-')} is of array tasks; add --tasks N"
        raise ConfigError("export", [what])
    if tasks is None or part is not None:
        share = () if part is None else (part, tasks)
        _export("subset-tars", target, output, lists=lists, part=share)
        return
    found = api.open(target).export_tasks(output, lists, tasks, given)
    if found.live:
        told = counted(len(found.live), "task {} waits or runs", "tasks {} wait or run")
        echo(told.format("of an earlier command"))
    if found.started:
        echo(f"array {found.job}: {counted(len(found.started), 'task')} started")
    elif not found.live:
        echo("all tars are there")
    if wait:
        with waiting("the same command waits for them again"):
            failed = found.wait()
        for number, log in failed.items():
            echo(f"part {number} of {tasks} is not complete; see {log}")
        if failed:
            raise typer.Exit(1)
        _export("subset-tars", target, output, lists=lists)


@app.command(help="A parquet of uid, url and caption, for img2dataset to download again.")
def img2dataset(
    target: Target,
    output: Annotated[Path, typer.Option("--output", "-o", parser=named, metavar="FILE.parquet")],
    subset: Annotated[
        Path | None,
        typer.Option(parser=named, metavar="SUBSET.npy", help="of `d2m select`, or DataComp's"),
    ] = None,
    where: Annotated[str, typer.Option(help="an SQL expression over the columns")] = "true",
) -> None:
    run = api.open(target)
    caption = "text" if run.config.use_datacomp_keys else "caption"
    condition = f"({where}) AND in_subset" if subset else where
    columns = ["uid", "url", caption]
    if output.suffix != ".parquet":
        what = f"--output: found {str(output)!r}; valid is a name in .parquet"
        raise ConfigError("export", [what])
    if lacking := ", ".join(name for name in columns if name not in run.config.columns):
        what = f"additional_fields: the run has no {lacking}; add them and submit: no model runs"
        raise ConfigError("export", [what])
    with _bar("shards") as on_shards:
        found = run.select(output, condition, on_shards=on_shards, join=subset, columns=columns)
    _show_selection(found, output)
    raise typer.Exit(0 if found.chosen else 1)


def _export(kind: str, target: Path, output: Path, **options: Any) -> None:
    with _bar("rows") as on_rows, at_interrupt():
        found = api.open(target).export(kind, output, on_rows=on_rows, **options)
    _show_exported(found)


def _show_exported(found: Exported) -> None:
    if found.unfinished:
        echo(f"{_unfinished(found.unfinished)}; left out")
    there = found.parts - found.written
    parts = f"{counted(found.written, 'part')} written"
    parts += f", {counted(there, 'was', 'were')} there" if there else ""
    made = f"{counted(found.rows, 'row')} of {counted(found.shards, 'shard')}"
    echo(f"{made}, {parts}: {found.folder}")


def _unfinished(shards: int) -> str:
    return counted(shards, "shard is", "shards are") + " not finished"


JoinFile = Annotated[
    Path | None,
    typer.Option(
        parser=named, metavar="FILE", help="a .parquet with more columns by uid, or a .npy subset"
    ),
]
LookFile = Annotated[
    Path | None,
    typer.Option(
        parser=named, metavar="FILE.html", help="pictures of what is cut beside what is kept"
    ),
]
_amount = partial(typer.Option, parser=number(), metavar="NUMBER")


def select(
    target: Target,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", parser=named, metavar="FILE", help=".npy, .parquet or .jsonl"
        ),
    ] = None,
    where: Annotated[str, typer.Option(help="an SQL expression over the columns")] = "true",
    top: Annotated[
        float | None,
        _amount(help="of what --where leaves, the best share, such as 0.3, or so many"),
    ] = None,
    by: Annotated[str, typer.Option(help="the column whose highest values are the best")] = "",
    within: Annotated[
        str, typer.Option(metavar="COLUMN", help="--top and --sample of each of its values")
    ] = "",
    sample: Annotated[float | None, _amount(help="draw a share or so many at random")] = None,
    weight: Annotated[str, typer.Option(metavar="COLUMN", help="draw these likelier")] = "",
    seed: SeedOfDraw = None,
    join: JoinFile = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", metavar="NAME", help="of a .parquet")
    ] = None,
    look: LookFile = None,
    as_json: AsJson = False,
) -> None:
    if 0 in (top, sample):  # from Python, these take all
        raise ConfigError("select", ["--top and --sample: found 0; valid is more"])
    top, sample = top or 0.0, sample or 0.0
    more: dict[str, Any] = {"within": within, "sample": sample, "weight": weight, "join": join}
    with _bar("shards") as on_shards:
        run = api.open(target)
        more |= {"seed": seed, "columns": columns or [], "look": look}
        found = run.select(output, where, top, by, on_shards, **more)
    if as_json:
        print_json(asdict(found))
    else:
        _show_selection(found, output)
        if look:
            echo(f"wrote {look}")
    raise typer.Exit(0 if found.chosen or found.survival else 1)


@app.command(help="DataComp's blur map and sizes.json; says which of its tools can run.")
def datacomp(
    target: Target,
    output: Folder = Path("datacomp"),
    allow_missing: AllowMissing = False,
) -> None:
    with _bar("rows") as on_rows, at_interrupt():
        found = api.open(target).export_datacomp(output, allow_missing, on_rows)
    _show_export(found)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar, on a terminal only."""
    from rich.progress import Progress

    from d2m_hpc.watch.terminal import console

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


def _show_selection(found: Selection, output: Path | None) -> None:
    echo(f"{counted(found.rows, 'row')}, {found.passed:,} pass")
    if found.unfinished:
        echo(f"{_unfinished(found.unfinished)}; their samples are not considered")
    if found.undecided:
        lacking = counted(found.undecided, "row lacks", "rows lack")
        echo(f"{lacking} a value (null or NaN) to decide by; left out")
    if found.without_uid:
        echo(f"{counted(found.without_uid, 'row has', 'rows have')} no usable uid; left out")
    if found.repeated:
        echo(f"{_repeated(found.repeated)} the uid of another row; each uid is taken once")
    for notice in found.notices:
        echo(f"note: {notice}")
    for threshold, kept, part in found.survival:
        echo(f"{threshold:>12g} keeps {part:6.1%}, {counted(kept, 'sample')}")
    if found.survival:
        return
    share = found.chosen / found.rows
    if found.chosen:
        where = f": {output}" if output else ""
        echo(f"{found.chosen:,} chosen, {share:.1%} of the rows{where}")
    else:
        echo("nothing is chosen; nothing is written")


def _repeated(rows: int) -> str:
    return counted(rows, "row has", "rows have")


def _show_export(found: Export) -> None:
    for file in found.files:
        echo(f"wrote {file}")
    if found.renamed:
        echo(f"wrote the outputs by DataComp's names: {found.renamed}")
    if found.left_out:
        lacking = counted(found.left_out, "row has", "rows have")
        echo(f"{lacking} no caption or no usable uid; left out there")
    left = f"{counted(len(found.missing), 'is', 'are')} not finished"
    echo(f"{counted(found.shards, 'finished shard')}; {left}")
    if found.repeated:
        times = "the resharder writes each such sample as often as its uid is in the subset"
        echo(f"{_repeated(found.repeated)} the uid of another row; {times}")
    for tool, names in found.lacking.items():
        echo(f"cannot run: {tool}; it reads {', '.join(names)}")
    for folder in found.unnamed:
        echo(f"cannot run: resharder.py on {folder}; it finds tars by number: 00000000.tar")
    for command in found.commands:
        echo(f"\n{command}")
