"""`d2m models`."""

from __future__ import annotations

from typing import Annotated

import typer


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="a family, or a model by its plain name")
    ] = None,
) -> None:
    from d2m_hpc.errors import ConfigError
    from d2m_hpc.models import weights
    from d2m_hpc.models.entries import kinds, known_families, plugged_in
    from d2m_hpc.models.family import ParameterError
    from d2m_hpc.models.registry import builtin
    from d2m_hpc.storage.texts import nearest
    from d2m_hpc.watch import catalogue

    if name is None:
        return catalogue.everything()
    try:
        family = known_families().get(name) or plugged_in(name)
    except ParameterError as error:
        raise ConfigError("d2m models", [what for _, what in error.mistakes]) from None
    known = builtin().models
    made, problems = builtin().with_models([name], (), weights.default_dir())
    if problems := problems or made.unfit([name]):
        raise ConfigError("d2m models", [p.what for p in problems])
    if name in known:
        catalogue.model(known[name], builtin())
    if family is not None and (family.model_fields or name not in known):
        catalogue.family(name, family)
    elif name not in known:
        unknown = f"unknown model or family {name!r}{nearest(name, {*kinds(), *known})}"
        raise ConfigError("d2m models", [unknown])
