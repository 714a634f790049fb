"""What a submit reads and writes; Slurm itself is in tests/slurm."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from kit import STATS, write_config

from d2m_hpc import cli
from d2m_hpc import config as configs
from d2m_hpc.errors import D2MError, SlurmError
from d2m_hpc.launch import arrays, commands, flow, slurm
from d2m_hpc.launch.slurm import Element, Queue
from d2m_hpc.plan import decide, patterns
from d2m_hpc.plan.workload import Workload, inspect
from d2m_hpc.run import alone, fingerprints, merge
from d2m_hpc.run.chunks import Chunks
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.run.records import Record, Recorder
from d2m_hpc.run.tasks import Progress
from d2m_hpc.storage.lease import Lease
from d2m_hpc.watch.status import summarise


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of ten tars, two for each task; without Slurm, whatever this machine has of it."""
    monkeypatch.setattr(slurm, "is_here", lambda: False)
    (tmp_path / "tars").mkdir()
    for i in range(10):
        (tmp_path / "tars" / f"{i}.tar").write_bytes(b"x")
    return write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=str(tmp_path / "tars" / "*.tar"),
        output_metadata_dir=str(tmp_path / "out"),
        shards_per_task=2,
    )


@pytest.fixture
def workload(config: Path) -> Workload:
    return inspect(configs.load(config), str(config))


def prepare(workload: Workload) -> list[decide.Decision]:
    """A submit but for sbatch; what it decided."""
    return [flow.submit(workload, arrays.ByHand())]


def live(workload: Workload, *elements: int) -> Queue:
    """Slurm's word that these elements of submission 000 are pending."""
    name = f"d2m-{slurm.token(workload.run.root)}-000-0"
    found = [Element("1", i, "PENDING", name) for i in elements]
    return Queue(found, slurm.arrays_of(workload.run))


def test_shards_of_live_tasks_are_in_flight(workload: Workload) -> None:
    prepare(workload)
    run = workload.run
    chunks = list(Chunks(run.submission("000")).read([1, 4]))
    assert arrays.in_flight(run, live(workload, 1, 4)) == {s.stem for c in chunks for s in c}
    assert arrays.in_flight(run, live(workload)) == set()
    assert len(chunks[0] + chunks[1]) == 4


@pytest.mark.parametrize("size", [1, 3, 100])
def test_another_shards_per_task_divides_what_no_live_task_has(
    size: int, workload: Workload
) -> None:
    """Chunks of before stay what they were, and what their tasks have is nobody else's."""
    prepare(workload)
    run = workload.run
    before = [*Chunks(run.submission("000")).read(range(5))]
    busy = {s.stem for number in (1, 4) for s in before[number]}
    workload.config = workload.config.model_copy(update={"shards_per_task": size})
    queue = live(workload, 1, 4)
    submission = flow.commit(decision := arrays.look(workload, queue), [])
    chunks = arrays.ByHand().chunks(decision, submission)
    stems = [job.stem for chunk in chunks for job in chunk]
    assert len(stems) == len({*stems}) == 6
    assert busy.isdisjoint(stems)
    assert [len(c) for c in arrays.ByHand().chunks(decision, submission)] == {
        1: [1] * 6, 3: [3, 3], 100: [6]
    }[size]  # fmt: skip
    assert arrays.in_flight(run, queue) == busy
    assert [*Chunks(run.submission("000")).read(range(5))] == before


def test_an_element_may_have_fewer_chunks_than_ranks(workload: Workload) -> None:
    values = workload.config.slurm.model_copy(update={"tasks_per_node": 3})
    workload.config = workload.config.model_copy(update={"slurm": values})
    prepare(workload)
    assert len(arrays.in_flight(workload.run, live(workload, 0, 1))) == 10


