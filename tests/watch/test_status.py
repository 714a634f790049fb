"""`d2m status` tells what happened, from the run folder alone."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from kit import SHARDS, STATS, d2m, jpeg, sample, submit, write_config, write_shards, write_tar

from d2m_hpc.run import fingerprints, merge
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.run.records import Record, Recorder
from d2m_hpc.storage.lease import Lease
from d2m_hpc.watch import status, terminal
from d2m_hpc.watch.status import find_run, summarise

KEYS = {
    "shards",
    "done",
    "failed",
    "pending",
    "running",
    "rows",
    "rejected",
    "samples_per_second",
    "eta_seconds",
    "failures",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: 2 shards done (one with a rejection), 3 cut, 1 of one image too few.

    Two more were planned and not begun.
    """
    folder = tmp_path_factory.mktemp("status")
    tars = folder / "tars"
    first, *_ = write_shards(tars, 2, samples=9)
    for name, size in (("cut-a", 3000), ("cut-b", 5000), ("cut-c", 9000)):
        (tars / f"{name}.tar").write_bytes(first.read_bytes()[:size])
    members = {**sample("x"), "y.jpg": b"no image", "y.txt": b"y", "y.json": b"{}"}
    write_tar(tars / "half.tar", members)
    many = {name: data for i in range(19) for name, data in sample(f"k{i}", i).items()}
    write_tar(tars / "odd.tar", {**many, "z.jpg": jpeg(), "z.txt": b"no JSON here"})
    config = write_config(
        folder / "c.yml",
        STATS,
        input_tars=str(tars / "*.tar"),
        output_metadata_dir=str(folder / "out"),
    )
    assert submit(config).returncode == 1
    run = RunDir(folder / "out" / ".d2m")
    _plan_more(run, 2)
    return folder


def _plan_more(run: RunDir, count: int) -> None:
    """Shards that a later submit planned, and no task has begun."""
    table = pq.read_table(run.shards)
    rows = table.to_pylist()
    more = [{**rows[0], "stem": f"later-{i}", "url": f"/x/later-{i}.tar"} for i in range(count)]
    pq.write_table(table.from_pylist(rows + more, schema=table.schema), run.shards)


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> RunDir:
    """A copy of its outputs, with the run folder beside them."""
    shutil.copytree(ended / "out", tmp_path / "out")
    return RunDir(tmp_path / "out" / ".d2m")


def _summary(run: RunDir) -> status.Summary:
    return summarise(*find_run(run.root))


def test_json_has_every_figure_right_after_the_run(ended: Path) -> None:
    said = d2m("status", ended / "c.yml", "--json")
    assert (said.returncode, said.stderr) == (0, "")
    figures = json.loads(said.stdout)
    assert figures.keys() >= KEYS
    names = ("shards", "done", "failed", "pending", "running", "rows", "rejected")
    assert [figures[name] for name in names] == [9, 3, 4, 2, 0, 37, 1]
    assert figures["shards"] == sum(figures[n] for n in ("done", "failed", "pending", "running"))
    assert figures["samples_per_second"] > 0
    assert figures["eta_seconds"] is None  # nothing runs
    assert figures["rejections"] == {"no json (json)": 1}


def test_a_task_that_starts_is_a_run_that_runs(run: RunDir) -> None:
    """Before it has its first shard in hand, too."""
    starting = replace(_summary(run), tasks={"pending": 3, "running": 1})
    assert starting.state == "running"
    assert terminal.figures(starting)["time left"] == "unknown"
    waiting = replace(starting, tasks={"pending": 4})
    assert waiting.state == "pending"
    assert terminal.figures(waiting)["time left"] == "nothing runs"


def test_shards_that_failed_alike_are_one_group(run: RunDir) -> None:
    """Though their names, sizes and bytes differ."""
    cut, half = _summary(run).failures
    assert (cut.kind, cut.shards) == ("TruncatedShard", ["cut-a", "cut-b", "cut-c"])
    assert "is truncated at byte" in cut.error
    assert (half.kind, half.shards) == ("ShardError", ["half"])
    assert "1 of 2 samples are rejected" in half.error


