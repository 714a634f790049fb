"""Users without a name or a home, places that cannot be written, what kills leave there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import STATS, submit, write_config, write_shards

from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError
from d2m_hpc.launch.flow import submitting
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.tasks import Progress
from d2m_hpc.storage.lease import Lease
from d2m_hpc.worker.progress import Reporter
from d2m_hpc.worker.write.writer import Committer


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that any user reaches, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root to be another user"
)
def test_a_user_without_name_and_home_runs_to_the_end(open_folder: Path) -> None:
    """As in containers that are started with any user's number."""
    write_shards(open_folder / "tars", 1)
    config = write_config(
        open_folder / "c.yml",
        STATS,
        input_tars=f"{open_folder}/tars/*.tar",
        output_metadata_dir=f"{open_folder}/out",
    )
    # With root's rights to files: this Python may lie where other users cannot read.
    rights = "+dac_override,+dac_read_search"
    another = ["setpriv", "--reuid=54321", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    command = [*another, str(Path(sys.executable).with_name("d2m-submit")), str(config), "--local"]
    ended = subprocess.run(
        command,
        env={"PATH": os.environ["PATH"]},
        cwd=open_folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert OutputDir(f"{open_folder}/out").stems() == {"00000"}
    [intent] = (open_folder / "out" / ".d2m" / "submissions").glob("*/intent.json")
    assert '"user": "uid 54321"' in intent.read_text()


@pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root to be other users"
)
def test_a_second_user_of_a_groups_folder_goes_on_with_the_first_ones_run(
    open_folder: Path,
) -> None:
    """Both share a group, a setgid folder and umask 002; a tar has come in the meantime."""
    tars, group = open_folder / "tars", 60_000
    shared = open_folder / "shared"
    shared.mkdir()
    os.chown(shared, 0, group)
    shared.chmod(0o2775)
    config = write_config(
        open_folder / "c.yml",
        STATS,
        input_tars=f"{tars}/*.tar",
        output_metadata_dir=f"{shared}/out",
    )
    for user, count in ((54321, 2), (54322, 3)):
        write_shards(tars, count, 2)
        # This Python may lie where other users cannot read; they write by their own rights alone.
        rights = "+dac_read_search"
        another = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        another += [f"--inh-caps={rights}", f"--ambient-caps={rights}"]
        ended = subprocess.run(
            [*another, str(Path(sys.executable).with_name("d2m-submit")), str(config), "--local"],
            env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=open_folder,
            capture_output=True,
            text=True,
            check=False,
            umask=0o002,
        )
        assert ended.returncode == 0, ended.stderr
    stems = {f"0000{i}" for i in range(3)}
    assert OutputDir(f"{shared}/out").stems() == stems
    owners = {(shared / "out" / f"{stem}.parquet").stat().st_uid for stem in stems}
    assert owners == {54321, 54322}
    assert "2 done, 1 to do" in ended.stdout
    everything = [shared / "out", *(shared / "out").rglob("*")]
    assert {path.stat().st_gid for path in everything} == {group}
    assert all(path.stat().st_mode & 0o020 for path in everything)


@pytest.mark.parametrize("there", [True, False])
def test_a_tilde_without_a_home_is_a_mistake_or_a_name(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may be named `~`, as slips make it; else nothing is known that it could mean."""
    write_shards(tmp_path / "tars", 1)
    config = write_config(
        tmp_path / "c.yml", STATS, input_tars="tars/*.tar", output_metadata_dir="~"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # who has no entry in passwd
    if there:
        (tmp_path / "~").mkdir()
        workload = inspect(configs.load(config), str(config))
        assert workload.run.root == tmp_path / "~" / ".d2m"
        return
    with pytest.raises(ConfigError, match="found '~'; the home folder is not known"):
        configs.load(config)


def test_progress_that_cannot_be_written_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "progress" / "000-0-0.json"
    report = Reporter(Progress("000-0-0"), path)
    for _ in range(3):
        report(state="running", done=1)
    assert report.progress.done == 3
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1
    path.parent.mkdir()
    report(state="finished")
    assert b"finished" in path.read_bytes()


def test_an_output_that_cannot_be_written_is_found_before_anything_is_computed(
    tmp_path: Path,
) -> None:
    (tmp_path / "out" / ".d2m-probe").mkdir(parents=True)  # root may write to read-only folders
    with pytest.raises(ConfigError, match=f"{tmp_path}/out cannot be written"):
        Committer(OutputDir(str(tmp_path / "out")), tmp_path)


def test_what_kills_left_of_commits_goes_with_the_next_submit(tmp_path: Path) -> None:
    """But nothing of a shard that is in somebody's hands."""
    write_shards(tmp_path / "tars", 2)
    config = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=f"{tmp_path}/tars/*.tar",
        output_metadata_dir=f"{tmp_path}/out",
    )
    assert submit(config).returncode == 0
    workload = inspect(configs.load(config), str(config))
    staging = tmp_path / "out" / ".d2m-tmp"
    for name in ("00000.2-0123abcd", "00001.1-0123abcd", ".removed-0123"):
        (staging / name).mkdir(parents=True)
        (staging / name / "half.npz").write_bytes(b"x")
    lease = Lease(workload.run.lease("00001"), workload.config.lease_seconds)
    assert lease.claim()
    with submitting(workload):
        assert [p.name for p in staging.iterdir()] == ["00001.1-0123abcd"]
    lease.release()
    assert submit(config).returncode == 0
    assert not staging.exists()


FAILING = """
import errno, os

def fails(call, name):
    real = getattr(os, call)

    def called(what, *rest, **options):
        path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
        if os.environ["FAILS_AT"] in str(path):
            code = getattr(errno, name)
            raise OSError(code, os.strerror(code), *() if isinstance(what, int) else (path,))
        return real(what, *rest, **options)

    setattr(os, call, called)

fails(*os.environ["FAILS"].split())
"""
"""Read by Python at its start: a call of the system fails, as where a file server does."""


@pytest.mark.parametrize(
    ("fails", "place", "said"),
    [
        ("fsync EIO", "/.d2m/records/", "the disk or file server fails"),
        ("open ESTALE", "/.d2m/leases/", "the file server has lost the folder"),
        ("open EIO", "/.d2m/attempts/", "the disk or file server fails"),
        ("open ESTALE", "/.d2m/submissions/", "the file server has lost the folder"),
    ],
)
def test_a_file_server_that_fails_ends_a_run_in_one_line(
    fails: str, place: str, said: str, tmp_path: Path
) -> None:
    """And no shard counts as failed for it."""
    write_shards(tmp_path / "tars", 1)
    places = {"input_tars": str(tmp_path / "tars"), "output_metadata_dir": str(tmp_path / "out")}
    config = write_config(tmp_path / "c.yml", {**STATS, **places})
    (tmp_path / "sitecustomize.py").write_text(FAILING)
    more = {"PYTHONPATH": str(tmp_path), "FAILS": fails, "FAILS_AT": place}
    ended = submit(config, env={**os.environ, **more})
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert ended.stderr.count("error: ") == 1
    assert place in re.sub(r"\s", "", ended.stderr)
    assert said in re.sub(r"\s+", " ", ended.stderr)
    assert submit(config).returncode == 0
    failures = Manifest.load(RunDir(tmp_path / "out" / ".d2m")).failures
    assert failures == {}
