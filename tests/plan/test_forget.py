"""Shards leave a plan on request, on record, and come back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from kit import STATS, d2m, submit, write_config, write_shards

from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.plan.forget import forget, forgotten, remember
from d2m_hpc.run import alone
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import Shard
from d2m_hpc.run.shards import read_stems
from d2m_hpc.run.shards import write_shards as write_plan
from d2m_hpc.storage.lease import Lease

SHARDS = [
    *(Shard(f"{i:05d}", f"/wds/{i:05d}.tar", 10) for i in range(4)),
    *(Shard(f"{i:05d}.parquet", f"/wds/{i:05d}.parquet", 5) for i in range(3)),
    Shard("a[1]", "s3://bucket/a[1].tar", 5),
]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path)
    made.create()
    write_plan(made.shards, SHARDS)
    return made


@pytest.mark.parametrize(
    ("names", "stems"),
    [
        (["00001"], ["00001"]),
        (["*.parquet"], ["00000.parquet", "00001.parquet", "00002.parquet"]),
        (["/wds/*.parquet", "00003"], ["00003", "00000.parquet", "00001.parquet", "00002.parquet"]),
        (["0000{1..2}"], ["00001", "00002"]),
        (["/wds/0000[01].tar"], ["00000", "00001"]),
        (["a[1]"], ["a[1]"]),
        (["s3://bucket/*"], ["a[1]"]),
    ],
)
def test_shards_are_named_by_stem_path_or_url(
    run: RunDir, names: list[str], stems: list[str]
) -> None:
    assert {s.stem for s in forget(run, names, ())} == set(stems)
    assert set(read_stems(run.shards)) == {s.stem for s in SHARDS} - set(stems)
    assert set(forgotten(run).values()) == set(stems)


def test_this_folder_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, here = RunDir(tmp_path / "run"), tmp_path / "w[12]"
    run.create()
    here.mkdir()
    write_plan(run.shards, [Shard("0", f"{here}/0.tar"), Shard("1", f"{tmp_path}/w1/1.tar")])
    monkeypatch.chdir(here)
    assert [s.stem for s in forget(run, ["./*.tar"], ())] == ["0"]


def test_a_name_of_no_shard_changes_nothing(run: RunDir) -> None:
    with pytest.raises(ConfigError, match=r"no shard of the plan is named '\*.html'"):
        forget(run, ["00001", "*.html"], ())
    assert len(read_stems(run.shards)) == len(SHARDS)
    assert not run.forgotten.exists()


def test_shards_in_the_hands_of_tasks_are_kept(run: RunDir) -> None:
    lease = Lease(run.lease("00002"))
    assert lease.claim()
    for busy in ({"00001"}, set[str]()):
        with pytest.raises(D2MError, match="in the hands of tasks"):
            forget(run, ["0000?"], busy)
    lease.release()
    assert len(forget(run, ["0000?"], ())) == 4


def test_shards_in_the_hands_of_a_machine_that_is_gone_are_forgotten(run: RunDir) -> None:
    path = run.lease("00002")
    path.write_text(f"filelock/2\npid=7\nhost=gone\nmode=lease\ntoken={'a1' * 16}\nduration=0.4\n")
    os.utime(path, (0, 0))
    assert len(forget(run, ["0000?"], ())) == 4


def test_a_submit_at_work_is_waited_for_and_told(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "SUBMIT_SECONDS", 0.3)
    lease = Lease(run.submit_lock)
    assert lease.claim()
    with pytest.raises(D2MError, match=r"another submit of this run has worked for 0 s \(pid="):
        forget(run, ["00001"], ())
    lease.release()


def test_what_was_forgotten_comes_back_with_its_stem(run: RunDir) -> None:
    forget(run, ["*.parquet", "00001"], ())
    with open(run.forgotten, "ab") as file:
        file.write(b'{"forgotten": true, "url": "/torn')
    assert [s.stem for s in remember(run, ["00001"])] == ["00001"]
    assert read_stems(run.shards)[-1] == "00001"
    assert "00001" not in forgotten(run).values()
    with pytest.raises(ConfigError, match="no shard of the plan"):
        remember(run, ["00001"])
    forget(run, ["00001"], ())
    assert "00001" in forgotten(run).values()


def test_a_run_goes_on_without_what_was_forgotten(tmp_path: Path) -> None:
    """A tar that can never be read keeps a run from being complete, until it is forgotten."""
    write_shards(tmp_path / "tars", 3, samples=2)
    (tmp_path / "tars" / "00001.tar").write_bytes(b"no tar" * 300)
    values: dict[str, Any] = {**STATS, "input_tars": "tars/*.tar", "output_metadata_dir": "out"}
    config = write_config(tmp_path / "c.yml", values)
    assert submit(config, cwd=tmp_path).returncode == 1
    ended = d2m("forget", config, "00001", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("took 1 shard out of the plan: 00001")
    told = d2m("status", config, "--json", cwd=tmp_path)
    assert (json.loads(told.stdout)["shards"], json.loads(told.stdout)["done"]) == (2, 2)
    ended = submit(config, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "1 tar is left out" in ended.stdout
    ended = d2m("forget", config, "--undo", "00001", cwd=tmp_path)
    assert ended.stdout == "put 1 shard back into the plan\n"
    assert "3 shards: 2 done" in d2m("plan", config, cwd=tmp_path).stdout


def test_the_stem_of_a_forgotten_shard_stays_taken(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", 1, samples=2)
    values: dict[str, Any] = {**STATS, "input_tars": "a", "output_metadata_dir": "out"}
    config = write_config(tmp_path / "c.yml", values)
    assert submit(config, cwd=tmp_path).returncode == 0
    ended = d2m("forget", config, "00000", cwd=tmp_path)
    assert "the outputs of 1 of them stay where they are: 00000" in ended.stdout
    (tmp_path / "a").rename(tmp_path / "b")
    assert submit(config, "--set", "input_tars=b", cwd=tmp_path).returncode == 0
    assert {p.stem for p in (tmp_path / "out").glob("*.parquet")} == {"00000", "b_00000"}


def test_a_line_of_nothing_but_brackets_is_none(run: RunDir) -> None:
    forget(run, ["00001"], ())
    with run.forgotten.open("a") as file:
        file.write("[" * 200_000 + "\n")
    assert set(forgotten(run).values()) == {"00001"}
