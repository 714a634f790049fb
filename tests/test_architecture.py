"""The rules of DESIGN that a reader of the code relies on."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

import d2m_hpc
from d2m_hpc import config as configs

PACKAGE = Path(d2m_hpc.__file__).parent
ROOT = Path(__file__).parent.parent

LEVELS = {
    "d2m_hpc": 10,  # the door for Python
    "d2m_hpc.version": 0,
    "d2m_hpc.errors": 0,
    "d2m_hpc.described": 0,
    "d2m_hpc.gc_paused": 1,
    "d2m_hpc.stopping": 0,
    "d2m_hpc.storage": 1,
    "d2m_hpc.models": 2,
    "d2m_hpc.config": 3,
    "d2m_hpc.run": 4,
    "d2m_hpc.worker": 5,
    "d2m_hpc.plan": 6,
    "d2m_hpc.subsets": 7,
    "d2m_hpc.launch": 7,
    "d2m_hpc.watch": 8,
    "d2m_hpc.api": 9,
    "d2m_hpc.cli": 10,
    "d2m_hpc.__main__": 11,
}
"""A module imports from its own room and from lower ones."""

WITHOUT_TORCH = (
    "d2m_hpc",
    "d2m_hpc.api",
    "d2m_hpc.cli.*",
    "d2m_hpc.config.*",
    "d2m_hpc.models.hub",
    "d2m_hpc.models.lock",
    "d2m_hpc.models.published",
    "d2m_hpc.models.registry",
    "d2m_hpc.models.weights",
    "d2m_hpc.plan.*",
    "d2m_hpc.run.*",
    "d2m_hpc.storage.*",
    "d2m_hpc.launch.*",
    "d2m_hpc.subsets.*",
    "d2m_hpc.watch.*",
)
IMPORTED_AS = {
    "faiss-cpu": "faiss",
    "nvidia-ml-py": "pynvml",
    "open_clip_torch": "open_clip",
    "opencv-python": "cv2",
    "pillow": "PIL",
    "pylance": "lance",
    "pyyaml": "yaml",
}
LONGEST_FUNCTION = 45


@cache
def _modules() -> dict[str, ast.Module]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {_name(p): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _imports(tree: ast.AST, deferred: bool) -> Iterator[str]:
    """What a tree imports by full names; `deferred` takes what is in functions along.

    What only a type checker reads is left out, as it is never imported.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and not deferred:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from (name if name in _modules() else module for name in names)
        else:
            yield from _imports(node, deferred)


def _arrows(deferred: bool) -> dict[str, set[str]]:
    """Who imports whom within the package."""
    return {
        name: {i for i in _imports(tree, deferred) if i in _modules()} - {name}
        for name, tree in _modules().items()
    }


def _upward(arrows: dict[str, set[str]]) -> set[tuple[str, str]]:
    return {
        (module, imported)
        for module, all_imported in arrows.items()
        for imported in all_imported
        if LEVELS[_room(imported)] > LEVELS[_room(module)]
        or (LEVELS[_room(imported)] == LEVELS[_room(module)] and _room(imported) != _room(module))
    }


def test_every_module_has_a_level() -> None:
    assert {_room(name) for name in _modules()} == LEVELS.keys()


def test_imports_go_down_only() -> None:
    assert _upward(_arrows(deferred=True)) == set()
    assert _upward({"d2m_hpc.storage.x": {"d2m_hpc.config"}})  # the rule can be broken


