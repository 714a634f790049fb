"""`d2m weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2m_hpc.cli.common import ConfigFile, load
from d2m_hpc.errors import WeightsError

app = typer.Typer(no_args_is_help=True, help="The published checkpoints of the models.")


@app.command("list", help="All published checkpoints, or those that a config needs.")
def weights_list(config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]")] = None) -> None:
    from d2m_hpc.launch import show
    from d2m_hpc.models import registry, weights

    models = list(registry.MODELS) if config is None else load(config).models
    show.checkpoints(weights.needed(models))


@app.command("check", help="Whether a config's checkpoints are there and right.")
def weights_check(config: ConfigFile) -> None:
    from d2m_hpc.launch import show
    from d2m_hpc.models import weights

    loaded = load(config)
    checked = weights.check(loaded.models, weights.weights_dir(loaded.weights_dir))
    show.checked(checked)
    weights.require(checked, loaded.allow_unpublished_weights, str(config))


@app.command("fetch", help="Download a config's checkpoints.")
def weights_fetch(config: ConfigFile) -> None:
    from d2m_hpc.launch import show
    from d2m_hpc.models import weights

    loaded = load(config)
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
