"""Merging loses nothing: killed at any step, and whatever tasks write meanwhile."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from d2m_hpc.run import merge
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest, Outcome
from d2m_hpc.run.merge import listed, merge_silent
from d2m_hpc.run.records import Record, Recorder, Rejection

LONG_AGO = time.time() - 10_000
SILENT = 3600.0
STEPS = ("rename", "replace", "fsync", "unlink")
"""All by which a merge changes what is on disk, but for what it writes under a hidden name."""


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven files are many."""
    monkeypatch.setattr(merge, "MANY", 7)
    monkeypatch.setattr(merge, "BATCH", 5)


def age(*paths: Path) -> None:
    for path in paths:
        os.utime(path, (LONG_AGO, LONG_AGO))


def ended(run: RunDir, task: str, *records: Record) -> None:
    """A task that wrote these and has been silent since."""
    recorder = Recorder(run.records / f"{task}.jsonl")
    for record in records:
        recorder.append(record)
    run.progress_of(task).write_text(json.dumps({"task": task, "updated": LONG_AGO}))
    age(recorder.path, run.progress_of(task))


def fill(run: RunDir, tasks: int = 9) -> RunDir:
    """Each task has done a shard and failed at another, with all that a record may hold."""
    run.create()
    for i in range(tasks):
        rejections = [Rejection("a\udce9", "no json"), Rejection("b", "no json")]
        done = Record(f"döne{i}", "done", 5, rejections, host="n1", finished=i, npz_sha256="0")
        failed = Record(f"f{i}", "failed", error="no", kind="E", traceback="\n", finished=i)
        ended(run, f"000-{i}-0", done, failed)
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return fill(RunDir(tmp_path))


def names(folder: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in folder.iterdir())


def told(run: RunDir) -> list[str]:
    """The tasks whose progress is there."""
    lines = (line for path in listed(run.progress) for line in Path(path).read_bytes().splitlines())
    return sorted({json.loads(line)["task"] for line in lines})


# --- what is merged ---


def test_many_files_become_few_and_say_the_same(run: RunDir) -> None:
    before, tasks = Manifest.load(run), told(run)
    assert merge_silent(run, SILENT) == 18
    assert names(run.records) == names(run.progress) == ["merged"] * 2
    assert Manifest.load(run) == before
    assert (len(before.done), len(before.failures)) == (9, 9)
    assert told(run) == tasks


def test_every_byte_of_a_record_is_kept(run: RunDir) -> None:
    lines = {line for path in run.records.iterdir() for line in path.read_bytes().splitlines()}
    merge_silent(run, SILENT)
    kept = [line for path in run.records.iterdir() for line in path.read_bytes().splitlines()]
    assert set(kept) == lines
    assert len(kept) == len(lines)


def test_a_few_files_are_left_alone(tmp_path: Path) -> None:
    run = fill(RunDir(tmp_path), tasks=6)
    assert merge_silent(run, SILENT) == 0
    assert len(names(run.records)) == 6


def test_a_task_that_tells_its_progress_keeps_its_files(run: RunDir) -> None:
    """Its records may be old: a shard can take hours."""
    os.utime(run.progress_of("000-3-0"))
    merge_silent(run, SILENT)
    assert (run.records / "000-3-0.jsonl").exists()
    assert names(run.records) == names(run.progress) == ["000", "merged", "merged"]


def test_a_task_that_writes_records_keeps_its_files(run: RunDir) -> None:
    os.utime(run.records / "000-3-0.jsonl")
    merge_silent(run, SILENT)
    assert run.progress_of("000-3-0").exists()


def test_what_was_merged_is_never_written_again(run: RunDir) -> None:
    merge_silent(run, SILENT)
    first = {path: path.stat() for path in run.records.iterdir()}
    for i in range(8):
        ended(run, f"001-{i}-0", Record(f"later{i}", "done"))
    age(*first)
    merge_silent(run, SILENT)
    assert {path: path.stat().st_ino for path in first} == {p: s.st_ino for p, s in first.items()}
    assert len(names(run.records)) == 4
    assert len(Manifest.load(run).done) == 17


def test_a_torn_line_costs_no_other(run: RunDir) -> None:
    before = Manifest.load(run)
    for path in run.records.iterdir():
        with open(path, "ab") as file:
            file.write(b'{"shard": "torn", "st')
        age(path)
    merge_silent(run, SILENT)
    assert Manifest.load(run) == before
    assert len(names(run.records)) == 2


def test_a_merge_of_nothing_does_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    assert merge_silent(run, SILENT) == 0


# --- kills ---


@contextmanager
def before_each_step(act: Callable[[str], None]) -> Iterator[None]:
    """Do something before every operation of this process on files."""
    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            function = getattr(os, name)

            def wrapped(*args: Any, name: str = name, real: Any = function, **kw: Any) -> Any:
                act(name)
                return real(*args, **kw)

            patch.setattr(os, name, wrapped)
        yield


