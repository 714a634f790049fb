from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import warm
from hubs import serving_folder
from kit import GOLDEN, SHARDS
from pages import TARS
from xdist.scheduler import LoadFileScheduling

from d2m_hpc import stopping
from d2m_hpc.models.weights import OFFLINE
from d2m_hpc.plan import preflight
from d2m_hpc.storage import stores

if TYPE_CHECKING:
    import s3

# A page takes some tenths of a second, and hundreds of tests run a config.
os.environ.setdefault("D2M_REPORT", "false")
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


QUICK = ("architecture", "config", "gc_paused", "schema")
"""Files of whole-program tests that start no program."""
SLOW = (
    *("benchmarks/", "fuzz/", "models/test_compiled", "watch/test_page_browser"),
    *("worker/test_disk", "worker/test_supervise", "worker/test_task", "worker/test_tracking"),
)
"""Files and folders whose tests take seconds each."""
LONGEST = (
    *("slurm/", "test_resume", "test_docs", "test_golden", "fuzz/", "test_fence", "benchmarks/"),
    *("test_seed", "test_clocks", "worker/test_supervise", "test_backfill", "test_s3", "test_api"),
)
"""Files and folders that take a minute or more, the longest first: several workers begin with them,
lest one of them works on alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a Slurm, what needs an S3 server, and what is slow: `scripts/check`."""
    paths = {item: item.path.relative_to(Path(__file__).parent).as_posix() for item in items}
    items.sort(key=lambda item: _rank(paths[item]))
    for item, path in paths.items():
        if path.startswith("slurm/"):
            item.add_marker("slurm")
        if {"s3_server", "bucket", "s3_bucket"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("s3")
        whole = "/" not in path and path[len("test_") : -len(".py")] not in QUICK
        if whole or path.startswith(SLOW):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Give programs a user's variables: cv2 sets LD_LIBRARY_PATH in who imports it."""
    for name in {*os.environ, *warm.BEFORE}:
        if name.startswith(warm.OUTSIDE):
            os.environ.pop(name, None)
            os.environ |= {name: warm.BEFORE[name]} if name in warm.BEFORE else {}


def _rank(path: str) -> int:
    """The place of a file among those that take long."""
    return next((i for i, name in enumerate(LONGEST) if path.startswith(name)), len(LONGEST))


class _ByFile(LoadFileScheduling):
    """A file's tests share what they set up, and there is but one Slurm."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "slurm" if file.startswith("tests/slurm/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByFile:
    """With several workers (`-n 2`), which take files in the order of `LONGEST`."""
    config.option.loadscopereorder = False
    return _ByFile(config, log)


@pytest.fixture(autouse=True)
def callers_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a caller's again, though a test runs commands in it, which make it theirs."""
    monkeypatch.setattr(stopping, "_own", False)
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def custom_files_are_run_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A submit in this process has a custom file run by a process that has imported torch."""
    monkeypatch.setattr(preflight, "subprocess", SimpleNamespace(run=warm.describe))


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a task changes of its process, which usually is its own."""
    for switch in OFFLINE:
        monkeypatch.setenv(switch, "1")
    package = logging.getLogger("d2m_hpc")
    before, level = list(package.handlers), package.level
    yield
    for handler in [h for h in package.handlers if h not in before]:
        package.removeHandler(handler)
        handler.close()
    package.setLevel(level)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder of the golden kit's small checkpoints, in the published formats."""
    folder = tmp_path_factory.mktemp("weights")
    command = [sys.executable, str(GOLDEN / "make_checkpoints.py"), str(folder)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def weights_mirror(checkpoints: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A site's mirror of the kit's checkpoints and an empty weights folder, as variables."""
    with serving_folder(checkpoints) as address:
        yield {"D2M_WEIGHTS_MIRROR": address, "D2M_WEIGHTS": str(tmp_path / "fetched")}


@pytest.fixture
def awkward_path(tmp_path: Path) -> Path:
    """A folder as users have them: spaces, quotes and non-ASCII letters in its name."""
    folder = tmp_path / "döner & \"quoted\" 'dir'"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[s3.Server]:
    import s3  # not above: tests/gpu runs where boto3 and moto are not

    with s3.Server().running() as server:
        yield server


@pytest.fixture
def bucket(s3_server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> s3.Server:
    """An S3 with an empty `s3://bucket`, to which this process's environment leads."""
    for name, value in s3_server.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.01)
    s3_server.reset()
    return s3_server


@pytest.fixture
def s3_bucket(s3_server: s3.Server) -> dict[str, str]:
    """Variables that lead to an S3 with three of the kit's tars in `s3://bucket/tars/`."""
    s3_server.reset()
    for number, stem in enumerate(TARS):
        s3_server.put(f"tars/{number:05d}.tar", (SHARDS / f"{stem}.tar").read_bytes())
    return s3_server.variables
