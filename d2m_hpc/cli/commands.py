"""The commands of `d2m`, and how each ends; a command imports the rest when it needs it."""

from __future__ import annotations

import copy
import io
import json
import os
import sys
from typing import Annotated

import typer
from typer.main import get_command_name
from typer.models import CommandInfo

from d2m_hpc.cli import begin, inspect, outputs, weights
from d2m_hpc.cli.common import ending
from d2m_hpc.cli.models import models
from d2m_hpc.cli.submit import again, derive, plan, submit
from d2m_hpc.cli.trouble import explained
from d2m_hpc.errors import DiskError

SUBMIT_HELP = (
    "Compute what is left of a config's shards. The same command again goes on from there."
)
SUBMIT_EXAMPLE = "Example: d2m-submit laion.yml --partition gpu --gres gpu:1 --time 4:00:00"
VERIFY_HELP = (
    "Check every output against its record. Exit 0: all shards are finished and right; 1: a file "
    "is wrong, or shards are not finished; 2: there is no such run."
)

SHORT_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="d2m",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=SHORT_HELP,
    help="Metadata for folders of webdataset tars: every shard exactly once.",
    epilog="Begin with: d2m init TARS; d2m head d2m.yml; d2m-submit d2m.yml --local",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from d2m_hpc.version import __version__

        print(f"d2m_hpc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="and leave")
    ] = False,
) -> None:
    """Options of all commands together."""


def _example(words: str) -> str:
    """The end of a command's help."""
    return f"Example: {words}"


app.command(
    help="Look into the first samples of a folder, and write a first config.",
    epilog=_example("d2m init s3://bucket/tars -o laion.yml"),
)(begin.init)
app.command(
    help="The first samples of a config with their values; nothing is written.",
    epilog=_example("d2m head laion.yml 3 --set device=cpu"),
)(begin.head)
app.command(
    help="What this machine, or a config's folders and weights lack; exit 1 for anything to mend.",
    epilog=_example("d2m doctor laion.yml"),
)(begin.doctor)
app.command(help=SUBMIT_HELP, epilog=SUBMIT_EXAMPLE)(submit)
app.command(
    help="Compute the config's `derive` columns from stored features and columns.",
    epilog=_example("d2m derive laion.yml --partition gpu"),
)(derive)
app.command(hidden=True)(again)
app.command(help="Show what a submit would do; the same as submit --dry-run.")(plan)
app.command(help="The families of models, or what one of them takes and gives.")(models)
app.command(help="How far a run is.")(inspect.status)
app.command(help="The tasks at work on a run, again every few seconds.")(inspect.top)
app.command(help="Cancel a run's pending and running array tasks.")(inspect.cancel)
app.command(help="Take shards out of a run's plan: a wrong pattern's, or tars to do without.")(
    inspect.forget
)
app.command(help="The log of the task that worked on a shard last, or of an array task.")(
    inspect.logs
)
app.command(help=VERIFY_HELP)(inspect.verify)
app.command(help="What a run did and made, as one HTML file.")(inspect.report)
app.command(
    help="Compare the outputs of two runs; exit 0: they are equal; 1: they differ.",
    epilog=_example("d2m diff old.yml new.yml --tolerance 0.001"),
)(inspect.diff)
app.command(help="The uids of the best samples, as a subset for DataComp's tools.")(outputs.select)
app.add_typer(outputs.app, name="export")
app.add_typer(weights.app, name="weights")

submit_app = typer.Typer(pretty_exceptions_enable=False, context_settings=SHORT_HELP)
submit_app.command(help=SUBMIT_HELP, epilog=SUBMIT_EXAMPLE)(submit)


@app.command(help="The config's JSON schema, for editors.")
def schema() -> None:
    from d2m_hpc.config.reference import json_schema

    print(json.dumps(json_schema(), indent=1))


def run(command: typer.Typer) -> None:
    """Run a command; print an error as lines without a traceback, and end with its exit code."""
    from d2m_hpc.stopping import own_process

    own_process()
    _open_closed_streams()
    _escape_unencodable()
    with ending():
        try:
            _require_current_folder()
            _without_others(command, sys.argv[1:2])()
        except Exception as error:
            if os.environ.get("D2M_TRACEBACK"):
                raise
            words, code = explained(error)
            print(f"error: {words}", file=sys.stderr)
            sys.exit(code)


def _require_current_folder() -> None:
    """Refuse one that was removed: relative paths mean nothing there, and torch does not load."""
    try:
        os.getcwd()
    except FileNotFoundError:
        what = "the current folder was removed; `cd` to one that exists, and run the same command"
        raise DiskError(f"{what} again") from None


def _without_others(program: typer.Typer, named: list[str]) -> typer.Typer:
    """Leave out the commands that are not called, if one is.

    typer makes the options of all commands at each start, and those of submit need the config.
    """
    called = copy.copy(program)
    called.registered_commands = [c for c in program.registered_commands if [_name(c)] == named]
    called.registered_groups = [g for g in program.registered_groups if [g.name] == named]
    return called if called.registered_commands or called.registered_groups else program


def _name(info: CommandInfo) -> str:
    return get_command_name(info.name or str(getattr(info.callback, "__name__", "")))


def _open_closed_streams() -> None:
    """Open the standard streams that the caller has closed, lest other files get their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode))  # noqa: SIM115


def _escape_unencodable() -> None:
    """Escape characters that a terminal cannot show: file names may hold any bytes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
