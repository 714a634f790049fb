"""Two runs keep apart: by an owner of the outputs, and by what local submits are at work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
from kit import STATS, d2m, submit, write_config, write_shards

from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError
from d2m_hpc.launch import flow
from d2m_hpc.launch.arrays import look
from d2m_hpc.launch.flow import commit, submitting
from d2m_hpc.launch.local import ThisProcess
from d2m_hpc.plan.workload import Workload, inspect
from d2m_hpc.run import fingerprints, owner
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.owner import OWNER, require_own
from d2m_hpc.run.records import Job
from d2m_hpc.worker.task import run_task


@pytest.fixture(autouse=True)
def tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "tars", 2)
    monkeypatch.setattr(owner, "SECONDS", 0.01)


def workload(folder: Path, **values: Any) -> Workload:
    common = {"input_tars": f"{folder}/tars/*.tar", "output_metadata_dir": f"{folder}/out"}
    path = write_config(folder / "c.yml", {**STATS, **common, **values})
    return inspect(configs.load(path), str(path))


def run(asked: Workload) -> None:
    flow.submit(asked, ThisProcess())


def note(out: Path) -> dict[str, str]:
    values: dict[str, str] = json.loads((out / OWNER).read_bytes())
    return values


def test_another_run_folder_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    run(workload(tmp_path))
    before = sorted(os.listdir(tmp_path / "out"))
    other = workload(tmp_path, run_dir=str(tmp_path / "other"))
    with pytest.raises(ConfigError) as caught:
        run(other)
    planned = d2m("plan", tmp_path / "c.yml")
    assert planned.returncode == 2
    for told in (str(caught.value), planned.stderr):
        assert f"{tmp_path}/out belongs to the run in {tmp_path}/out/.d2m (on " in told
        assert f"Set `run_dir: {tmp_path}/out/.d2m` to go on" in told
        assert f"delete {tmp_path}/out/{OWNER}" in told
    assert sorted(os.listdir(tmp_path / "out")) == before
    assert not (tmp_path / "other").exists()


def test_the_command_says_so_in_a_line_and_exits_2(tmp_path: Path) -> None:
    path = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=f"{tmp_path}/tars/*.tar",
        output_metadata_dir=f"{tmp_path}/out",
    )
    assert submit(path, "--set", f"run_dir={tmp_path}/first").returncode == 0
    refused = submit(path)
    assert refused.returncode == 2
    assert f"belongs to the run in {tmp_path}/first" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_task_of_another_run_computes_nothing(tmp_path: Path) -> None:
    """Its submit may have come before there were owners."""
    other = workload(tmp_path, run_dir=str(tmp_path / "other"))
    with submitting(other):
        commit(look(other), [list(map(Job, look(other).shards))])
    (tmp_path / "out" / OWNER).unlink()
    run(workload(tmp_path))
    made = {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("*.*")}
    with pytest.raises(ConfigError, match="belongs to the run in"):
        run_task(other.run.root, "000", 0)
    assert {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("*.*")} == made


def test_outputs_move_with_the_run_folder_in_them(tmp_path: Path) -> None:
    run(workload(tmp_path))
    assert note(tmp_path / "out")["run_dir"] == ".d2m"
    shutil.move(tmp_path / "out", tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copied")
    for name in ("moved", "copied"):
        run(workload(tmp_path, output_metadata_dir=str(tmp_path / name)))
        assert note(tmp_path / name)["run_dir"] == ".d2m"


def test_a_run_folder_that_was_moved_takes_its_outputs_along(tmp_path: Path) -> None:
    """From any host, for it has submissions and nobody else is there."""
    run(workload(tmp_path, run_dir=str(tmp_path / "a")))
    shutil.move(tmp_path / "a", tmp_path / "b")
    values = {"run_dir": str(tmp_path / "a"), "host": "another"}
    (tmp_path / "out" / OWNER).write_text(json.dumps(values))
    run(workload(tmp_path, run_dir=str(tmp_path / "b")))
    assert note(tmp_path / "out")["run_dir"] == str(tmp_path / "b")


@pytest.mark.parametrize(("host", "taken"), [(None, True), ("elsewhere", False)])
def test_outputs_of_a_run_folder_that_is_gone_are_taken_where_that_is_known(
    host: str | None, taken: bool, tmp_path: Path
) -> None:
    """A path that is not here may be on the other host."""
    run(workload(tmp_path, run_dir=str(tmp_path / "a")))
    shutil.rmtree(tmp_path / "a")
    values = note(tmp_path / "out")
    (tmp_path / "out" / OWNER).write_text(json.dumps({**values, "host": host or values["host"]}))
    with nullcontext() if taken else pytest.raises(ConfigError, match="on elsewhere"):
        run(workload(tmp_path))
    assert note(tmp_path / "out")["run_dir"] == (".d2m" if taken else str(tmp_path / "a"))


def test_a_link_to_the_run_folder_is_the_run_folder(tmp_path: Path) -> None:
    run(workload(tmp_path, run_dir=str(tmp_path / "a")))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    run(workload(tmp_path, run_dir=str(tmp_path / "link")))


def test_an_owner_that_was_never_written_whole_is_nobody(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / OWNER).write_bytes(b"")
    run(workload(tmp_path))
    assert note(tmp_path / "out")["run_dir"] == ".d2m"


def test_of_two_that_come_at_once_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    script = (
        "import sys; from pathlib import Path; from d2m_hpc.run.owner import *\n"
        "from d2m_hpc.run.folder import RunDir; sys.stdin.readline()\n"
        "require_own(OutputDir(sys.argv[1]), RunDir(Path(sys.argv[2])), take=True)\n"
    )
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", script, tmp_path / "out", tmp_path / f"run{number}"],
                    stdin=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for number in range(3)
        ]
        for number in range(3):
            (tmp_path / f"run{number}").mkdir()
        ended = [process.communicate("\n")[1] for process in started]
    assert sorted("belongs to the run in" in text for text in ended) == [False, True, True]


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_remote_outputs_have_an_owner(
    scheme: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if scheme == "s3":
        request.getfixturevalue("bucket")
    output = OutputDir(f"{scheme}://bucket/{tmp_path.name}")
    first, second = RunDir(tmp_path / "a"), RunDir(tmp_path / "b")
    first.create()
    require_own(output, first, take=False)
    for _ in range(2):
        require_own(output, first, take=True)
    with pytest.raises(ConfigError, match=rf"belongs to the run in {tmp_path}/a"):
        require_own(output, second, take=True)
    output.create(OWNER, b"another")
    assert json.loads(output.read(OWNER))["run_dir"] == str(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    require_own(output, second, take=True)
    assert json.loads(output.read(OWNER))["run_dir"] == str(tmp_path / "b")


# --- one run folder, two local submits ---


def test_a_config_that_does_not_only_add_waits_for_a_local_submit_at_work(tmp_path: Path) -> None:
    """Though no shard is finished yet, by which it could be told."""
    first = workload(tmp_path)
    with submitting(first):
        submission = commit(look(first), [list(map(Job, look(first).shards))])
    changed = workload(tmp_path, feature_dtype="float32")
    grown = workload(tmp_path, additional_fields=["uid", "caption", "original_width"])
    with fingerprints.working(submission):
        with pytest.raises(ConfigError, match="what live tasks make"):
            look(changed)
        assert len(look(first).pending) == len(look(grown).pending) == 2
    assert not submission.local.exists()
    assert len(look(changed).pending) == 2


def test_a_local_submit_that_was_killed_holds_nobody_up(tmp_path: Path) -> None:
    first = workload(tmp_path)
    with submitting(first):
        submission = commit(look(first), [list(map(Job, look(first).shards))])
    script = (
        "import os, sys; from pathlib import Path; from d2m_hpc.run import fingerprints\n"
        "from d2m_hpc.run.folder import Submission\n"
        "with fingerprints.working(Submission(Path(sys.argv[1]))): os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, submission.folder], check=False)
    assert killed.returncode == -9
    assert submission.local.exists()
    assert len(look(workload(tmp_path, feature_dtype="float32")).pending) == 2
    assert not submission.local.exists()


def test_a_local_submit_that_died_with_its_machine_holds_nobody_up(tmp_path: Path) -> None:
    first = workload(tmp_path)
    with submitting(first):
        submission = commit(look(first), [list(map(Job, look(first).shards))])
    submission.local.write_text(
        f"filelock/2\npid=7\nhost=gone\nmode=lease\ntoken={'a1' * 16}\nduration=0.4\n"
    )
    changed = workload(tmp_path, feature_dtype="float32")
    with pytest.raises(ConfigError, match="what live tasks make"):
        look(changed)
    os.utime(submission.local, (0, 0))
    assert len(look(changed).pending) == 2
    assert not submission.local.exists()
