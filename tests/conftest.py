from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kit import GOLDEN


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder of the golden kit's small checkpoints, in the published formats."""
    folder = tmp_path_factory.mktemp("weights")
    command = [sys.executable, str(GOLDEN / "make_checkpoints.py"), str(folder)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def awkward_path(tmp_path: Path) -> Path:
    """A folder as users have them: spaces, quotes and non-ASCII letters in its name."""
    folder = tmp_path / "döner & \"quoted\" 'dir'"
    folder.mkdir()
    return folder
