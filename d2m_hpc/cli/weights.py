"""`d2m weights`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2m_hpc.cli.common import ConfigFile, load, named
from d2m_hpc.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from d2m_hpc.config import Config
    from d2m_hpc.models.family import ModelSpec
    from d2m_hpc.models.registry import Registry

app = typer.Typer(no_args_is_help=True, help="The published checkpoints of the models.")


@app.command("list", help="What all models of this program need, or those of a config.")
def weights_list(
    config: Annotated[Path | None, typer.Argument(parser=named, metavar="[CONFIG]")] = None,
) -> None:
    from d2m_hpc.models import weights
    from d2m_hpc.models.registry import builtin
    from d2m_hpc.watch import terminal

    if config is None:
        specs = builtin().models.values()
        found = weights.survey_all(specs, weights.default_dir(), quick=True)
    else:
        loaded = load(config)
        folder = weights.weights_dir(loaded.weights_dir)
        specs = _specs(config, loaded).values()
        found = weights.survey_all(specs, folder, loaded.custom_file, quick=True)
    terminal.checkpoints(found)


@app.command("check", help="Whether a config's checkpoints are there and right.")
def weights_check(config: ConfigFile) -> None:
    from d2m_hpc.models import weights
    from d2m_hpc.watch import terminal

    loaded = load(config)
    specs = _specs(config, loaded)
    folder = weights.weights_dir(loaded.weights_dir)
    found = weights.survey_all(specs.values(), folder, loaded.custom_file)
    terminal.checked(found, loaded.allow_unpublished_weights)
    files = [checked for group in found for checked in group.files]
    weights.require(files, loaded.allow_unpublished_weights, str(config))


@app.command("fetch", help="Download a config's checkpoints; again goes on where it broke off.")
def weights_fetch(
    config: ConfigFile,
    mirror: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="D2M_WEIGHTS_MIRROR",
            help="a folder with the files under their published names",
        ),
    ] = "",
    update: Annotated[
        bool,
        typer.Option(help="take the newest commit of hub repositories, not the locked one"),
    ] = False,
) -> None:
    from d2m_hpc.models import hub, weights
    from d2m_hpc.watch import terminal

    loaded = load(config)
    folder, any_hash = weights.weights_dir(loaded.weights_dir), loaded.allow_unpublished_weights
    wish = hub.Wish(terminal.download, mirror, any_hash, update)
    done: list[object] = []
    failed: list[str] = []
    # The config in one repository may name another, such as that of its tokenizer.
    while left := [n for n in weights.needed(_specs(config, loaded).values()) if n not in done]:
        for need in left:
            try:
                terminal.checked([hub.fetch(need, folder, wish)], any_hash)
            except WeightsError as error:
                failed.append(str(error))
        done += left
    if failed:
        raise WeightsError("\n".join(failed))
    if not done:
        terminal.checked([], any_hash)
    _require_fit(config, loaded)


def _require_fit(path: Path, config: Config) -> None:
    """
    Raises:
        ConfigError: what was fetched is none of what the config says of it.
    """
    from d2m_hpc.config.load import located
    from d2m_hpc.config.mistakes import checkpoint_mistakes

    if mistakes := checkpoint_mistakes(config, _registry(path, config)):
        raise ConfigError(str(path), located(str(path), mistakes))


def _specs(path: Path, config: Config) -> dict[str, ModelSpec]:
    """The models that a config asks for; those of a custom file go before built-in ones."""
    return _registry(path, config).specs(config.model_names)


def _registry(path: Path, config: Config) -> Registry:
    from d2m_hpc.plan.workload import absolute, customs, run_dir

    config = absolute(config)
    custom, mistakes = customs(config, run_dir(config))
    if mistakes:
        raise ConfigError(str(path), mistakes)
    return custom.registry