def killed_before(step: int, run: RunDir) -> bool:
    """Merge in a child that dies before its step-th operation; False where it came to its end."""
    pid = os.fork()
    if not pid:
        count = itertools.count(1)

        def die(_: str) -> None:
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        with before_each_step(die):
            merge_silent(run, SILENT)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_a_kill_before_any_step_loses_and_doubles_nothing(tmp_path: Path) -> None:
    killed = True
    for step in itertools.count(1):
        run = fill(RunDir(tmp_path / str(step)))
        before, tasks = Manifest.load(run), told(run)
        killed = killed_before(step, run)
        assert Manifest.load(run) == before
        merge_silent(run, SILENT)  # the next submit
        assert Manifest.load(run) == before
        assert told(run) == tasks
        if not killed:
            break
    assert step > 40


def test_submits_killed_again_and_again_lose_nothing_of_tasks_that_go_on(run: RunDir) -> None:
    recorder = Recorder(run.records / "000-1-0.jsonl")
    stems = set(Manifest.load(run).done)
    for i, step in enumerate(itertools.islice(itertools.cycle((3, 5, 8, 12, 14)), 25)):
        recorder.append(Record(f"later{i}", "done"))
        age(recorder.path)
        killed_before(step, run)
        stems.add(f"later{i}")
        assert Manifest.load(run).done.keys() == stems


# --- tasks that write meanwhile ---


def test_a_task_that_wakes_up_at_any_step_loses_nothing(run: RunDir) -> None:
    """And finds its file gone, half merged, or there."""
    stems = [f"woken{i}" for i in range(200)]
    recorders = itertools.cycle(Recorder(run.records / f"000-{i}-0.jsonl") for i in range(9))
    unused, busy = iter(stems), False

    def write(_: str) -> None:
        nonlocal busy
        if not busy:  # its own fsync is a step too
            busy = True
            next(recorders).append(Record(next(unused), "done"))
            busy = False

    with before_each_step(write):
        merge_silent(run, SILENT)
    written = set(stems) - set(unused)
    assert len(written) > 40
    assert written <= Manifest.load(run).done.keys()


@pytest.mark.parametrize("asleep_before", ["fstat", "write", "fsync", "stat"])
def test_a_task_frozen_while_it_writes_loses_nothing(
    asleep_before: str, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had its file open when a submit merged it."""
    real, slept = getattr(os, asleep_before), []

    def freeze(*args: Any, **kw: Any) -> Any:
        if not slept:
            slept.append(True)
            assert merge_silent(run, -1.0) > 0  # everybody is silent
        return real(*args, **kw)

    monkeypatch.setattr(os, asleep_before, freeze)
    Recorder(run.records / "000-3-0.jsonl").append(Record("woken", "failed", finished=99))
    assert slept
    found = Manifest.load(run).failures["woken"]
    assert found == [Outcome.of(Record("woken", "failed", finished=99).to_dict())]


WRITER = """
import sys
from pathlib import Path
from d2m_hpc.run.records import Record, Recorder
recorder = Recorder(Path(sys.argv[1]) / f"000-{sys.argv[2]}-0.jsonl")
for i in range(300):
    recorder.append(Record(f"{sys.argv[2]}-{i}", "done"))
"""


def test_writers_and_merges_at_once_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As hostile as can be: every file is merged at every moment."""
    monkeypatch.setattr(merge, "MANY", 1)
    run = RunDir(tmp_path)
    run.create()
    command = [sys.executable, "-c", WRITER, str(run.records)]
    writers = [subprocess.Popen([*command, str(i)]) for i in range(3)]
    merged = 0
    while any(writer.poll() is None for writer in writers):
        merged += merge_silent(run, -1.0)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert merged > 10
    assert Manifest.load(run).done.keys() == {f"{w}-{i}" for w in range(3) for i in range(300)}


def test_two_merges_at_once_lose_nothing(run: RunDir) -> None:
    """A submit that was frozen for so long that another took its lock."""
    before, inside = Manifest.load(run), []

    def other(_: str) -> None:
        if not inside:
            inside.append(True)
            merge_silent(run, SILENT)
            inside.clear()

    with before_each_step(other):
        merge_silent(run, SILENT)
    assert Manifest.load(run) == before


# --- readers ---


def test_a_reader_finds_what_was_merged_after_it_looked(run: RunDir) -> None:
    before = Manifest.load(run)
    paths = map(Path, listed(run.records))
    first = next(paths)
    merge_silent(run, SILENT)
    rest = [path for path in paths if path.exists()]
    assert first not in rest
    lines = b"".join(path.read_bytes() for path in rest)
    assert all(stem.encode() in lines for stem in before.done)
