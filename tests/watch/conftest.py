from __future__ import annotations

from pathlib import Path

import pytest
import troubled


@pytest.fixture(scope="session")
def troubled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to which everything happened, `out`, and its `tars`; not to be changed."""
    folder = tmp_path_factory.mktemp("troubled")
    troubled.tars(folder / "tars")
    troubled.run(folder, batch_size=4)
    return folder