def test_failures_of_different_kinds_stay_apart(run: RunDir) -> None:
    failed = Manifest.load(run).failures
    recorder = Recorder(run.records / "test.jsonl")
    for stem, error in (("cut-a", "No space left on device"), ("cut-b", "Permission denied")):
        last = failed[stem][-1]
        text = f"/x/{stem}.tar: {error}"
        again = last.attempt + 1
        recorder.append(
            Record(stem, "failed", attempt=again, task=last.task, kind="ShardError", error=text)
        )
    later = [g.shards for g in _summary(run).failures]
    assert sorted(later) == [["cut-a"], ["cut-b"], ["cut-c"], ["half"]]


def test_people_see_the_same_figures(ended: Path) -> None:
    said = d2m("status", ended / "out" / ".d2m").stdout
    for word, figure in (("shards", 9), ("done", 3), ("failed", 4), ("pending", 2), ("rows", 37)):
        assert any(line.split()[1:4:2] == [word, str(figure)] for line in said.splitlines()), said
    assert "rejected 1: no json" in said
    assert "failed 3 (cut-a, cut-b, cut-c): TruncatedShard: " in said
    assert f"{ended}/out/.d2m" in said


@pytest.fixture
def held(run: RunDir) -> Iterator[list[str]]:
    """Two shards that a task has claimed, one of them after it had failed."""
    stems = ["later-0", "half"]
    leases = [Lease(run.lease(stem)) for stem in stems]
    assert all(lease.claim() for lease in leases)
    yield stems
    for lease in leases:
        lease.release()


def _running_task(run: RunDir, rows: int, seconds: float, age: float = 0.0) -> None:
    now = time.time() - age
    [path] = run.progress.iterdir()
    told = {**json.loads(path.read_bytes()), "state": "running", "rows": rows}
    told |= {"started": now - seconds, "updated": now}
    path.write_text(json.dumps(told))


def test_a_shard_is_running_while_a_task_holds_its_lease(run: RunDir, held: list[str]) -> None:
    found = _summary(run)
    assert (found.done, found.failed, found.pending, found.running) == (3, 3, 1, 2)
    assert found.state == "running"


def test_a_lease_without_heartbeat_is_not_running(run: RunDir) -> None:
    path = run.lease("later-0")
    path.write_text("left by a dead task")
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))
    found = _summary(run)
    assert (found.running, found.pending) == (0, 2)


def test_the_time_left_follows_from_the_tasks_that_run(run: RunDir, held: list[str]) -> None:
    _running_task(run, rows=100, seconds=50)
    [path] = run.records.iterdir()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number, record in enumerate(r for r in records if r["state"] == "done"):
        record["finished"] = time.time() - 30 + 10 * number  # the last one 10 s ago
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    found = _summary(run)
    assert found.samples_per_second == pytest.approx(2.0, rel=0.01)
    to_do = 9 - 3 - 3  # a failed shard that nobody holds waits for the next submit
    assert found.eta_seconds == pytest.approx((to_do - 1) * 10, rel=0.01)  # one is nearly done


def test_the_mean_speed_leaves_out_the_time_between_submissions(run: RunDir) -> None:
    [path] = run.records.iterdir()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    # Two at the same time, and a later submit's after a day: 10 s with one task at work, and 5 s.
    times = iter([(1000.0, 1008.0), (1002.0, 1010.0), (87400.0, 87405.0)])
    for record in (r for r in records if r["state"] == "done"):
        record["started"], record["finished"] = next(times)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    assert _summary(run).samples_per_second == pytest.approx(37 / 15, abs=0.01)


def test_a_task_that_fell_silent_has_no_speed(run: RunDir) -> None:
    before = _summary(run).samples_per_second
    _running_task(run, rows=10**6, seconds=1, age=3600)
    found = _summary(run)
    assert (found.samples_per_second, found.eta_seconds) == (before, None)


