"""The modules of a custom file: which are its own, and how they run from what was read of them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import linecache
import py_compile
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from d2m_hpc.models.code import Modules, Source, Sources, forget


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    forget()


def write(folder: Path, **texts: str) -> Path:
    """`a__b` is `a/b.py`; returns the custom file."""
    for name, text in texts.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "own.py"


def run(file: Path, sources: Sources | None = None) -> tuple[ModuleType, Modules]:
    modules = Modules(file, dict(sources or {}), frozen=sources is not None)
    modules.install()
    spec = modules.main()
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if sources is None:
        modules.look_ahead()
    return module, modules


def test_folders_without_init_and_nested_packages_are_found(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        own="import space.thing\nfrom pack.deep import at\nVALUES = space.thing.X, at.X",
        space__thing="X = 1",
        pack____init__="",
        pack__deep____init__="from . import at",
        pack__deep__at="X = 2",
        pack__unused="X = 3",
    )
    module, modules = run(file)
    assert module.VALUES == (1, 2)  # type: ignore[attr-defined]
    found = {"d2m_custom_own", "space", "space.thing", "pack", "pack.deep", "pack.deep.at"}
    assert set(modules.sources) == found
    for path in tmp_path.rglob("*.py"):
        path.write_text("1 / 0")
    again, _ = run(file, modules.sources)
    assert again.VALUES == (1, 2)  # type: ignore[attr-defined]


def test_a_module_that_pythonpath_leads_to_is_beside_the_file_all_the_same(tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path))
    file = write(tmp_path, own="import helper_a\nX = helper_a.X", helper_a="X = 1")
    _, modules = run(file)
    write(tmp_path, helper_a="X = 2")
    module, _ = run(file, modules.sources)
    assert module.X == 1  # type: ignore[attr-defined]


def test_what_is_installed_is_not_the_files_though_it_lies_below_it(tmp_path: Path) -> None:
    packages = tmp_path / "venv" / "lib" / "site-packages"
    write(packages, a_package="X = 1")
    sys.path.append(str(packages))
    file = write(tmp_path, own="import a_package, json, d2m_hpc", json="1 / 0", d2m_hpc="1 / 0")
    _, modules = run(file)
    assert set(modules.sources) == {"d2m_custom_own"}
    sys.modules.pop("a_package")


def test_a_compiled_module_is_loaded_from_its_copy(tmp_path: Path) -> None:
    write(tmp_path, helper_b="X = 5")
    py_compile.compile(str(tmp_path / "helper_b.py"), str(tmp_path / "helper_b.pyc"))
    (tmp_path / "helper_b.py").unlink()
    file = write(tmp_path, own="import helper_b\nX = helper_b.X")
    _, modules = run(file)
    source = modules.sources["helper_b"]
    copy = tmp_path / "copies" / "000-helper_b.pyc"
    copy.parent.mkdir()
    copy.write_bytes(source.data)
    (tmp_path / "helper_b.pyc").unlink()
    kept = {**modules.sources, "helper_b": Source(source.path, source.data, str(copy))}
    module, _ = run(file, kept)
    assert module.X == 5  # type: ignore[attr-defined]
    assert sys.modules["helper_b"].__file__ == str(copy)


def test_the_source_that_compilers_and_tracebacks_see_is_the_one_that_runs(tmp_path: Path) -> None:
    text = "def post(cache):\n    return cache['a']\n"
    file = write(tmp_path, own=text)
    _, modules = run(file)
    file.write_text("\n\n\ndef other():\n    pass\n")
    linecache.clearcache()
    module, _ = run(file, modules.sources)
    assert inspect.getsource(module.post) == text  # type: ignore[attr-defined]
    assert module.__file__ == str(file)


def test_what_appears_beside_a_frozen_file_is_not_imported(tmp_path: Path) -> None:
    file = write(tmp_path, own="import importlib\nget = importlib.import_module")
    module, modules = run(file)
    write(tmp_path, late_c="X = 1")
    frozen, _ = run(file, modules.sources)
    with pytest.raises(
        ModuleNotFoundError, match=r"'late_c' \(.*\) was not found when the run was"
    ):
        frozen.get("late_c")  # type: ignore[attr-defined]
    with pytest.raises(ModuleNotFoundError, match="No module named 'late_d'"):
        frozen.get("late_d")  # type: ignore[attr-defined]
    assert module is not frozen


def test_a_module_that_is_only_looked_for_is_none_of_the_files(tmp_path: Path) -> None:
    """As libraries do for what they can do without; a folder of that name may appear any time."""
    look = "import importlib.util as util\nFOUND = util.find_spec('optional_e') is not None"
    file = write(tmp_path, own=look)
    _, modules = run(file)
    assert set(modules.sources) == {"d2m_custom_own"}
    (tmp_path / "optional_e").mkdir()
    _, later = run(file)
    assert set(later.sources) == {"d2m_custom_own"}
    frozen, _ = run(file, modules.sources)
    assert frozen.FOUND  # type: ignore[attr-defined]