def _types(tree: ast.Module) -> Iterator[str]:
    """Classes, and what else has a class's name: aliases of types and functions that make them."""
    yield from (node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = (target.id for target in targets if isinstance(target, ast.Name))
        yield from (name for name in names if name != name.upper() and name[0].isupper())


def test_no_two_types_share_a_name() -> None:
    """A reader who finds one of them by its name has found the one that is meant; private names are
    never found from elsewhere."""
    names = (name for tree in _modules().values() for name in _types(tree))
    found = Counter(name for name in names if not name.startswith("_"))
    assert {"Work", "Blocks", "Shape"} <= found.keys()
    assert [name for name, count in found.items() if count > 1] == []


def test_a_login_node_imports_no_worker_before_it_runs_one() -> None:
    workers = {
        (module, imported)
        for module, all_imported in _arrows(deferred=False).items()
        for imported in all_imported
        if LEVELS[_room(module)] > LEVELS["d2m_hpc.worker"] and _room(imported) == "d2m_hpc.worker"
    }
    assert workers == set()


def test_the_cli_imports_nothing_of_its_own_but_errors_at_once() -> None:
    commands = {n: i for n, i in _arrows(deferred=False).items() if _room(n) == "d2m_hpc.cli"}
    imported = set().union(*commands.values()) - commands.keys()
    assert imported == {"d2m_hpc.api", "d2m_hpc.errors"}


def test_there_are_no_circles() -> None:
    order = list(TopologicalSorter(_arrows(deferred=True)).static_order())
    assert order.index("d2m_hpc.cli") > order.index("d2m_hpc.launch.flow")


def test_claims_and_records_need_the_standard_library_and_filelock_only() -> None:
    """What decides that nothing is lost or doubled is read without a library at hand."""
    known = {
        *("storage.files", "storage.lease", "storage.first_write", "storage.texts"),
        *("run.folder", "run.records", "run.manifest", "run.merge", "run.chunks"),
        *("run.attempts", "run.staging"),
    }
    outside = {
        imported.split(".")[0]
        for name in known
        for imported in _imports(_modules()[f"d2m_hpc.{name}"], deferred=True)
    }
    assert outside - sys.stdlib_module_names == {"d2m_hpc", "filelock"}


def test_what_runs_on_a_login_node_loads_no_torch() -> None:
    """Nor does anything that it imports."""
    wanted = [
        name
        for name in _modules()
        if any(re.fullmatch(p.replace(".*", r"(\..*)?"), name) for p in WITHOUT_TORCH)
    ]
    assert len(wanted) > 12
    code = (
        "import importlib, sys\n"
        f"for name in {[*wanted, 'd2m_hpc.worker.task']!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(name)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr == "d2m_hpc.worker.task\n"  # the first that does, and the last


def _requirements() -> dict[str, str]:
    """Name to version specifier."""
    return _specifiers(_setup()["options"]["install_requires"])


def _on_request() -> dict[str, str]:
    """What the extras bring that users ask for."""
    extras = _setup()["options.extras_require"].items()
    return _specifiers("\n".join(lines for name, lines in extras if name not in ("bench", "test")))


def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def _specifiers(lines: str) -> dict[str, str]:
    pairs = [re.fullmatch(r"([A-Za-z0-9_-]+)(.*)", line) for line in lines.split()]
    return {match[1]: match[2] for match in pairs if match}


def _third_parties() -> set[str]:
    every = {i.split(".")[0] for t in _modules().values() for i in _imports(t, deferred=True)}
    return every - sys.stdlib_module_names - {"d2m_hpc"}


def test_every_requirement_is_imported_and_every_import_required() -> None:
    """What an extra brings may be imported, in the functions that need it."""
    always = {IMPORTED_AS.get(name, name) for name in _requirements()}
    asked = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in _on_request()}
    assert always <= _third_parties() <= always | asked


def test_every_requirement_has_a_lower_bound() -> None:
    bounds = {**_requirements(), **_on_request()}.values()
    assert all(re.match(r">=\d", bound) for bound in bounds)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.yml")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_config_we_ship_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = configs.load(path)
    assert config.models == yaml.safe_load(path.read_text())["models"]


def test_there_are_configs() -> None:
    names = {p.name for p in (ROOT / "configs").rglob("*.yml")}
    assert names >= {"quickstart.yml", "datacomp.yml"}


def test_functions_stay_short() -> None:
    sizes = {
        f"{module}.{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for module, tree in _modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert {n: size for n, size in sizes.items() if size > LONGEST_FUNCTION} == {}


def test_a_task_without_nets_loads_no_library_of_nets_and_no_pandas() -> None:
    """They take four times as long as torch; pandas is loaded by pyarrow's first array."""
    ended = subprocess.run([sys.executable, "-c", WITHOUT_NETS], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("\n(1, 2)\n", "")


WITHOUT_NETS = """
import sys
from d2m_hpc.config import Config
from d2m_hpc.models.tokens import clip_tokens
from d2m_hpc.stopping import own_process
from d2m_hpc.worker.batch import Outputs
from d2m_hpc.worker.write.table import Table
own_process()
clip_tokens("a cat")
keys = {"models": ["image-stats"], "postprocess_columns": ["image-brightness"]}
keys |= {"nworkers": 1, "batch_size": 1, "device": "cpu", "input_tars": ["a.tar"]}
table = Table(Config(**keys, output_metadata_dir="out"))
table.add(Outputs(["a"], {"image-brightness": [0.5]}, {}, {}))
made = table.table()
print(*{"open_clip", "timm", "transformers", "torchvision", "pandas"} & {*sys.modules})
print(made.to_pandas().shape)
"""
