"""A task, in this process, over a run folder as a submit leaves it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from early import launch_ahead
from kit import SHARDS, STATS, custom_file, sample, write_config, write_shards, write_tar

from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError, D2MError, NodeError
from d2m_hpc.launch.flow import commit, submitting
from d2m_hpc.models.transfer import CudaCopies
from d2m_hpc.plan.decide import decide
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run.attempts import Attempts
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.run.owner import OWNER
from d2m_hpc.run.records import Record, read_records
from d2m_hpc.run.tasks import attempts
from d2m_hpc.stopping import Stopped
from d2m_hpc.storage.lease import Lease
from d2m_hpc.worker import progress
from d2m_hpc.worker.batch import Batch
from d2m_hpc.worker.compute.graph import Graph
from d2m_hpc.worker.compute.in_flight import InFlight
from d2m_hpc.worker.read.loader import Loader
from d2m_hpc.worker.task import Progress, choose_device, run_task

RAISE = """
def length(text):
    if text == "caption 1001":
        raise ZeroDivisionError("no such caption")
for text in texts:
    length(text)
"""
LONG = """
import time
from pathlib import Path
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.tasks import attempts
def signs():
    return [task.updated for task in attempts(RunDir(Path(__file__).with_name("run")))]
first, end = signs(), time.monotonic() + 30
while signs() == first and time.monotonic() < end:
    time.sleep(0.01)
if signs() == first:
    raise TimeoutError("no sign of life")
"""
"""A batch that takes until the task has shown that it lives."""
PICKY = custom_file("picky", before=RAISE)
"""Raises at a caption of one shard."""


pytestmark = pytest.mark.usefixtures("own_process")


def _planned(folder: Path, tars: str | list[str], chunks: int = 1, **values: Any) -> RunDir:
    """A run folder with one submission of so many chunks, and nothing done yet."""
    common = {
        "input_tars": tars,
        "output_metadata_dir": str(folder / "out"),
        "run_dir": str(folder / "run"),
        "steal": False,
    }
    path = write_config(folder / "c.yml", {**STATS, **common, **values})
    workload = inspect(configs.load(path), str(path))
    with submitting(workload):
        decision = decide(workload)
        pending = decision.pending
        size = -(-len(pending) // chunks)
        commit(decision, [pending[i : i + size] for i in range(0, len(pending), size)])
    return workload.run


def _records(run: RunDir) -> dict[str, Record]:
    found = [r for path in run.records.iterdir() for r in read_records(path)]
    assert len({r.shard for r in found}) == len(found)
    return {r.shard: r for r in found}


def _outputs(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "out").iterdir() if p.name != OWNER)


def test_two_tasks_of_a_submission_do_different_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 4)
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"), chunks=2)
    ended = [run_task(run.root, "000", index) for index in (0, 1)]
    assert [(p.state, p.shards, p.done, p.rows) for p in ended] == [("finished", 2, 2, 10)] * 2
    assert {s: r.task for s, r in _records(run).items()} == {
        "00000": "000-0-0",
        "00001": "000-0-0",
        "00002": "000-1-0",
        "00003": "000-1-0",
    }
    assert sorted(p.name for p in run.records.iterdir()) == ["000-0-0.jsonl", "000-1-0.jsonl"]
    assert len(_outputs(tmp_path)) == 8
    assert list(run.leases.iterdir()) == []


def test_a_task_shows_that_it_lives_while_a_batch_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else status takes it for dead, and foretells as if it would work at its usual speed."""
    monkeypatch.setattr(progress, "ALIVE_SECONDS", 0.1)
    write_shards(tmp_path / "tars", 1)
    (tmp_path / "long.py").write_text(custom_file("long", before=LONG))
    more: dict[str, Any] = {
        "models": [*STATS["models"], "long"],
        "postprocess_columns": ["long-length"],
        "custom_pypath": str(tmp_path / "long.py"),
        "batch_size": 1,
    }
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"), **more)
    ended = run_task(run.root, "000", 0)
    assert (ended.state, ended.done, ended.failed) == ("finished", 1, 0), _records(run)
    assert [task.state for task in attempts(run)] == ["finished"]


