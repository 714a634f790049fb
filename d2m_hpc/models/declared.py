"""What a user's custom file declares, read without running it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d2m_hpc.models.registry import (
    COLUMNS,
    FEATURES,
    LOOKUPS,
    MODELS,
    PREPROCESSORS,
    ModelSpec,
    Post,
    Registry,
)

STATIC_FIELDS = ("raw_inputs", "preprocessors", "dependencies", "to_device")


def spec(name: str, fields: Mapping[str, Any]) -> ModelSpec:
    """What a custom class's static fields say; those that are left out have the seed's defaults."""
    return ModelSpec(
        name,
        raw_inputs=_names(fields.get("raw_inputs")),
        preprocessors=_names(fields.get("preprocessors")),
        dependencies=_names(fields.get("dependencies")),
        to_device=bool(fields.get("to_device", True)),
    )


def _names(value: Any) -> tuple[str, ...]:
    """`("image")` is what a one-element tuple looks like to most who write one."""
    return (value,) if isinstance(value, str) else tuple(value or ())


class _CustomFile:
    """A custom file's lookup tables and its classes' static fields, by its syntax tree."""

    def __init__(self, path: Path) -> None:
        try:
            tree = ast.parse(path.read_bytes(), filename=str(path))
        except (RecursionError, MemoryError):
            raise ValueError(f"{path} is nested too deeply") from None
        self.classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
        self.assigned = dict(_assignments(tree.body))
        mentions = Counter(_mentions(tree))
        # A lookup that is mentioned elsewhere may be changed or made there.
        plain = all(mentions[n] == (self.table(n) is not None) for n in LOOKUPS)
        models = (self.table("model_lookup") or {}).values()
        self.complete = (
            plain and "*" not in mentions and all(self._static(m) is not None for m in models)
        )

    def table(self, name: str) -> dict[str, ast.expr] | None:
        """A lookup's entries; None when it is not a plain dict of string keys."""
        node = self.assigned.get(name)
        if not isinstance(node, ast.Dict):
            return None
        keys = [k.value if isinstance(k, ast.Constant) else None for k in node.keys]
        if not all(isinstance(k, str) for k in keys):
            return None
        return dict(zip((str(k) for k in keys), node.values, strict=True))

    def model(self, name: str, value: ast.expr) -> ModelSpec:
        return spec(name, self._static(value) or {})

    def _static(self, value: ast.expr, below: frozenset[str] = frozenset()) -> Any:
        """A class's static fields, inherited ones included; None when one is not a literal.

        Args:
            below: the classes that inherit from it. `class M(M)` means an `M` of before.
        """
        name = value.id if isinstance(value, ast.Name) and value.id not in below else ""
        node = self.classes.get(name)
        if node is None:
            return {}
        found: dict[str, Any] = {}
        for base in reversed(node.bases):
            inherited = self._static(base, below | {name})
            if inherited is None:
                return None
            found |= inherited
        try:
            pairs = [(k, v) for k, v in _assignments(node.body) if k in STATIC_FIELDS]
            own = {k: ast.literal_eval(v) for k, v in pairs}
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return None
        return found | own if all(map(_is_static, own.items())) else None

    def posts(self, lookup: str) -> dict[str, Post]:
        table = self.table(lookup) or {}
        return {k: Post(_keyword(v, "model") or _read_alone(v)) for k, v in table.items()}

    @property
    def own(self) -> frozenset[str]:
        """Every name in the lookups."""
        return frozenset(name for lookup in LOOKUPS for name in self.table(lookup) or ())


def _is_static(field: tuple[str, Any]) -> bool:
    """Whether a value is one that such a field may have; running the file tells the others."""
    name, value = field
    names = value if isinstance(value, list | tuple) else ()
    known = value is None or isinstance(value, str | list | tuple)
    return name == "to_device" or (known and all(isinstance(n, str) for n in names))


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """Names that are assigned to one by one, annotated or not, and their values."""
    for node in body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and value is not None:
                yield target.id, value


def _mentions(tree: ast.AST) -> Iterator[str]:
    """Every name that a tree uses or imports, each time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.asname or node.name


def _keyword(node: ast.expr, name: str) -> str:
    """The string given as a keyword argument of a call, or an empty one."""
    for keyword in node.keywords if isinstance(node, ast.Call) else ():
        if keyword.arg == name and isinstance(keyword.value, ast.Constant):
            return str(keyword.value.value)
    return ""


def _read_alone(node: ast.expr) -> str:
    """The one model that `lambda cache: ... cache["model"] ...` reads, or an empty string.

    The latter also where the lambda hands on its argument, for then it may read any.
    """
    if not isinstance(node, ast.Lambda) or len(node.args.args) != 1:
        return ""
    argument, uses = node.args.args[0].arg, Counter(_mentions(node.body))
    read = [
        part.slice.value
        for part in ast.walk(node.body)
        if isinstance(part, ast.Subscript)
        and isinstance(part.value, ast.Name)
        and part.value.id == argument
        and isinstance(part.slice, ast.Constant)
    ]
    return str(read[0]) if len(set(read)) == 1 and uses[argument] == len(read) else ""


def names(path: Path | None) -> Registry:
    """The built-in names and those that a custom file declares.

    Raises:
        OSError, SyntaxError, ValueError: the file cannot be read or parsed.
    """
    if path is None:
        return Registry()
    custom = _CustomFile(path)
    models = {k: custom.model(k, v) for k, v in (custom.table("model_lookup") or {}).items()}
    return Registry(
        models={**MODELS, **models},
        columns={**COLUMNS, **custom.posts("postprocess_parquet_lookup")},
        features={**FEATURES, **custom.posts("postprocess_feature_lookup")},
        preprocessors=PREPROCESSORS | (custom.table("preprocessor_lookup") or {}).keys(),
        complete=custom.complete,
        own=custom.own,
    )
