"""The types of a run's outputs, which all its shards have: declared, or agreed on by its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from d2m_hpc.config import Config
from d2m_hpc.models.registry import Registry
from d2m_hpc.models.types import is_field_type
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.values import agreeable, arrow_type
from d2m_hpc.storage import first_write

Shape = tuple[int, ...]
Ahead = Callable[[str], Iterable[Sequence[Any]]]
"""Values of a field in other shards of the run, some of a shard at a time."""


def nothing(name: str) -> Iterable[Sequence[Any]]:
    return ()


def untold(name: str) -> str:
    return ""


@dataclass
class Schema:
    """Types by name; whatever is not declared is what the first shard that shows it makes of it.

    Attributes:
        fields: types that the config declares.
        columns: types that models declare.
        shapes: of features, as models declare them.
        version: of the custom code, whose columns another version may give other types.
        run: keeps what tasks agree on; without one, this object does.
        ahead: where to look for a field that a shard has no value of.
        kept: the type that a field has in what was finished before types were agreed on.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    version: str = ""
    run: RunDir | None = None
    ahead: Ahead = nothing
    kept: Callable[[str], str] = untold
    _known: dict[tuple[str, str], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> Schema:
        """Of a config alone, which no other process shares; a custom file's types are found."""
        known, _ = config.registry(Registry())
        built_in = {} if config.custom_file else {**known.columns, **known.features}
        return cls(
            fields=config.field_types,
            columns={name: post.type for name, post in built_in.items() if post.type},
            shapes={name: post.shape for name, post in built_in.items() if post.shape},
        )

    def field(self, name: str, values: Sequence[Any] = ()) -> str:
        """A field's type; empty where nothing tells it: all values are null, here and ahead."""
        if declared := self.fields.get(name):
            return declared
        if known := self._agreed("field", name):
            return str(known)
        kind = self.kept(name) or agreeable(name, values)
        for others in () if kind else self.ahead(name):
            if kind := agreeable(name, others):
                break
        if not kind and any(value is not None for value in values):
            kind = "json"  # empty lists: of what, nobody knows
        return str(self._agreed("field", name, kind)) if kind else ""

    def settled(self, name: str) -> str:
        """A field's type where nothing has told it: text, in which any value has a place."""
        return self.field(name) or str(self._agreed("field", name, "string"))

    def is_seen(self, name: str) -> bool:
        """Whether a sample of the run has the field, be it null."""
        return bool(self._agreed("seen", name))

    def mark_seen(self, name: str) -> None:
        self._agreed("seen", name, True)

    def column(self, name: str, found: str = "") -> str:
        """A column's type; empty where nothing is declared, agreed or found.

        Args:
            found: what a shard's values are; empty where that cannot be told.
        """
        if declared := self.columns.get(name):
            return declared
        return str(self._agreed(f"column{self.version}", name, found) or "")

    def shape(self, name: str, found: Shape | None = None) -> Shape | None:
        """Of a feature's rows.

        Args:
            found: a shard's; None where it has no rows.
        """
        if name in self.shapes:
            return self.shapes[name] if found is None else found
        known = self._agreed(f"feature{self.version}", name, found)
        return None if known is None else tuple(known)

    def _agreed(self, what: str, name: str, proposal: Any = None) -> Any:
        known = self._known.get((what, name))
        if known is not None:
            return known
        if self.run is None:
            known = None if proposal == "" else proposal
        else:
            path, take = self.run.agreed(what, name), partial(_type, what)
            known = first_write.read(path, take)
            if known is None and proposal not in (None, ""):
                note = {"name": name, "what": what, "type": proposal}
                known = first_write.agree(path, note, take)
        if known is not None:
            self._known[what, name] = known
        return known


def _type(what: str, found: Any) -> Any:
    """What a note of `Schema` says.

    Raises:
        ValueError, LookupError, TypeError: it is none.
    """
    kind = found["type"]
    if what.startswith("feature"):
        if not all(isinstance(length, int) for length in kind):
            raise TypeError(f"{kind!r} is no shape")
    elif what != "seen":
        arrow_type(str(kind))
        if what == "field" and not is_field_type(str(kind)):
            raise ValueError(f"{kind!r} is no type of a field")
    return kind
