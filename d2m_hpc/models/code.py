"""Find the Python modules that a custom file imports, and run them again from copies.

A custom file imports what lies beside it by name. Whoever describes the file runs it once and
keeps the source of each such module; tasks run these sources, whatever lies there by then.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import linecache
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder, SourceLoader
from importlib.machinery import (
    ExtensionFileLoader,
    ModuleSpec,
    PathFinder,
    SourcelessFileLoader,
)
from pathlib import Path
from types import CodeType, ModuleType

MODULE = "d2m_custom_"
"""What the name of a custom file's own module begins with."""
INSTALLED = {"site-packages", "dist-packages"}
MOST_MODULES, MOST_BYTES = 2000, 64 * 2**20
"""More than a custom file's modules need: a folder of it holds other programs."""


@dataclass(frozen=True)
class Source:
    """A module's file as it was read.

    Attributes:
        path: where the file lies or lay: the module's `__file__`.
        data: what it held; nothing for a folder that is a package without `__init__.py`.
        copy: the file that a compiled module is loaded from.
    """

    path: str
    data: bytes
    copy: str = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def is_package(self) -> bool:
        return Path(self.path).stem == "__init__"

    @property
    def is_unchanged(self) -> bool:
        """Whether the file still holds the same."""
        try:
            return Path(self.path).read_bytes() == self.data
        except OSError:
            return not self.data


Sources = dict[str, Source]
"""A custom file's modules by their names, the file itself first."""


def main_name(file: Path) -> str:
    """The name of a custom file's own module."""
    return f"{MODULE}{file.stem}"


class _KeptLoader(SourceLoader):
    """Run a module from the source at hand, under the name of its file."""

    def __init__(self, source: Source, ran: Sources) -> None:
        self._source, self._ran = source, ran

    def get_filename(self, fullname: str) -> str:
        return self._source.path

    def get_data(self, path: str | bytes) -> bytes:
        """Of the module, or of another file beside it, for `pkgutil.get_data`."""
        return self._source.data if path == self._source.path else Path(str(path)).read_bytes()

    def exec_module(self, module: ModuleType) -> None:
        self._ran.setdefault(module.__name__, self._source)
        super().exec_module(module)

    def get_code(self, fullname: str) -> CodeType:
        source = self._source
        code: CodeType = self.source_to_code(source.data, source.path)
        # Tracebacks and compilers (`inspect.getsource`) see what runs, not what the file holds now.
        lines = importlib.util.decode_source(source.data).splitlines(keepends=True)
        linecache.cache[source.path] = len(source.data), None, lines, source.path
        return code


class _RefusingLoader(Loader):
    """Say why a module is not imported, to who imports it; whoever only looks for it goes on."""

    def __init__(self, source: Source) -> None:
        self._path = source.path

    def exec_module(self, module: ModuleType) -> None:
        raise ModuleNotFoundError(
            f"{module.__name__!r} ({self._path}) was not found when the run was submitted, so that "
            "it is not frozen; import it by its name at the top of the custom file, and submit "
            "again",
            name=module.__name__,
        )


@dataclass(eq=False)
class Modules(MetaPathFinder):
    """Find the modules of a custom file, before anything else does.

    Attributes:
        file: the custom file.
        sources: its modules that are known: those that were imported.
        frozen: all are known; others that lie beside the file are not imported.
        missing: top-level names that the sources import and that are nowhere.
    """

    file: Path
    sources: Sources = field(default_factory=dict)
    frozen: bool = False
    missing: set[str] = field(default_factory=set)

    def install(self) -> None:
        """Take the place of another custom file."""
        forget()
        sys.meta_path.insert(0, self)

    def main(self) -> ModuleSpec:
        """The custom file itself.

        Raises:
            OSError: it cannot be read.
        """
        name = main_name(self.file)
        if name not in self.sources:
            self.sources[name] = Source(str(self.file), self.file.read_bytes())
        return _spec(name, self.sources[name], self.sources)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """How to import a module of the file; None where it is not one."""
        known = self.sources.get(fullname) or self._beside(fullname)
        if known is None:
            return None
        if self.frozen and fullname not in self.sources:
            return ModuleSpec(fullname, _RefusingLoader(known))
        return _spec(fullname, known, self.sources)

    def _beside(self, name: str) -> Source | None:
        """A module that lies beside or below the custom file and is not installed."""
        parent = name.rpartition(".")[0]
        if parent:
            if parent not in self.sources or not self.sources[parent].is_package:
                return None
            folder = str(Path(self.sources[parent].path).parent)
            return self._source(PathFinder.find_spec(name, [folder]))
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        installed = next((spec for f in others if (spec := f.find_spec(name, None))), None)
        return self._source(installed or PathFinder.find_spec(name, [str(self.file.parent)]))

    def _source(self, spec: ModuleSpec | None) -> Source | None:
        """Of a module that was found; a folder without `__init__.py` has an empty one."""
        if spec is None:
            return None
        folders = [str(Path(f, "__init__.py")) for f in spec.submodule_search_locations or ()]
        place = spec.origin if spec.has_location else next(iter(folders), None)
        if not place or not self._is_local(Path(place)):
            return None
        return Source(place, Path(place).read_bytes() if spec.has_location else b"", place)

    def _is_local(self, path: Path) -> bool:
        """Below the custom file's folder, and neither Python's own nor installed nor ours."""
        folder = self.file.parent
        if not path.is_relative_to(folder):
            folder, path = folder.resolve(), path.resolve()
        if not path.is_relative_to(folder) or INSTALLED & {*path.relative_to(folder).parts}:
            return False
        ours = str(Path(__file__).parent.parent)
        python = (sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib"))
        return not any(
            path.is_relative_to(other) and not folder.is_relative_to(other)
            for other in (ours, *python)
        )

    def look_ahead(self) -> None:
        """Find what functions will import only when they are called."""
        waiting = list(self.sources)
        while waiting:
            for name in _imported(waiting.pop(), self.sources):
                if name in self.sources or (name.partition(".")[0] in self.missing):
                    continue
                if found := self._beside(name):
                    self.sources[name] = found
                    waiting.append(name)
                elif "." not in name and not _is_installed(name):
                    self.missing.add(name)


def forget() -> None:
    """Forget the custom file that was run, and its modules: another one's may have their names."""
    for finder in [f for f in sys.meta_path if isinstance(f, Modules)]:
        sys.meta_path.remove(finder)
        for name in finder.sources:
            sys.modules.pop(name, None)


def _is_installed(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _imported(name: str, sources: Sources) -> Iterator[str]:
    """Every module that a module's source imports anywhere, each after its packages."""
    source = sources[name]
    if not source.path.endswith(".py"):
        return
    package = name if source.is_package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source.data)):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package) if node.level else base
            found = [f"{base}.{alias.name}" for alias in node.names]
        for dotted in found:
            parts = dotted.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _spec(name: str, source: Source, ran: Sources) -> ModuleSpec:
    """How to import a module; a compiled one can be loaded from a file only, the copy."""
    if source.path.endswith(".py"):
        spec = importlib.util.spec_from_file_location(
            name, source.path, loader=_KeptLoader(source, ran)
        )
    else:
        kind = SourcelessFileLoader if source.path.endswith(".pyc") else ExtensionFileLoader
        loader = kind(name, source.copy)
        spec = importlib.util.spec_from_file_location(name, source.copy, loader=loader)
        ran.setdefault(name, source)
    assert spec is not None  # with a loader there always is one
    return spec
