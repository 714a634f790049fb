"""Model families as people see them in the terminal."""

from __future__ import annotations

from rich.table import Table

from d2m_hpc.models import weights
from d2m_hpc.models.entries import kinds, known_families, meanings, packages, plugged_in, presets
from d2m_hpc.models.family import Family, ModelSpec, ParameterError
from d2m_hpc.models.inputs import NAMED
from d2m_hpc.models.registry import Registry, builtin
from d2m_hpc.watch import terminal


def everything() -> None:
    """All families, and the models that a config may list by a plain name."""
    table = Table("kind", "computes", title="families", title_justify="left", show_edge=False)
    for kind in kinds():
        table.add_row(kind, _computes(kind))
    terminal.console.print(table)
    table = Table("name", "kind", title="\nmodels", title_justify="left", show_edge=False)
    for name, made in presets().items():
        table.add_row(name, made.kind)
    terminal.console.print(table)


def _computes(kind: str) -> str:
    """What a family computes, and the package that brings one of another package."""
    [whose] = packages([{kind: {"kind": kind}}]) or [""]
    try:
        family = known_families().get(kind) or plugged_in(kind)
    except ParameterError as error:
        return str(error)
    return f"{_summary(family)}{whose and f' ({whose})'}" if family else whose


def _summary(family: type[Family]) -> str:
    """What a family computes: the first sentence of its description."""
    return " ".join((family.__doc__ or "").split("\n\n")[0].split())


def family(kind: str, made: type[Family]) -> None:
    """A family's parameters; and what a model of it takes and gives, where none is required."""
    known, _ = builtin().with_models([{kind: {"kind": kind}}], (), weights.default_dir())
    if kind in known.models and not (made.presets and made.model_fields):
        model(known.models[kind], known)
    else:
        terminal.console.print(f"{kind}: {_summary(made)}")
    if not made.model_fields:
        return
    table = Table("parameter", "default", "meaning", show_edge=False)
    meant = meanings(made)
    for name, field in made.model_fields.items():
        default = "required" if field.is_required() else str(field.get_default())
        table.add_row(name, default, meant.get(name, ""))
    terminal.console.print(table)
    if examples := ", ".join(made.presets):
        terminal.console.print(f"by plain names: {examples}")


def model(spec: ModelSpec, known: Registry) -> None:
    """A model's inputs, outputs and checkpoints."""
    assert spec.family is not None
    terminal.console.print(f"{spec.name}: {_summary(type(spec.family))}")
    for raw, form in spec.inputs:
        terminal.console.print(f"  input    {raw}: {NAMED.get(str(form), form)}")
    for name in spec.reads:
        terminal.console.print(f"  input    the feature {name}")
    for names, what in ((known.columns, "column "), (known.features, "feature")):
        for name, post in names.items():
            if post.model == spec.name:
                kind = post.type or f"float, of {' x '.join(map(str, post.shape)) or 'any'} values"
                terminal.console.print(f"  {what}  {name}: {kind}")
    unknown = "not known; look at the publisher's" if spec.checkpoints else ""
    if licence := spec.family.licence() or unknown:
        terminal.console.print(f"  licence  {licence}")
    if spec.checkpoints:
        terminal.checkpoints(weights.survey_all([spec], weights.default_dir(), quick=True))
