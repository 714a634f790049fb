"""The user's code as a submission keeps it, so that its tasks run that code and no other.

`submissions/000/frozen/` holds copies of the custom file and of the modules beside it that the file
imports; `custom.json`, with their places, their hashes, and the names that they define; and
`checkpoints.json`, with the sizes, times and hashes of the checkpoints, which are not copied. The
folder is written before the intent, so a submission with an intent has the whole folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from d2m_hpc.errors import D2MError, WeightsError
from d2m_hpc.models.code import Source, Sources
from d2m_hpc.models.inputs import NAMED
from d2m_hpc.models.registry import Registry, builtin
from d2m_hpc.models.weights import Kept
from d2m_hpc.run.damage import undamaged
from d2m_hpc.run.folder import RunDir, Submission
from d2m_hpc.storage.files import atomic_write, is_private


@cache
def names() -> TypeAdapter[Registry]:
    """How a registry is written and read; made when asked, as that takes milliseconds."""
    return TypeAdapter(Registry)


@dataclass(frozen=True)
class Custom:
    """A custom file that has run: the names that the file defines, and its modules.

    Attributes:
        registry: the file's names and the built-in ones.
        sources: the file's modules; empty for a config without a custom file.
        missing: modules that the file imports and that were not found.
    """

    registry: Registry = field(default_factory=Registry)
    sources: Sources = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def hashes(self) -> dict[str, str]:
        """The sha256 of each module that is not empty, by name, the file itself first."""
        return {name: s.sha256 for name, s in self.sources.items() if s.data}

    @property
    def version(self) -> str:
        """One hash for all modules; the file's own hash if it has no other modules."""
        hashes = self.hashes
        if len(hashes) < 2:
            return next(iter(hashes.values()), "")
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def is_current(self, file: Path) -> bool:
        """Whether running the file again would run the same code."""
        main = next(iter(self.sources.values()), None)
        if main is None or main.path != str(file):
            return False
        folder = file.parent
        appeared = (folder.joinpath(m + end).exists() for m in self.missing for end in ("", ".py"))
        return all(s.is_unchanged for s in self.sources.values()) and not any(appeared)

    def described(self) -> dict[str, Any]:
        """Describe the custom file as JSON: its own names, and the places of its modules."""
        own = self.registry.own
        named: dict[str, Any] = names().dump_python(self.registry, mode="json")
        for kind in ("models", "columns", "features"):
            named[kind] = {name: value for name, value in named[kind].items() if name in own}
        named["preprocessors"] = sorted(self.registry.preprocessors & own)
        modules = {n: {"path": s.path, "sha256": s.sha256} for n, s in self.sources.items()}
        return {**named, "own": sorted(own), "modules": modules, "missing": [*self.missing]}

    @classmethod
    def of(cls, described: dict[str, Any], sources: Sources) -> Custom:
        """Make the object of which `described` made a description."""
        named = names().validate_python(
            {k: v for k, v in described.items() if k in asdict(Registry())}
        )
        known = builtin()
        registry = replace(
            named,
            models={**known.models, **named.models},
            columns={**known.columns, **named.columns},
            features={**known.features, **named.features},
            preprocessors=named.preprocessors | frozenset(NAMED),
        )
        return cls(registry, sources, tuple(described["missing"]))


def write(folder: Path, custom: Custom) -> None:
    """Freeze a custom file in a submission's folder; copies of private files are private, too."""
    described = custom.described()
    for number, (name, source) in enumerate(custom.sources.items()):
        copy = f"{number:03d}-{Path(source.path).name[-100:]}"
        atomic_write(folder / copy, source.data, private=is_private(Path(source.path)))
        described["modules"][name]["copy"] = copy
    text = json.dumps(described, indent=1).encode()
    atomic_write(folder / "custom.json", text)


def write_checkpoints(folder: Path, checkpoints: Mapping[str, Kept]) -> None:
    """Freeze the sizes, times and hashes of the checkpoints."""
    text = json.dumps({name: asdict(kept) for name, kept in checkpoints.items()}, indent=1)
    atomic_write(folder / "checkpoints.json", text.encode())


def require_checkpoints(folder: Path) -> set[str]:
    """Require the checkpoints that the submit found; returns their paths.

    Raises:
        WeightsError: checkpoints have changed; names each.
    """
    path = folder / "checkpoints.json"
    if not path.exists():  # an earlier version made the submission
        return set()
    with undamaged(path, "its tasks cannot go on; submit again"):
        checkpoints = [Kept(**values) for values in json.loads(path.read_bytes()).values()]
    if others := [why for kept in checkpoints if (why := kept.other())]:
        advice = f"restore what {path} tells of, or submit again"
        told = ["checkpoints have changed since the submit:", *others, advice]
        raise WeightsError("\n  ".join(told))
    return {os.path.abspath(kept.path) for kept in checkpoints}


def read(folder: Path) -> Custom:
    """Read a frozen custom file; an empty one if the submission's config names none.

    Raises:
        D2MError: a file in the folder is damaged.
    """
    path = folder / "custom.json"
    advice = "its tasks cannot go on; submit again"
    try:
        with undamaged(path, advice):
            described = json.loads(path.read_bytes())
            sources = {
                name: Source(m["path"], (folder / m["copy"]).read_bytes(), str(folder / m["copy"]))
                for name, m in described["modules"].items()
            }
            custom = Custom.of(described, sources)
    except FileNotFoundError:
        if path.exists():
            raise
        return Custom()
    for name, source in sources.items():
        if source.sha256 != described["modules"][name]["sha256"]:
            raise D2MError(
                f"{source.copy} is not the copy that was made of {source.path}; {advice}"
            )
    return custom


def newest(run: RunDir, file: Path) -> Custom | None:
    """Read the custom file that the last submission froze; None if the file has changed since."""
    submissions: list[Submission] = run.submissions()
    try:
        custom = read(submissions[-1].frozen) if submissions else Custom()
    except (OSError, D2MError):  # the damage is reported by the tasks that need the files
        return None
    return custom if custom.is_current(file) else None