@pytest.mark.parametrize(("age", "files"), [(7200.0, 1), (60.0, 4)])
def test_a_submit_merges_what_was_left_long_ago(
    age: float, files: int, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as long as a task may be silent."""
    monkeypatch.setattr(merge, "MANY", 3)
    run = workload.run
    run.create()
    for i in range(4):
        recorder = Recorder(run.record("000", i, 0))
        recorder.append(Record(f"{i}", "failed", finished=1.0))
        os.utime(recorder.path, (time.time() - age,) * 2)
    before = Manifest.load(run)
    prepare(workload)
    assert len(list(run.records.iterdir())) == files
    assert Manifest.load(run) == before


def test_a_submit_sweeps_what_a_killed_one_was_writing(workload: Workload) -> None:
    run = workload.run
    prepare(workload)
    folders = (run.root, run.records, run.progress, run.submission("000").folder)
    for folder in folders:
        (folder / ".x.1234.tmp").write_bytes(b"half")
    prepare(workload)
    assert [p for folder in folders for p in folder.glob("*.tmp")] == []


def test_a_submit_reads_records_and_inputs_once(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"load": 0, "expand": 0}
    load, expand = Manifest.load, patterns.expand

    def counted_load(run: RunDir) -> Manifest:
        counts["load"] += 1
        return load(run)

    def counted_expand(*given: Any) -> patterns.Expansion:
        counts["expand"] += 1
        return expand(*given)

    monkeypatch.setattr(Manifest, "load", counted_load)
    monkeypatch.setattr(patterns, "expand", counted_expand)
    monkeypatch.setattr(sys, "argv", ["d2m", "submit", str(config), "--no-sbatch"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert counts == {"load": 1, "expand": 1}


def test_leases_that_kills_left_on_finished_shards_go(workload: Workload) -> None:
    """Also the name under which one is set aside while it is taken over; others' stay."""
    run = workload.run
    run.create()
    left = [Path(f"{run.lease(stem)}.break.7.aa") for stem in "01"]
    for path in left:
        path.touch()
    flow.repair(decide.Decision(workload, [], done={"0"}))
    assert list(run.leases.iterdir()) == left[1:]


def held_elsewhere(run: RunDir, host: str = "login9") -> None:
    """A submit that was killed on another login node, as it leaves its lock."""
    run.create()
    lease = Lease(run.submit_lock)
    assert lease.claim()
    text = run.submit_lock.read_text()
    lease.release()
    run.submit_lock.write_text(re.sub("host=.*", f"host={host}", text))


def test_a_submit_that_waits_for_another_says_so_and_gives_up_in_the_end(
    workload: Workload, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(alone, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(alone, "SUBMIT_SECONDS", 1.0)
    held_elsewhere(workload.run)
    with pytest.raises(D2MError, match=r"has worked for 1 s \(pid=\d+, host=login9\); end it"):
        prepare(workload)
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("note: another submit of this run has its lock (pid=")
    assert "120 s for a sign of life" in said


SQUEUE = """#!/bin/bash
[[ "$*" = *%T* ]] && cat {queue}
exit 0
"""


@pytest.fixture
def squeue(tmp_path: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file from which `squeue` answers, of a run whose array is submitted."""
    prepare(workload)
    monkeypatch.setattr(slurm, "is_here", lambda: True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(SQUEUE.format(queue=tmp_path / "queue"))
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "queue"


def rows(workload: Workload, state: str, *elements: int) -> str:
    name = f"d2m-{slurm.token(workload.run.root)}-000-0"
    return "".join(f"19|{i}|{state}||{name}\n" for i in elements)


def test_a_submit_tells_why_live_tasks_do_not_run(workload: Workload, squeue: Path) -> None:
    squeue.write_text(rows(workload, "PENDING|JobHeldUser", 0, 1, 2, 3, 4))
    [decision] = prepare(workload)
    assert decision.pending == []
    [notice] = decision.notices
    assert notice.startswith("5 array tasks do not run (JobHeldUser): held by their user")


def test_status_tells_why_tasks_wait_and_what_slurm_did_not_say(
    workload: Workload, squeue: Path
) -> None:
    squeue.write_text(
        rows(workload, "RUNNING|None", 0) + rows(workload, "PENDING|QOSMaxGRESPerUser", 1, 2)
    )
    found = summarise(workload.run, workload.config)
    assert found.tasks == {"running": 1, "pending": 2}
    assert [(w.reason, w.tasks) for w in found.waiting] == [("QOSMaxGRESPerUser", 2)]
    assert found.to_dict()["waiting"][0]["help"].startswith("they start as other jobs end")
    squeue.with_name("bin").joinpath("squeue").write_text("#!/bin/sh\necho away >&2\nexit 1\n")
    found = summarise(workload.run, workload.config)
    assert (found.tasks, found.waiting) == ({}, [])
    assert found.unasked == "squeue failed: away"


def test_status_names_tasks_that_are_gone_by_slurms_word(workload: Workload, squeue: Path) -> None:
    """Though they told their progress a moment ago."""
    squeue.write_text(rows(workload, "RUNNING|None", 0))
    workload.run.progress.mkdir(exist_ok=True)
    for index in range(2):
        told = json.dumps(asdict(Progress(f"000-{index}-0")))
        (workload.run.progress / f"000-{index}-0.json").write_text(told)
    assert summarise(workload.run, workload.config).lost == ["000-1-0"]


def test_wait_ends_when_nothing_can_start(
    workload: Workload, squeue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "SHORTEST_WAIT", 0.05)
    monkeypatch.setattr(arrays, "STUCK_SECONDS", 0.5)
    held = rows(workload, "PENDING|BadConstraints", 1, 2)
    squeue.write_text(held + rows(workload, "RUNNING|None", 0))
    ended = Thread(target=lambda: (time.sleep(1), squeue.write_text(held)))
    ended.start()
    began = time.monotonic()
    with pytest.raises(SlurmError, match="nothing that is left can start: 2 array tasks") as error:
        arrays.wait(workload.run, workload.config)
    assert 1.3 <= time.monotonic() - began < 30
    assert error.value.exit_code == 3
    ended.join()
    squeue.write_text("")
    arrays.wait(workload.run, workload.config)


def test_wait_names_tasks_that_tell_nothing_while_shards_are_left(
    workload: Workload,
    squeue: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Slurm may call them running for hours: a user has to know which to cancel."""
    monkeypatch.setattr(commands, "SHORTEST_WAIT", 0.05)
    monkeypatch.setattr(slurm, "SILENT", 0.3)
    began = f"{datetime.now() - timedelta(minutes=1):%Y-%m-%dT%H:%M:%S}"
    listed = rows(workload, "RUNNING|None", 0, 1).replace("||", f"|n1 {began}|")
    squeue.write_text(listed)
    alive = Progress("000-1-0", updated=time.time() + 60)
    workload.run.progress.mkdir(exist_ok=True)
    workload.run.progress_of(alive.task).write_text(json.dumps(asdict(alive)))
    read = arrays.attempts

    def until_cancelled(run: RunDir) -> list[Progress]:
        squeue.write_text("")
        return read(run)

    monkeypatch.setattr(arrays, "attempts", until_cancelled)
    arrays.wait(workload.run, workload.config)
    assert "array task 19_0 on n1 has told nothing for minutes" in caplog.text
    assert "`scancel 19_0` leaves its shards to the next submit" in caplog.text


def test_wait_ends_when_all_is_done_and_slurm_lists_ghosts(
    workload: Workload,
    squeue: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a slurmctld that died may, for hours; but not while a shard is left."""
    monkeypatch.setattr(commands, "SHORTEST_WAIT", 0.05)
    monkeypatch.setattr(slurm, "SILENT", 0.3)
    squeue.write_text(rows(workload, "RUNNING|None", 0, 3))
    run, asked, out = workload.run, [], Path(workload.config.output_metadata_dir)
    standings = arrays.standings

    def do_the_last(*given: Any) -> Any:
        """Between the first look at the shards and the second."""
        asked.append(found := standings(*given))
        done("9")
        return found

    def done(stem: str) -> None:
        newest = fingerprints.newest(run)
        record = Record(stem, "done", fingerprint=newest, started=1.0, finished=time.time())
        Recorder(run.record("000", 0, 0)).append(record)
        for suffix in (".parquet", ".npz"):
            (out / f"{stem}{suffix}").write_bytes(b"")

    for stem in map(str, range(9)):
        done(stem)
    monkeypatch.setattr(arrays, "standings", do_the_last)
    arrays.wait(run, workload.config)
    assert [found.is_complete for found in asked] == [False, True]
    assert "2 elements (19_0, ...)" in caplog.text
