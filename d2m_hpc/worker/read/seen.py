"""Note the fields of samples' JSON: a field that no sample has is mostly misspelt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from d2m_hpc.config import Config
from d2m_hpc.run.schema import Schema
from d2m_hpc.storage.texts import BRIEF, nearest, safe
from d2m_hpc.worker.read.parse import has_field

MOST = 100
"""Keys that are kept, to find the one that was meant."""


@dataclass
class Seen:
    """The fields in the JSON of a shard's samples; decode threads add to them.

    Attributes:
        samples: the number of samples with a JSON.
        present: wanted fields that a sample has, even as null.
        keys: all fields, as long as a wanted one is missing.
        renamed: samples whose JSON has another `key` than their file's name.
    """

    samples: int = 0
    present: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    renamed: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, key: str, values: Mapping[str, Any], wanted: Sequence[str]) -> None:
        with self._lock:
            self.samples += 1
            if "key" in wanted and values.get("key", key) != key:
                self.renamed += 1
            if len(self.present) < len(wanted):
                self.present.update(name for name in wanted if has_field(values, name))
                if len(self.present) < len(wanted) and len(self.keys) < MOST:
                    self.keys.update(values)

    def missing(self, wanted: Sequence[str]) -> list[str]:
        """Wanted fields that no sample has, without `key`, which the file's name gives."""
        names = [name for name in wanted if name not in self.present and name != "key"]
        return names if self.samples else []

    def told(self, name: str, where: str) -> str:
        """A line on a missing field, with the name that may have been meant."""
        keys = [safe(key, BRIEF) for key in sorted(self.keys)]
        hint = safe(nearest(name, keys), 200) if keys else "; their JSON has no field at all"
        return f"no sample of {where} has the field {safe(name, BRIEF)!r}{hint}"

    def missed(self, config: Config, schema: Schema) -> list[str]:
        """Notices of fields that no sample of a shard has; others are marked as seen in the run."""
        for name in self.present:
            schema.mark_seen(name)
        names = self.missing([name for name, _ in config.asked_fields])
        told = [self.told(name, "this shard") for name in names]
        if self.renamed:
            # Of one form, as `d2m status` groups notices that differ in figures alone.
            what = "another `key` in their JSON than their file's name, which the column `key` has"
            told.append(f"samples with {what}: {self.renamed}")
        return told
