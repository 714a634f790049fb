"""A task finds its own chunk without reading the others'."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2m_hpc.run.chunks import Chunks, write_chunks
from d2m_hpc.run.folder import RunDir, Submission
from d2m_hpc.run.records import Job, Shard

SIZES = st.none() | st.integers(0, 10**12)
SHARDS = st.builds(Shard, st.text(), st.text(), SIZES)
JOBS = st.builds(Job, SHARDS, st.sampled_from(["", "0a1b"]), st.integers(0, 2))


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    return RunDir(tmp_path).submission("000")


def chunk_of(number: int) -> list[Job]:
    some = range(number % 4)
    return [Job(Shard(f"{number}-ü{i}", f"s3://b/\n{i}.tar", i or None)) for i in some]


@given(st.lists(st.lists(JOBS, max_size=4), max_size=6))
def test_any_chunks_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, made: list[list[Job]]
) -> None:
    submission = RunDir(tmp_path_factory.getbasetemp()).submission("any")
    write_chunks(submission, iter(made))
    chunks = Chunks(submission)
    assert len(chunks) == len(made)
    assert list(chunks.read(range(len(made)))) == made


def test_chunks_come_in_the_order_that_is_asked_for(submission: Submission) -> None:
    write_chunks(submission, map(chunk_of, range(9)))
    asked = [7, 0, 8, 7]
    assert list(Chunks(submission).read(asked)) == [chunk_of(i) for i in asked]


def test_no_other_line_is_read(submission: Submission) -> None:
    write_chunks(submission, map(chunk_of, range(9)))
    lines = submission.chunks.read_bytes().splitlines(keepends=True)
    junk = [line if i == 5 else b"\xff" * len(line) for i, line in enumerate(lines)]
    submission.chunks.write_bytes(b"".join(junk))
    assert list(Chunks(submission).read([5])) == [chunk_of(5)]


def test_a_line_of_the_file_is_a_tasks_list_of_jobs(submission: Submission) -> None:
    """Whoever writes a tool of his own needs no offsets."""
    made = [
        [Job(Shard("a", "/a.tar", 7))],
        [Job(Shard("b", "/b.tar"))],
        [Job(Shard("c", "/c.tar", 1), "0a")],
        [Job(Shard("d", "/d.tar"), attempt=2, alone=True)],
        [Job(Shard("e", "/e.tar"), need=1)],
    ]
    write_chunks(submission, made)
    assert submission.chunks.read_text().splitlines() == [
        '[["a", "/a.tar", 7]]',
        '[["b", "/b.tar", null]]',
        '[["c", "/c.tar", 1, "0a"]]',
        '[["d", "/d.tar", null, "", 2, 0, true, false]]',
        '[["e", "/e.tar", null, "", 0, 0, false, false, 1]]',
    ]
