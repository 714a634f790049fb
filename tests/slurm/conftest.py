from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.cluster import Cluster, is_up
from slurm.runs import Tars, make_tars


@pytest.fixture(scope="session")
def started_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One that was up before the tests stays up after them, with the default options."""
    if os.geteuid() != 0:
        pytest.skip("devcluster needs root: it starts Slurm's daemons")
    if shutil.which("apt-get") is None:
        pytest.skip("devcluster needs Debian or Ubuntu: it installs Slurm with apt-get")
    was_up = is_up()
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.up()
    yield
    if was_up:
        cluster.up()
    else:
        cluster.down()


@pytest.fixture
def cluster(started_cluster: None, tmp_path: Path) -> Iterator[Cluster]:
    """The devcluster with its default options; what the test leaves of jobs and nodes is mended."""
    cluster = Cluster(tmp_path)
    cluster.up()
    yield cluster
    cluster.cancel_all()
    cluster.resume_nodes()


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Tars:
    """Forty shards, and what they become where nothing disturbs."""
    return make_tars(tmp_path_factory.mktemp("tars"), 40)
