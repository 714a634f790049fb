"""Where a shard stands: what is on record, against what lies in the output folder."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from kit import STATS, d2m, submit, write_config, write_shards

from d2m_hpc import config as configs
from d2m_hpc.launch import flow
from d2m_hpc.launch.local import ThisProcess
from d2m_hpc.plan.standing import stand, standings
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.run.records import Record
from d2m_hpc.watch.verify import verify

OURS, OTHER = "a" * 16, "b" * 16


def _record(state: str, finished: float, fingerprint: str = OURS) -> dict[str, object]:
    record = Record("x", "done", fingerprint=fingerprint, started=1.0, finished=finished)
    return {**record.to_dict(), "state": state}


FAILED = [_record("failed", 20.0)]
CASES = {
    "nothing on record": ([], False, "pending"),
    "a parquet that no record tells of": ([], True, "pending"),
    "done, and in place": ([_record("done", 10.0)], True, "done"),
    "done, and removed": ([_record("done", 10.0)], False, "pending"),
    "made by another config": ([_record("done", 10.0, OTHER)], True, "outdated"),
    "made by another config, and removed": ([_record("done", 10.0, OTHER)], False, "pending"),
    "failed": (FAILED, False, "failed"),
    "failed before it was done": ([_record("done", 30.0), *FAILED], True, "done"),
    "failed since it was done": ([_record("done", 10.0), *FAILED], True, "failed"),
    "removed, and failed since": ([_record("done", 10.0), *FAILED], False, "failed"),
    "extended in vain": ([_record("done", 10.0, OTHER), *FAILED], True, "failed"),
    "failed twice": ([*FAILED, _record("failed", 21.0)], False, "given up"),
    "failed twice by different configs": (
        [*FAILED, _record("failed", 21.0, OTHER)],
        False,
        "failed",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_shard_stands_by_records_and_by_what_is_there(case: str) -> None:
    """Whatever the order in which the records are read."""
    records, there, state = CASES[case]
    for shuffled in itertools.permutations(records):
        manifest = Manifest.of(shuffled)
        found = stand(["x"], manifest, {"x"} if there else set(), OURS, max_attempts=2)
        assert found.state("x") == state
        assert found.is_complete == (state == "done")
        assert found.unfinished == ([] if state == "done" else ["x"])


def test_what_was_removed_is_told_apart_from_what_was_never_made() -> None:
    manifest = Manifest.of([_record("done", 10.0)])
    found = stand(["x", "y"], manifest, set(), OURS, 3)
    assert (list(found.removed), found.unrecorded) == (["x"], [])
    found = stand(["x", "y"], manifest, {"x", "y"}, OURS, 3)
    assert (list(found.removed), found.unrecorded) == ([], ["y"])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a finished run of three shards."""
    write_shards(tmp_path / "tars", 3, 4)
    path = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=str(tmp_path / "tars" / "*.tar"),
        output_metadata_dir=str(tmp_path / "out"),
    )
    ended = submit(path)
    assert ended.returncode == 0, ended.stderr
    return path


def _figures(config: Path) -> list[int]:
    figures = json.loads(d2m("status", config, "--json").stdout)
    return [figures[name] for name in ("done", "failed", "pending", "given_up", "removed")]


def test_a_recomputation_that_fails_is_no_success(config: Path) -> None:
    """An output is deleted to be computed again, and its tar is broken by now."""
    tar = config.parent / "tars" / "00002.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:5000])
    for _ in range(3):
        (config.parent / "out" / "00002.parquet").unlink(missing_ok=True)
        ended = submit(config)
        assert ended.returncode == 1
        assert "complete" not in ended.stdout
        assert _figures(config)[:3] == [2, 1, 0]
    assert _figures(config) == [2, 1, 0, 1, 1]
    assert submit(config).returncode == 1  # given up is not done either
    tar.write_bytes(whole)
    assert submit(config, "--set", "max_attempts=9").returncode == 0
    assert _figures(config) == [3, 0, 0, 0, 0]


def test_outputs_that_are_deleted_are_not_done(config: Path) -> None:
    for left, path in zip(
        (2, 1, 0), sorted((config.parent / "out").glob("*.parquet")), strict=True
    ):
        path.unlink()
        assert _figures(config) == [left, 0, 3 - left, 0, 3 - left]
        verified = d2m("verify", config, "--partial")
        assert verified.returncode == 1  # what is on record is missing
        assert f"{path.name} is missing" in verified.stdout
    assert submit(config).returncode == 0
    assert _figures(config) == [3, 0, 0, 0, 0]


def test_verify_says_that_a_run_is_not_finished(config: Path) -> None:
    write_shards(config.parent / "tars", 5, 4)
    (config.parent / "tars" / "00004.tar").write_bytes(b"no tar")
    assert submit(config, "--set", "max_attempts=2").returncode == 1
    ended = d2m("verify", config)
    assert ended.returncode == 1
    assert "4 shards checked, 0 files wrong" in ended.stdout
    assert "1 of 5 shards are not finished" in ended.stdout
    found = json.loads(d2m("verify", config, "--json").stdout)
    assert [found[k] for k in ("checked", "shards", "unfinished")] == [4, 5, 1]
    assert d2m("verify", config, "--partial").returncode == 0


@pytest.mark.parametrize("recorded", [True, False])
def test_a_shard_whose_features_are_gone_is_computed_again(recorded: bool, tmp_path: Path) -> None:
    """Where the config asks for features; else nobody misses an npz."""
    write_shards(tmp_path / "tars", 3, samples=2)
    values = {**STATS, "input_tars": f"{tmp_path}/tars/*.tar"}
    path = write_config(tmp_path / "c.yml", values, output_metadata_dir=str(tmp_path / "out"))
    loaded = configs.load(path)
    flow.submit(inspect(loaded, str(path)), ThisProcess())
    lost, run = tmp_path / "out" / "00001.npz", RunDir(tmp_path / "out" / ".d2m")
    before = lost.read_bytes(), os.stat(tmp_path / "out" / "00000.npz").st_ino
    lost.unlink()
    found = standings(run, loaded)
    assert (found.unfinished, [*found.removed]) == (["00001"], ["00001"])
    assert standings(run, loaded.model_copy(update={"postprocess_features": []})).is_complete
    if not recorded:
        shutil.rmtree(run.records)
    flow.submit(inspect(loaded, str(path)), ThisProcess())
    assert (lost.read_bytes(), os.stat(tmp_path / "out" / "00000.npz").st_ino) == before
    assert standings(run, loaded).is_complete
    assert verify(run, loaded).faults == []
