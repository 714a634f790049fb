"""Two people work on one run, in a folder of their group."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from kit import d2m
from slurm.cluster import Cluster
from slurm.runs import Run, Tars

GROUP = "games"
# The other user may read this user's Python, and may write what a group may write.
OTHER = ("setpriv", "--reuid=nobody", "--regid=nogroup", f"--groups={GROUP}")
OTHER += ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
D2M = Path(sys.executable).with_name("d2m")


def other(*words: object) -> subprocess.CompletedProcess[str]:
    """Run `d2m` as another user of the group."""
    command = [*OTHER, str(D2M), *map(str, words)]
    home = {**os.environ, "HOME": "/tmp"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, umask=0o002, env=home
    )


@pytest.fixture
def shared(tars: Tars) -> Iterator[Path]:
    """A folder of the group, which others may reach, with the tars."""
    if subprocess.run([*OTHER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this container gives no other user a capability")
    folder = Path(tempfile.mkdtemp(prefix="d2m-shared-", dir="/tmp"))
    shutil.copytree(tars.folder, folder / "tars")
    shutil.chown(folder, group=GROUP)
    folder.chmod(0o2775)
    yield folder
    shutil.rmtree(folder)


def test_another_user_of_the_group_sees_and_goes_on_with_a_run(
    cluster: Cluster, tars: Tars, shared: Path
) -> None:
    there = replace(tars, folder=shared / "tars")
    run = Run(cluster, there, 3, shared / "run", shards_per_task=1, steal=False)
    (shared / "run").chmod(0o2775)
    run.hold()
    assert d2m("submit", run.config, "--no-preflight", umask=0o002).returncode == 0
    run.wait_held(2)
    again = other("submit", run.config, "--no-preflight")
    assert "3 shards: 0 done, 0 to do, 3 with live tasks" in again.stdout, again.stderr
    assert len(run.submissions()) == 1
    refused = other("cancel", run.config)
    assert refused.returncode == 3
    assert "3 array tasks of root are still there: their user or an operator of" in refused.stderr
    assert len(run.live()) == 3
    assert d2m("cancel", run.config).stdout == "cancelled 3 array tasks\n"
    run.wait_over()
    run.let_go()
    ended = other("submit", run.config, "--local")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run.assert_complete()
    made = [path for path in run.out.rglob("*") if not path.is_symlink()]
    assert {path.group() for path in made} == {GROUP}
    assert {path.owner() for path in made} == {"root", "nobody"}
    private = {path.name for path in made if not path.stat().st_mode & 0o020}
    assert private == set()
    assert not [path for path in made if path.stat().st_mode & 0o002]
    # A run that is not shared says which file forbids a second user.
    run.run_dir.chmod(0o755)
    (run.run_dir / "records").chmod(0o755)
    forbidden = other("submit", run.config, "--no-preflight", "--set", "reprocess=true")
    assert forbidden.returncode != 0
    assert str(run.run_dir) in forbidden.stderr
    assert "Traceback" not in forbidden.stderr
