"""The built wheel: what a user installs, who has no checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
PACKED = ("d2m_hpc", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that setuptools leaves nothing in the checkout.

    With a folder of bytecode, as whoever has tried a custom file has there.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source, ignored = folder / "source", shutil.ignore_patterns("__pycache__")
    source.mkdir()
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    (source / "configs" / "custom" / "__pycache__").mkdir()
    uv = Path(sys.executable).with_name("uv")
    command = [uv, "build", "--quiet", "--wheel", "--out-dir", folder / "dist", source]
    subprocess.run(command, check=True)
    [path] = (folder / "dist").glob("*.whl")
    return path


def files_below(folder: Path) -> set[str]:
    """What is written by hand: other tests compile what lies there."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if "__pycache__" not in name}


def test_all_that_the_program_reads_is_in_the_wheel(wheel: Path) -> None:
    packed = {name for name in ZipFile(wheel).namelist() if name.startswith("d2m_hpc/")}
    wanted = {f"d2m_hpc/{name}" for name in files_below(ROOT / "d2m_hpc")}
    assert "d2m_hpc/watch/page/page.html.j2" in wanted
    assert "d2m_hpc/launch/array.sbatch" in wanted
    assert "d2m_hpc/py.typed" in wanted
    assert packed == wanted


def test_the_configs_are_in_the_wheel(wheel: Path) -> None:
    share = "data/share/d2m_hpc/configs/"
    found = {n.partition(share)[2] for n in ZipFile(wheel).namelist() if share in n}
    assert found == files_below(ROOT / "configs")


def test_a_program_without_the_checkout_runs(wheel: Path, tmp_path: Path) -> None:
    """From the wheel alone, with this environment's libraries."""
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import d2m_hpc\n"
        "assert d2m_hpc.__file__.startswith(sys.argv[1])\n"
        "from d2m_hpc.cli import main; sys.argv = ['d2m', 'schema']; main()\n"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "installed")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr
    assert '"models"' in ended.stdout