def test_a_task_takes_what_another_has_not_begun(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 3)
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"), chunks=3, steal=True)
    other = Lease(run.lease("00002"))
    assert other.claim()
    ended = run_task(run.root, "000", 1)
    other.release()
    assert (ended.done, ended.shards) == (2, 2)
    assert _records(run).keys() == {"00000", "00001"}


def test_a_task_that_comes_late_finds_all_done(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"))
    run_task(run.root, "000", 0)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = run_task(run.root, "000", 0)
    assert (again.done, again.failed, again.rows) == (1, 0, 0)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert len(_records(run)) == 1


def test_every_sample_of_a_bad_tar_is_a_row_or_a_rejection(tmp_path: Path) -> None:
    run = _planned(tmp_path, str(SHARDS / "bad.tar"), max_rejected_fraction=1.0)
    ended = run_task(run.root, "000", 0)
    record = _records(run)["bad"]
    assert (record.state, record.rows, len(record.rejections)) == ("done", 4, 10)
    assert (ended.rows, ended.rejected, ended.done) == (4, 10, 1)
    keys = pq.read_table(tmp_path / "out" / "bad.parquet")["key"].to_pylist()
    assert keys == ["good-0", "good-1", "no-uid", "good-2"]
    assert {r.key for r in record.rejections} == {
        "no-text",
        "no-json",
        "garbage",
        "zero",
        "latin1",
        "bad-json",
        "text-only",
        "header-only",
        "dots",
        "bomb",
    }
    assert all(r.reason for r in record.rejections)


def test_too_many_rejections_fail_a_shard(tmp_path: Path) -> None:
    run = _planned(tmp_path, str(SHARDS / "bad.tar"))
    assert run_task(run.root, "000", 0).failed == 1
    record = _records(run)["bad"]
    assert (record.state, record.kind, record.traceback) == ("failed", "ShardError", "")
    assert "10 of 14 samples are rejected, over max_rejected_fraction (0.1)" in record.error
    assert _outputs(tmp_path) == []


def test_samples_merged_into_one_fail_the_shard_in_a_line_that_says_what_to_do(
    tmp_path: Path,
) -> None:
    """Without them 20 of 21 samples were rows, and hundreds were in no count."""
    folder = tmp_path / ("long" * 20)
    members = [m for i in range(20) for m in sample(f"{i:03d}", i).items()]
    members += [m for i in range(300) for m in sample(f"take.{i}", 0).items()]
    run = _planned(tmp_path, str(write_tar(folder / "odd.tar", members)))
    assert run_task(run.root, "000", 0).failed == 1
    record = _records(run)["odd"]
    assert "300 of 320 samples are rejected" in record.error
    assert "rename so that only the extension has one" in record.error
    assert len(record.error) < 300


@pytest.mark.parametrize("count", [1, 1000])
def test_what_is_noted_of_a_shard_is_no_rejection(tmp_path: Path, count: int) -> None:
    members = [*sample("a").items(), *((f"._{i}.jpg", b"") for i in range(count))]
    run = _planned(tmp_path, str(write_tar(tmp_path / "mac.tar", members)))
    assert run_task(run.root, "000", 0).done == 1
    record = _records(run)["mac"]
    assert (record.rows, record.rejections) == (1, [])
    [notice] = record.notices
    assert notice.startswith("foreign members are not read: ._0.jpg")
    assert len(notice) < 300


def test_a_model_that_raises_fails_its_shard_with_its_traceback(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 3)
    (tmp_path / "picky.py").write_text(PICKY)
    run = _planned(
        tmp_path,
        str(tmp_path / "tars" / "*.tar"),
        models=["text-stats", "picky"],
        postprocess_columns=["picky-length"],
        postprocess_features=[],
        custom_pypath=str(tmp_path / "picky.py"),
    )
    ended = run_task(run.root, "000", 0)
    assert (ended.state, ended.done, ended.failed) == ("finished", 2, 1)
    records = _records(run)
    assert {s: r.state for s, r in records.items()} == {
        "00000": "done",
        "00001": "failed",
        "00002": "done",
    }
    assert "'picky' raised ZeroDivisionError: no such caption" in records["00001"].error
    assert "in length" in records["00001"].traceback
    assert _outputs(tmp_path) == ["00000.npz", "00000.parquet", "00002.npz", "00002.parquet"]


def test_a_device_that_fails_while_it_computes_ends_the_task_and_fails_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA says so when the results are waited for, not when kernels are launched."""

    def fail() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    write_shards(tmp_path / "tars", 2)
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"))
    monkeypatch.setattr(CudaCopies, "mark", lambda copies: fail)
    with pytest.raises(NodeError, match="illegal memory access"):
        run_task(run.root, "000", 0)
    assert Manifest.load(run).failures == {}
    assert list(run.leases.iterdir()) == []
    assert _outputs(tmp_path) == []


def test_a_shard_that_is_not_there_fails_and_the_next_is_done(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 2)
    run = _planned(tmp_path, str(tmp_path / "tars" / "0000{0..1}.tar"))
    (tmp_path / "tars" / "00000.tar").unlink()
    ended = run_task(run.root, "000", 0)
    assert (ended.done, ended.failed) == (1, 1)
    failed = _records(run)["00000"]
    assert failed.error.endswith("00000.tar: No such file or directory")
    assert list(run.leases.iterdir()) == []


def test_a_commit_that_fails_is_recorded(tmp_path: Path) -> None:
    """The outputs' folder has become a file."""
    write_shards(tmp_path / "tars", 2)
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"))
    (tmp_path / "out" / ".d2m-tmp").write_bytes(b"in the way")
    ended = run_task(run.root, "000", 0)
    assert (ended.done, ended.failed) == (0, 2)
    for stem, record in _records(run).items():
        assert (record.state, record.kind) == ("failed", "ShardError")
        assert f"{tmp_path}/out: {stem} cannot be written" in record.error
    assert _outputs(tmp_path) == [".d2m-tmp"]


def test_a_listener_sees_progress_that_never_goes_back(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 3)
    write_tar(tmp_path / "tars" / "00003.tar", {**sample("a"), "a.jpg": b"no image"})
    seen: list[tuple[int, ...]] = []
    states: list[str] = []

    def listen(progress: Progress) -> None:
        seen.append(
            (progress.done, progress.failed, progress.rows, progress.rejected, progress.shards)
        )
        states.append(progress.state)

    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"), batch_size=2)
    run_task(run.root, "000", 0, listener=listen)
    for before, after in itertools.pairwise(seen):
        assert all(a <= b for a, b in zip(before, after, strict=True)), (before, after)
    assert seen[-1] == (3, 1, 15, 0, 4)
    assert {row[2] for row in seen} >= {2, 4, 5, 7, 9, 10, 12, 14, 15}  # each batch is told
    assert set(states[:-1]) == {"running"}
    assert states[-1] == "finished"


def test_a_task_leaves_its_progress_and_its_log(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    shutil.copy(SHARDS / "cut.tar", tmp_path / "tars")
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"))
    run_task(run.root, "000", 0)
    [path] = run.progress.iterdir()
    told = json.loads(path.read_bytes())
    assert (told["task"], told["state"], told["shards"]) == ("000-0-0", "finished", 2)
    assert (told["done"], told["failed"], told["rows"]) == (1, 1, 5)
    log = run.log_of("000", 0).read_text()
    assert "INFO 00000: 5 rows" in log
    assert "ERROR cut failed: " in log
    assert "cut.tar is truncated at byte" in log


def test_the_logs_of_two_tasks_in_one_process_do_not_mix(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 2)
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"), chunks=2)
    for index in (0, 1):
        run_task(run.root, "000", index)
    logs = [run.log_of("000", index).read_text() for index in (0, 1)]
    assert ["00000: 5 rows" in log for log in logs] == [True, False]
    assert ["00001: 5 rows" in log for log in logs] == [False, True]


def test_no_file_of_a_run_is_world_writable_under_umask_0(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    before = os.umask(0)
    try:
        run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"))
        run_task(run.root, "000", 0)
    finally:
        os.umask(before)
    made = [p for top in ("run", "out") for p in (tmp_path / top).rglob("*")]
    assert run.log_of("000", 0) in made
    modes = {str(p.relative_to(tmp_path)): stat.S_IMODE(p.stat().st_mode) for p in made}
    assert {name for name, mode in modes.items() if mode & 0o002} == set()


def test_a_task_without_time_for_a_shard_touches_none(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"))
    ended = run_task(run.root, "000", 0, deadline=1.0)
    assert (ended.state, ended.done, ended.failed) == ("out of time", 0, 0)
    assert list(run.records.iterdir()) == list(run.leases.iterdir()) == []


def test_an_index_without_a_chunk_is_an_error(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"))
    with pytest.raises(D2MError, match=r"submission 000 .* has no chunk 1"):
        run_task(run.root, "000", 1)


def test_a_custom_file_that_breaks_on_a_node_is_a_config_error_and_no_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "tars", 1)
    breaks = '\nimport os\nif "BREAKS" in os.environ:\n    1 / 0\n'
    (tmp_path / "picky.py").write_text(PICKY + breaks)
    run = _planned(
        tmp_path,
        str(tmp_path / "tars" / "*.tar"),
        models=[*STATS["models"], "picky"],
        custom_pypath=str(tmp_path / "picky.py"),
    )
    monkeypatch.setenv("BREAKS", "1")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        run_task(run.root, "000", 0)
    assert list(run.records.iterdir()) == []


# --- from shard to shard, as on a GPU ---


MAIN = ("wait", "compute")
"""What the main thread does."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU launches ahead, as a GPU does; the shards of the batches that were launched so."""
    found: list[str] = []

    def noted(loader: Loader) -> Any:
        if ready := poll(loader):
            found.append(ready[1].keys[0][:5])
        return ready

    launch_ahead(monkeypatch.setattr)
    poll = Loader.poll
    monkeypatch.setattr(Loader, "poll", noted)
    monkeypatch.setattr(Graph, "returns_early", True)
    return found


def _mixed(folder: Path) -> RunDir:
    """Shards of one, two and no batches; of bad samples; and one whose first batch fails."""
    write_shards(folder / "tars", 2)
    write_shards(folder / "tars", 1, samples=3)
    write_shards(folder / "more", 5, samples=9)
    for i in (2, 3, 4):
        (folder / "more" / f"{i:05d}.tar").rename(folder / "tars" / f"{i:05d}.tar")
    shutil.copy(SHARDS / "bad.tar", folder / "tars" / "00005.tar")
    write_tar(folder / "tars" / "00006.tar", {})
    write_tar(folder / "tars" / "00007.tar", sample("000070000"))
    (folder / "picky.py").write_text(PICKY)
    more: dict[str, Any] = {
        "models": [*STATS["models"], "picky"],
        "postprocess_columns": [*STATS["postprocess_columns"], "picky-length"],
        "custom_pypath": str(folder / "picky.py"),
    }
    tars = str(folder / "tars" / "*.tar")
    return _planned(folder, tars, batch_size=4, max_rejected_fraction=1.0, **more)


def _left(folder: Path, run: RunDir) -> dict[str, Any]:
    """What a run has written, without its times."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "out").glob("*.parquet")):
        found[path.name] = pq.read_table(path).to_pydict()
    for path in sorted((folder / "out").glob("*.npz")):
        with np.load(path) as arrays:
            found[path.name] = {name: arrays[name].tobytes() for name in arrays}
    for stem, r in _records(run).items():
        found[stem] = (r.state, r.rows, r.rejections, r.notices, r.error.replace(str(folder), ""))
    return found


def test_shards_that_are_launched_ahead_have_the_same_outputs_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    alone, ahead = tmp_path / "alone", tmp_path / "ahead"
    before, after = _mixed(alone), _mixed(ahead)
    told = run_task(before.root, "000", 0)
    launched = request.getfixturevalue("launched")
    began = time.perf_counter()
    again = run_task(after.root, "000", 0)
    seconds = time.perf_counter() - began
    assert _left(ahead, after) == _left(alone, before)
    counts = ("state", "shards", "done", "failed", "rows", "rejected")
    assert [getattr(again, c) for c in counts] == [getattr(told, c) for c in counts]
    assert (told.done, told.failed) == (7, 1)
    # Not the first one, and not the one after a shard that has no batch or fails at its first.
    assert launched == ["00001", "00003", "00004", "good-"]
    assert list(after.leases.iterdir()) == []
    spent = [r.seconds.get(stage, 0.0) for r in _records(after).values() for stage in MAIN]
    assert sum(spent) <= seconds


def test_nothing_is_launched_beside_a_shard_that_is_tried_alone(
    tmp_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "tars", 4)
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"), batch_size=4)
    launch, beside = Graph.launch, list[tuple[str, list[str]]]()

    def noted(graph: Graph, batch: Batch) -> InFlight:
        held = sorted(path.name[:5] for path in run.leases.iterdir())
        beside.append((batch.keys[0][:5], held))
        return launch(graph, batch)

    monkeypatch.setattr(Graph, "launch", noted)
    ended = run_task(run.root, "000", 0, alone={"00000", "00002"})
    assert (ended.done, ended.failed, ended.rows) == (4, 0, 20)
    assert launched == ["00003"]
    assert beside[-4:] == [("00000", ["00000"])] * 2 + [("00002", ["00002"])] * 2


def test_a_task_that_is_stopped_leaves_what_it_has_launched_ahead_to_others(
    tmp_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "tars", 4)
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"))
    waits: list[list[str]] = []
    monkeypatch.setattr(Graph, "wait", lambda graph: waits.append(launched.copy()))

    def stop(progress: Progress) -> None:
        if progress.rows == 10:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        run_task(run.root, "000", 0, listener=stop)
    assert launched == ["00001", "00002"]
    assert waits == [launched] * 2  # the second shard's own, and the third's
    assert _records(run).keys() == {"00000"}
    assert list(run.leases.iterdir()) == []
    assert Attempts(run.attempts).unended() == {}
    again = run_task(run.root, "000", 0)
    assert (again.done, again.failed, again.rows) == (4, 0, 15)


# --- the device ---

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


def test_the_cpu_is_chosen_by_name() -> None:
    for local in (True, False):
        assert choose_device("cpu", local) == torch.device("cpu")


@needs_no_cuda
@pytest.mark.parametrize("device", [0, "cuda:1", "2"])
def test_a_node_without_its_gpu_is_broken(device: int | str) -> None:
    with pytest.raises(NodeError, match=r"is not usable on .*: 0 CUDA devices are visible"):
        choose_device(device, local=False)


@needs_no_cuda
def test_on_the_users_own_machine_the_cpu_takes_a_gpus_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert choose_device(0, local=True) == torch.device("cpu")
    assert "no CUDA device here; running on the CPU" in caplog.text


@pytest.mark.parametrize("local", [True, False])
def test_an_index_that_no_machine_has_is_an_error_where_there_are_gpus(local: bool) -> None:
    if local and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with pytest.raises(NodeError):
        choose_device(99, local)


@needs_no_cuda
def test_a_broken_node_leaves_its_shards_untouched(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    run = _planned(tmp_path, str(tmp_path / "tars" / "*.tar"), device=0)
    with pytest.raises(NodeError):
        run_task(run.root, "000", 0)
    assert list(run.records.iterdir()) == list(run.leases.iterdir()) == []
    assert Manifest.load(run).failures == {}
    ended = run_task(run.root, "000", 0, local=True)
    assert ended.done == 1
