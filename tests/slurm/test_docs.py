"""The documentation's commands for a cluster, on the devcluster."""

from __future__ import annotations

from pathlib import Path

import pages
import pytest
from slurm.cluster import Cluster

QUICKSTART = "d2m-submit configs/quickstart.yml --partition low --wait\n"
"""Before the commands of a page that takes a run on Slurm for granted."""
FOR_SLURM = [p for p in pages.PAGES if any(b.is_for_slurm for b in pages.blocks(p))]


@pytest.mark.parametrize("page", FOR_SLURM, ids=lambda page: page.stem)
def test_every_command_of_the_page_runs(page: Path, cluster: Cluster, tmp_path: Path) -> None:
    commands = pages.script(page, tmp_path / "blocks", slurm=True)
    if page.stem != "README":
        commands = QUICKSTART + commands
    world = pages.make_world(tmp_path / "world", "of Slurm")
    ended = pages.run(commands, world, {"PATH": pages.search_path(tmp_path)})
    assert ended.returncode == 0, ended.stdout
    assert len(list((world / "demo" / "metadata").glob("*.parquet"))) == len(pages.TARS)
