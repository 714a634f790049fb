"""An option for each key of the config's `slurm:` section, described as in the config."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Annotated, Any

import typer

PANEL = "Slurm (the config's slurm: keys)"


class WithSlurmOptions:
    """A command with an option for each `slurm:` key; it takes them as one argument, `slurm`.

    `Slurm` is imported when typer asks for the signature, as pydantic's import takes long.
    """

    def __init__(self, command: Callable[..., None]) -> None:
        update_wrapper(self, command)
        self._command = command
        self.__annotations__: dict[str, Any] = {}  # typer would take these texts for types

    @property
    def __signature__(self) -> inspect.Signature:
        from d2m_hpc.config import Slurm
        from d2m_hpc.described import described

        texts = described(Slurm)
        own = inspect.signature(self._command, eval_str=True).parameters
        kept = [parameter for name, parameter in own.items() if name != "slurm"]
        given = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=_option(field, texts[name]),
            )
            for name, field in Slurm.model_fields.items()
        ]
        return inspect.Signature([*kept, *given])

    def __call__(self, **given: Any) -> None:
        from d2m_hpc.config import Slurm

        slurm = {name: given.pop(name) for name in Slurm.model_fields}
        for name in ("extra", "srun", "rounds"):
            if slurm[name] is not None:
                pairs = (text.partition("=") for text in slurm[name])
                slurm[name] = {k: _plain(value) if equals else True for k, equals, value in pairs}
        self._command(**given, slurm=slurm)


def _option(field: Any, description: str) -> Any:
    """The type of a key's option: a flag, a repeatable option, or a text that the config checks."""
    default = field.get_default(call_default_factory=True)
    option = typer.Option(
        help=description,
        rich_help_panel=PANEL,
        metavar="OPTION=VALUE" if isinstance(default, dict) else None,
    )
    if isinstance(default, bool):
        return Annotated[bool | None, option]
    return Annotated[list[str] | None if isinstance(default, list | dict) else str | None, option]


def _plain(value: str) -> Any:
    """The value that the config has for `true`, `false` and `null`; any other text is itself."""
    return {"true": True, "false": False, "null": None}.get(value, value)
