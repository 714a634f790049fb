from __future__ import annotations

from pathlib import Path

import pytest

from d2m_hpc.run.outputs import OutputDir


@pytest.fixture(params=["local", "awkward", "chain", "file", "memory"])
def output(request: pytest.FixtureRequest, awkward_path: Path) -> OutputDir:
    """A folder that is not there yet."""
    urls = {
        "local": f"{awkward_path.parent}/out",
        "awkward": f"{awkward_path}/{{a,b}} [x]*?",
        "chain": f"{awkward_path}/a::b",
        "file": f"file://{awkward_path.parent}/out",
        "memory": f"memory://{awkward_path.parent.name}/out",
    }
    return OutputDir(urls[request.param])
