"""The run folder's files: written whole or not at all, and by nobody else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage.files import atomic_write, overwrite


@pytest.fixture
def open_umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


@pytest.mark.parametrize(
    ("umask", "folder", "file"),
    [(0o022, 0o755, 0o644), (0o002, 0o775, 0o664), (0o077, 0o700, 0o600), (0, 0o775, 0o664)],
)
def test_folders_and_files_follow_the_umask_and_are_never_world_writable(
    umask: int, folder: int, file: int, tmp_path: Path
) -> None:
    old = os.umask(umask)
    try:
        run = RunDir(tmp_path / "a" / "run")
        run.create()
        atomic_write(run.new_submission().intent, b"{}")
        overwrite(run.progress_of("000-0-0"), b"{}")
    finally:
        os.umask(old)
    made = list((tmp_path / "a").rglob("*"))
    assert {stat.S_IMODE(p.stat().st_mode) for p in made if p.is_dir()} == {folder}
    assert {stat.S_IMODE(p.stat().st_mode) for p in made if p.is_file()} == {file}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a folder to another group")
def test_what_is_made_in_a_groups_folder_is_the_groups(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, -1, 4321)
    shared.chmod(0o2775)
    run = RunDir(shared / "out" / ".d2m")
    run.create()
    atomic_write(run.config, b"x: 1")
    made = list(shared.rglob("*"))
    assert {p.stat().st_gid for p in made} == {4321}
    assert {bool(p.stat().st_mode & stat.S_ISGID) for p in made if p.is_dir()} == {True}


def writable_by_all(folder: Path) -> list[Path]:
    return [p for p in [folder, *folder.rglob("*")] if p.stat().st_mode & stat.S_IWOTH]


@pytest.mark.parametrize("durable", [True, False])
def test_a_write_replaces_the_whole_file_and_leaves_no_other(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "folder" / "file.json"
    atomic_write(path, b"a long first content", durable)
    atomic_write(path, b"second", durable)
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, durable: bool
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        atomic_write(path, "text, not bytes", durable)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_rename_that_fails_leaves_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        atomic_write(tmp_path / "taken", b"data")
    assert [p.name for p in tmp_path.rglob("*")] == ["taken", "inside"]


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [bytes([i]) * 200_000 for i in range(4)]
    atomic_write(path, contents[0])

    def write(content: bytes) -> None:
        for _ in range(10):
            atomic_write(path, content, durable=False)

    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(write, c) for c in contents]
        while not all(w.done() for w in writing):
            assert path.read_bytes() in contents
        for future in writing:
            future.result()


@pytest.mark.usefixtures("open_umask")
def test_nothing_is_world_writable_even_with_an_empty_umask(tmp_path: Path) -> None:
    parent = tmp_path / "out"
    run = RunDir(parent / "deep" / ".d2m")
    run.create()
    submission = run.new_submission()
    atomic_write(submission.config, b"config")
    atomic_write(run.shards, b"shards")
    atomic_write(parent / "else" / "where" / "file", b"")
    assert submission.folder.is_dir()
    assert submission.config in parent.rglob("*")
    assert writable_by_all(parent) == []


def test_a_run_folder_may_be_made_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    atomic_write(run.record("000", 1, 2), b"kept")
    run.create()
    assert run.record("000", 1, 2).read_bytes() == b"kept"
    assert all(p.is_dir() for p in (run.records, run.leases, run.progress, run.logs))


def test_every_file_of_a_run_has_a_path_of_its_own(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    submission = run.submission("000")
    paths = [run.config, run.fingerprint("f"), run.shards, run.hashes]
    paths += [submission.config, submission.intent, submission.chunks]
    paths += [run.record("000", 0, 0), run.record("000", 0, 1), run.record("000", 1, 0)]
    paths += [run.record("001", 0, 0), run.lease("a"), run.lease("b"), run.lease("a.b")]
    paths += [run.progress_of("000-0-0"), run.progress_of("000-0-1"), run.log_of("000", 0)]
    assert len(set(paths)) == len(paths)
    assert all(tmp_path in p.parents for p in paths)


def test_a_new_run_has_no_submissions(tmp_path: Path) -> None:
    assert RunDir(tmp_path / "no").submissions() == []


def test_submissions_are_counted_on_and_listed_oldest_first(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert [run.new_submission().name for _ in range(3)] == ["000", "001", "002"]
    run.submission("999").folder.mkdir()
    run.submission("notes").folder.mkdir()
    run.submission("²").folder.mkdir()
    assert run.new_submission().name == "1000"
    assert [s.name for s in run.submissions()] == ["000", "001", "002", "999", "1000"]


def test_submits_at_once_get_a_folder_each(tmp_path: Path) -> None:
    run, threads = RunDir(tmp_path / "run"), 8
    start = Barrier(threads)

    def submit(_: int) -> list[str]:
        start.wait()
        return [run.new_submission().name for _ in range(5)]

    with ThreadPoolExecutor(threads) as pool:
        names = [name for made in pool.map(submit, range(threads)) for name in made]
    assert sorted(names) == [f"{i:03d}" for i in range(5 * threads)]
    assert [s.name for s in run.submissions()] == sorted(names)