def test_a_half_written_progress_file_is_no_trouble(run: RunDir) -> None:
    [path] = run.progress.iterdir()
    whole = path.read_bytes()
    for data in (whole[:20], b"", whole + whole[-3:]):
        path.write_bytes(data)
        assert _summary(run).done == 3


def test_merged_files_say_what_the_tasks_files_said(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = run.progress.iterdir()
    told = {**json.loads(path.read_bytes()), "device": "cuda:0", "updated": 4600.0, "started": 1e3}
    path.write_text(json.dumps(told))
    before = _summary(run)
    assert before.gpu_hours == 1.0
    monkeypatch.setattr(merge, "MANY", 1)
    assert merge.merge_silent(run, -1.0) == 2
    assert _summary(run) == before
    assert status.log_of(run, "cut-b") == run.log_of("000", 0)
    # The task wakes up: what it says now takes the place of what was merged.
    path.write_text(json.dumps({**told, "updated": 8200.0}))
    assert _summary(run).gpu_hours == 2.0
    # A task of this version says what its GPU is, and an earlier one did not.
    assert _summary(run).hardware["GPU"] == 1
    path.write_text(json.dumps({**told, "updated": 8201.0, "gpu": "NVIDIA H100"}))
    assert _summary(run).hardware["NVIDIA H100"] == 1


@pytest.mark.parametrize(
    ("records", "state"),
    [
        ({}, "pending"),
        ({"a": "done"}, "pending"),
        ({"a": "done", "b": "failed"}, "failed"),
        ({"a": "done", "b": "done"}, "complete"),
    ],
)
def test_a_run_is_in_one_state(records: dict[str, Any], state: str, run: RunDir) -> None:
    shutil.rmtree(run.records)
    run.records.mkdir()
    table = pq.read_table(run.shards)
    rows = [{**table.to_pylist()[0], "stem": stem} for stem in "ab"]
    pq.write_table(table.from_pylist(rows, schema=table.schema), run.shards)
    recorder = Recorder(run.records / "x.jsonl")
    for stem, kind in records.items():
        times = {"started": 1.0, "finished": 2.0}
        recorder.append(Record(stem, kind, rows=1, fingerprint=fingerprints.newest(run), **times))
        for suffix in (".parquet", ".npz"):
            (run.root.parent / f"{stem}{suffix}").touch()
    assert _summary(run).state == state


def test_a_shard_that_was_mended_is_no_failure_any_more(run: RunDir) -> None:
    recorder = Recorder(run.records / "later.jsonl")
    ours, now = fingerprints.newest(run), time.time()
    later = {"started": now, "finished": now, "attempt": 2, "task": "001-0-0"}
    recorder.append(Record("half", "done", rows=2, fingerprint=ours, **later))
    for suffix in (".parquet", ".npz"):
        (run.root.parent / f"half{suffix}").touch()
    found = _summary(run)
    assert (found.done, found.failed, found.rows) == (4, 3, 39)
    assert not [g for g in found.failures if "half" in g.shards]


def test_a_shard_whose_log_is_asked_for_is_named_in_it(ended: Path) -> None:
    said = d2m("logs", ended / "c.yml", "cut-b")
    assert said.returncode == 0
    assert "ERROR cut-b failed" in said.stdout


@pytest.mark.parametrize("command", ["status", "verify"])
def test_no_run_is_a_usage_error(command: str, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=str(SHARDS / "00000.tar"),
        output_metadata_dir=str(tmp_path / "out"),
    )
    said = d2m(command, config)
    assert (said.returncode, said.stdout) == (2, "")
    assert f"there is no run in {tmp_path}/out/.d2m; start one with `d2m-submit" in said.stderr
    assert "Traceback" not in said.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_config_is_a_usage_error(tmp_path: Path) -> None:
    said = d2m("status", tmp_path / "missing.yml")
    assert (said.returncode, said.stdout) == (2, "")
    assert "missing.yml" in said.stderr
    assert "Traceback" not in said.stderr
