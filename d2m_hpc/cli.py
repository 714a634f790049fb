"""The commands: parse, print, exit codes. Everything else is imported when it is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2m_hpc.errors import D2MError, SlurmError, WeightsError

if TYPE_CHECKING:
    from d2m_hpc.config import Config
    from d2m_hpc.launch.decide import Workload

app = typer.Typer(
    name="d2m",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Metadata for folders of webdataset tars: every shard exactly once.",
)
weights_app = typer.Typer(no_args_is_help=True, help="The published checkpoints of the models.")
app.add_typer(weights_app, name="weights")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="the YAML config")]
Target = Annotated[Path, typer.Argument(metavar="CONFIG|RUN_DIR")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a config key")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def _slurm(help_text: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel="Slurm (the config's slurm: keys)")


SUBMIT_HELP = (
    "Compute what is left of a config's shards. The same command again goes on from there."
)


@app.command("submit", help=SUBMIT_HELP)
def submit(
    config: ConfigFile,
    set_: Overrides = None,
    local: Annotated[bool, typer.Option("--local", help="run in this process, no Slurm")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="until the last task has ended")] = False,
    no_sbatch: Annotated[bool, typer.Option("--no-sbatch", help="only print commands")] = False,
    preflight: Annotated[bool, typer.Option(help="look for what would fail on every node")] = True,
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
    loaded = _load(config, set_, _slurm_options(given))
    if dry_run:
        _dry_run(_inspect(loaded, config), local)
    elif local:
        raise typer.Exit(_run_local(_inspect(loaded, config)))
    elif no_sbatch:
        _write_only(_inspect(loaded, config, preflight))
    else:
        _require_slurm()
        raise typer.Exit(_run_slurm(_inspect(loaded, config, preflight), wait))


@app.command(help="Show what a submit would do; the same as submit --dry-run.")
def plan(config: ConfigFile, set_: Overrides = None) -> None:
    _dry_run(_inspect(_load(config, set_), config), local=False)


@app.command(help="How far a run is.")
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


@app.command(help="Cancel a run's pending and running array tasks.")
def cancel(target: Target) -> None:
    from d2m_hpc.launch.status import find_run
    from d2m_hpc.launch.submit import cancel as cancel_all

    run, _ = find_run(target)
    print(f"cancelled {cancel_all(run)} array tasks")


@app.command(help="The log of the task that worked on a shard last.")
def logs(target: Target, shard: Annotated[str, typer.Argument(metavar="SHARD")]) -> None:
    from d2m_hpc.launch.status import find_run, log_of

    run, _ = find_run(target)
    print(log_of(run, shard).read_text(encoding="utf-8", errors="replace"), end="")


@app.command(help="Check every output against its record; exit 1 when one is wrong.")
def verify(
    target: Target,
    as_json: AsJson = False,
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="only N shards, drawn at random")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the draw")] = 0,
) -> None:
    from d2m_hpc.launch import show
    from d2m_hpc.launch.status import find_run
    from d2m_hpc.launch.verify import verify as check

    report = check(*find_run(target), sample, seed)
    if as_json:
        faults = [vars(f) for f in report.faults]
        told = {"checked": report.checked, "done": report.done, "faults": faults}
        print(json.dumps(told, indent=1))
    else:
        show.report(report)
    raise typer.Exit(1 if report.faults else 0)


@weights_app.command("list", help="All published checkpoints, or those that a config needs.")
def weights_list(config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]")] = None) -> None:
    from d2m_hpc.launch import show
    from d2m_hpc.models import registry, weights

    models = list(registry.MODELS) if config is None else _load(config).models
    show.checkpoints(weights.needed(models))


@weights_app.command("check", help="Whether a config's checkpoints are there and right.")
def weights_check(config: ConfigFile) -> None:
    from d2m_hpc.launch import show
    from d2m_hpc.models import weights

    loaded = _load(config)
    checked = weights.check(loaded.models, weights.weights_dir(loaded.weights_dir))
    show.checked(checked)
    weights.require(checked, loaded.allow_unpublished_weights, str(config))


@weights_app.command("fetch", help="Download a config's checkpoints.")
def weights_fetch(config: ConfigFile) -> None:
    from d2m_hpc.launch import show
    from d2m_hpc.models import weights

    loaded = _load(config)
    folder = weights.weights_dir(loaded.weights_dir)
    failed = []
    for checkpoint in weights.needed(loaded.models):
        try:
            with show.download(checkpoint.name) as on_bytes:
                weights.fetch(checkpoint, folder, on_bytes)
        except WeightsError as error:
            failed.append(str(error))
    if failed:
        raise WeightsError("\n".join(failed))


def _load(path: Path, overrides: list[str] | None = None, options: Any = None) -> Config:
    from d2m_hpc.config import load

    return load(path, overrides or (), options or {})


def _slurm_options(given: dict[str, Any]) -> dict[str, Any]:
    """The command line's values of the config's `slurm:` keys."""
    from d2m_hpc.config import Slurm

    options = {key: given[key] for key in Slurm.model_fields if key in given}
    if options["extra"] is not None:
        pairs = (text.partition("=") for text in options["extra"])
        options["extra"] = {key: value if equals else True for key, equals, value in pairs}
    return options


def _inspect(config: Config, path: Path, preflight: bool = False) -> Workload:
    from d2m_hpc.launch import decide
    from d2m_hpc.launch import preflight as before

    found = before.check(config, str(path)) if preflight else None
    return decide.inspect(config, str(path), found)


def _require_slurm() -> None:
    from d2m_hpc.launch import slurm

    if not slurm.is_here():
        raise SlurmError("there is no sbatch here; go to a login node, or run with --local")


def _dry_run(workload: Workload, local: bool) -> None:
    from d2m_hpc.launch import show, submit

    decision = submit.look(workload)
    show.decision(decision)
    if decision.pending and not local:
        show.proposal(submit.propose(workload, decision, "next"))


def _run_slurm(workload: Workload, wait: bool) -> int:
    from d2m_hpc.launch import show, submit
    from d2m_hpc.launch.status import summarise

    show.submitted(submit.run_slurm(workload, show.decision))
    if not wait:
        return 0
    submit.wait(workload.run)
    summary = summarise(workload.run, workload.config)
    show.summary(summary)
    return 0 if summary.complete else 1


def _write_only(workload: Workload) -> None:
    from d2m_hpc.launch import show, submit

    for command in submit.prepare(workload, show.decision):
        print(command)


def _run_local(workload: Workload) -> int:
    """Run, show how it ended; 1 when a shard failed, now or before."""
    from d2m_hpc.launch import show
    from d2m_hpc.launch.status import summarise
    from d2m_hpc.launch.submit import run_local

    try:
        run_local(workload, show.progress)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    summary = summarise(workload.run, workload.config)
    show.summary(summary)
    return 0 if summary.complete else 1


def _run(command: typer.Typer) -> None:
    """Print our errors without a traceback, and end with their exit codes."""
    try:
        command()
    except D2MError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


submit_app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
submit_app.command(help=SUBMIT_HELP)(submit)


def main() -> None:
    """`d2m`."""
    _run(app)


def main_submit() -> None:
    """`d2m-submit`, the same as `d2m submit`."""
    _run(submit_app)
