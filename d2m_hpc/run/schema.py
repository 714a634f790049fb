"""The types of a run's outputs, the same in all shards: declared, or agreed on by the tasks."""

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
"""A function that reads values of a field in other shards, a list from each shard."""


def nothing(name: str) -> Iterable[Sequence[Any]]:
    return ()


def untold(name: str) -> str:
    return ""


@dataclass
class Schema:
    """Types by name; the first shard that shows a type decides one that is not declared.

    Attributes:
        fields: types that the config declares.
        columns: types that models declare.
        shapes: shapes of features that models declare.
        version: the hash of the custom code: another version's columns may have other types.
        run: the run folder that keeps the agreed types; None to keep them in this object.
        ahead: reads values of a field in other shards, if a shard has none.
        kept: finds a field's type in outputs of versions that did not agree on types.
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
        """Make the types of a config for one process; a custom file's types are not declared."""
        known, _ = config.registry(Registry())
        built_in = {} if config.custom_file else {**known.columns, **known.features}
        return cls(
            fields=config.field_types,
            columns={name: post.type for name, post in built_in.items() if post.type},
            shapes={name: post.shape for name, post in built_in.items() if post.shape},
        )

    def field(self, name: str, values: Sequence[Any] = ()) -> str:
        """A field's type; empty if all its values are null, in this shard and ahead."""
        if declared := self.fields.get(name):
            return declared
        if known := self._agreed("field", name):
            return str(known)
        kind = self.kept(name) or agreeable(name, values)
        for others in () if kind else self.ahead(name):
            if kind := agreeable(name, others):
                break
        if not kind and any(value is not None for value in values):
            kind = "json"  # all are empty lists
        return str(self._agreed("field", name, kind)) if kind else ""

    def settled(self, name: str) -> str:
        """A field's type; text, which holds any value, if no value has decided the type."""
        return self.field(name) or str(self._agreed("field", name, "string"))

    def is_seen(self, name: str) -> bool:
        """Whether a sample of the run has the field, even if its value is null."""
        return bool(self._agreed("seen", name))

    def mark_seen(self, name: str) -> None:
        self._agreed("seen", name, True)

    def column(self, name: str, found: str = "") -> str:
        """A column's type; empty if none is declared, agreed or found.

        Args:
            found: the type of a shard's values; empty if they have none.
        """
        if declared := self.columns.get(name):
            return declared
        return str(self._agreed(f"column{self.version}", name, found) or "")

    def shape(self, name: str, found: Shape | None = None) -> Shape | None:
        """The shape of a feature's rows.

        Args:
            found: the shape in a shard; None if the shard has no rows.
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
    """Read the type in a note of `Schema`.

    Raises:
        ValueError, LookupError, TypeError: the note is damaged.
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
