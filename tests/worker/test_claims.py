"""A task reads its own chunk, and the others' only to take over what they have not begun."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2m_hpc.config import Config
from d2m_hpc.errors import D2MError, ShardError
from d2m_hpc.run.attempts import Attempt, Attempts
from d2m_hpc.run.chunks import Chunks, write_chunks
from d2m_hpc.run.folder import RunDir, Submission
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import METADATA, Pair
from d2m_hpc.run.records import DIED, Job, Record, Shard, read_records
from d2m_hpc.run.tasks import Progress
from d2m_hpc.storage.lease import Lease
from d2m_hpc.worker.board import Board, Entry
from d2m_hpc.worker.claims import Claims, TaskName
from d2m_hpc.worker.progress import Reporter
from d2m_hpc.worker.read.prefetch import Coming
from d2m_hpc.worker.read.scratch import Scratch

CHUNKS = [["a", "b"], ["c", "d"], ["e"], ["f", "g"]]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    chunks = [[Job(Shard(stem, f"/{stem}.tar")) for stem in stems] for stems in CHUNKS]
    write_chunks(run.submission("000"), chunks)
    (tmp_path / "out").mkdir()
    return run


def claims(
    run: RunDir, index: int = 1, steal: bool = True, reprocess: bool = False, **more: Any
) -> Claims:
    config = Config(
        models=["image-stats"],
        input_tars=["x.tar"],
        output_metadata_dir=str(run.root.parent / "out"),
        steal=steal,
        reprocess=reprocess,
    )
    report = Reporter(Progress("000-1-0"), run.progress_of("000-1-0"))
    values = {"clean": lambda stem, attempt: False, "deadline": None, **more}
    return Claims(run, TaskName("000", index, 0), config, "f", report, **values)


def stems(claimed: Claims) -> list[str]:
    """Of all that is claimed, each let go at once."""
    taken = []
    for work in claimed:
        taken.append(work.shard.stem)
        claimed.let_go(work)
    return taken


def spoil(submission: Submission, *kept: int) -> None:
    """Make all lines but some unreadable."""
    lines = submission.chunks.read_bytes().splitlines(keepends=True)
    spoilt = [line if i in kept else b"\xff" * len(line) for i, line in enumerate(lines)]
    submission.chunks.write_bytes(b"".join(spoilt))


def test_a_task_reads_no_chunk_but_its_own(run: RunDir) -> None:
    spoil(run.submission("000"), 1)
    assert stems(claims(run, steal=False)) == ["c", "d"]


def test_others_shards_come_from_the_last_to_the_first(run: RunDir) -> None:
    assert stems(claims(run)) == ["c", "d", "g", "f", "e", "b", "a"]


def test_others_chunks_are_read_one_at_a_time(run: RunDir) -> None:
    spoil(run.submission("000"), 1, 2, 3)
    works = iter(claims(run))
    taken = [next(works) for _ in range(5)]
    assert [work.shard.stem for work in taken] == ["c", "d", "g", "f", "e"]
    with pytest.raises(D2MError, match="is damaged"):
        next(works)
    for work in taken:
        work.release()


def extend(run: RunDir) -> None:
    """As if the pairs of c, d, f and g, of the fingerprint `old`, were to be extended."""
    chunks = [
        [Job(Shard(stem, f"/{stem}.tar"), "old" if stem in "cdfg" else "") for stem in stems]
        for stems in CHUNKS
    ]
    write_chunks(run.submission("000"), chunks)
    for stem in "cdfg":
        table = pa.table({"key": []}).replace_schema_metadata({METADATA: note(stem, "old")})
        pq.write_table(table, run.root.parent / "out" / f"{stem}.parquet")


def note(stem: str, fingerprint: str) -> str:
    return json.dumps(Record(stem, "done", fingerprint=fingerprint, task="000-9-0").to_dict())


def test_only_jobs_that_extend_the_same_are_taken(run: RunDir) -> None:
    extend(run)
    extending = claims(run)
    assert extending.extends == "old"
    assert stems(extending) == ["c", "d", "g", "f"]
    assert stems(claims(run, index=2)) == ["e", "b", "a"]


def test_what_was_extended_is_not_looked_at_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend(run)
    first = claims(run, index=3, steal=False)
    for work in first:
        first.mark(work, "done")
        first.let_go(work)
    looked, record = [], Pair.record

    def counted(pair: Pair) -> Record | None:
        looked.append(pair.stem)
        return record(pair)

    monkeypatch.setattr(Pair, "record", counted)
    assert stems(claims(run)) == looked == ["c", "d"]


def test_a_pair_that_is_gone_or_anothers_is_left_to_the_next_submit(run: RunDir) -> None:
    extend(run)
    out = run.root.parent / "out"
    (out / "c.parquet").unlink()
    table = pq.read_table(out / "d.parquet").replace_schema_metadata({METADATA: note("d", "new")})
    pq.write_table(table, out / "d.parquet")
    (out / "f.parquet").write_bytes(b"damaged")
    assert stems(claims(run)) == ["g", "f"]
    assert list(run.leases.iterdir()) == []


def test_outputs_that_came_since_the_submit_are_replaced_by_reprocess_only(run: RunDir) -> None:
    table = pa.table({"key": []}).replace_schema_metadata({METADATA: note("c", "other")})
    pq.write_table(table, run.root.parent / "out" / "c.parquet")
    assert stems(claims(run, steal=False)) == ["d"]
    assert stems(claims(run, steal=False, reprocess=True)) == ["c", "d"]


def test_a_record_that_was_lost_is_written_once(run: RunDir) -> None:
    out = run.root.parent / "out"
    table = pa.table({"key": []}).replace_schema_metadata({METADATA: note("c", "f")})
    pq.write_table(table, out / "c.parquet")
    for _ in range(2):
        assert stems(claims(run, steal=False)) == ["d"]
    [found] = read_records(run.record("000", 1, 0))
    assert (found.shard, found.task, found.rebuilt) == ("c", "000-9-0", True)
    assert found.parquet_sha256 == OutputDir(str(out)).sha256("c.parquet")


def test_what_is_finished_or_held_is_not_taken(run: RunDir) -> None:
    (run.root.parent / "out" / "f.parquet").write_bytes(b"")
    held = Lease(run.lease("e"))
    assert held.claim()
    assert stems(claims(run)) == ["c", "d", "g", "b", "a"]
    held.release()


def test_the_outputs_are_listed_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    listings = []
    real = OutputDir.stems

    def counted(self: OutputDir) -> set[str]:
        listings.append(self.root)
        return real(self)

    monkeypatch.setattr(OutputDir, "stems", counted)
    assert len(stems(claims(run))) == 7
    assert len(listings) == 1


def test_a_task_that_is_late_takes_nothing(run: RunDir) -> None:
    assert stems(claims(run, deadline=time.time() - 1)) == []


def test_an_output_that_cannot_be_read_ends_the_task_and_frees_the_shard(run: RunDir) -> None:
    """Whether it is done is not known: to compute it again would be a guess."""
    (run.root.parent / "out" / "c.parquet").mkdir()
    with pytest.raises(D2MError, match=r"c\.parquet cannot be read"):
        stems(claims(run))
    assert list(run.leases.iterdir()) == []


def test_a_chunk_that_is_not_there_is_an_error(run: RunDir) -> None:
    assert len(Chunks(run.submission("000"))) == 4
    with pytest.raises(D2MError, match="has no chunk 4"):
        claims(run, index=4)


# --- attempts ---


def numbers(claimed: Claims, state: str = "") -> dict[str, int]:
    """The attempt at each shard, begun, and settled where a state is given."""
    found = {}
    for work in claimed:
        work.begin()
        found[work.shard.stem] = work.attempt.number
        if state:
            claimed.mark(work, state)
        claimed.let_go(work)
    return found


def test_an_attempt_is_on_disk_before_the_first_byte_is_asked_for(
    run: RunDir, tmp_path: Path
) -> None:
    seen = tmp_path / "seen.json"
    url = f"pipe:cp '{run.attempts / 'c.json'}' '{seen}'"
    write_chunks(run.submission("000"), [[], [Job(Shard("c", url))]])
    attempts, claimed = Attempts(run.attempts), claims(run, steal=False)
    work = next(iter(claimed))
    assert attempts.unended() == {}  # nothing of it was begun as yet
    Coming(work).bring(Scratch(tmp_path, 10_000))
    assert json.loads(seen.read_bytes())["number"] == 1
    assert attempts.unended() == {"c": Attempt(1, "000-1-0", claimed._report.progress.host)}
    claimed.mark(work, "done")
    assert list(run.attempts.iterdir()) == []
    claimed.let_all_go()


def test_each_attempt_has_a_larger_number_than_all_before(run: RunDir) -> None:
    """Known of the submit, of what was given back or failed, and of the finished pair."""
    chunk = [Job(Shard("c", "/c.tar"), attempt=4), Job(Shard("d", "/d.tar"))]
    write_chunks(run.submission("000"), [[], chunk])
    assert numbers(claims(run, steal=False)) == {"c": 5, "d": 1}  # given back
    assert numbers(claims(run, steal=False), "failed") == {"c": 6, "d": 2}
    for stem in "cd":
        run.submission("000").failed(stem).unlink()
    assert numbers(claims(run, steal=False), "done") == {"c": 7, "d": 3}
    made = Record("d", "done", fingerprint="old", task="000-9-0", attempt=8).to_dict()
    table = pa.table({"key": []}).replace_schema_metadata({METADATA: json.dumps(made)})
    pq.write_table(table, run.root.parent / "out" / "d.parquet")
    assert numbers(claims(run, steal=False, reprocess=True)) == {"c": 5, "d": 9}


def test_a_task_that_lost_its_lease_does_not_touch_the_others_attempt(run: RunDir) -> None:
    slow, fast = claims(run, steal=False), claims(run, steal=False)
    work = next(iter(slow))
    run.lease("c").unlink()  # as who finds it stale does
    other = next(iter(fast))
    other.begin()
    with pytest.raises(ShardError, match="another task has begun"):
        work.begin()
    slow.let_all_go()
    assert Attempts(run.attempts).unended().keys() == {"c"}
    fast.let_all_go()
    assert Attempts(run.attempts).unended() == {}


def test_a_shard_that_was_given_back_is_not_begun_any_more(run: RunDir) -> None:
    """A task is stopped while its reader comes to the shard: nobody would end that attempt."""
    claimed = claims(run, steal=False)
    work = next(iter(claimed))
    claimed.let_all_go()
    with pytest.raises(ShardError, match="given back before it was read"):
        work.begin()
    assert Attempts(run.attempts).unended() == {}


def test_a_task_that_hangs_in_a_shard_still_deserts_it(run: RunDir) -> None:
    """The watchdog must not wait for the thread that it watches."""
    claimed = claims(run, steal=False)
    work = next(iter(claimed))
    with work._lock:  # as a thread that hangs on a file server has it
        claimed.desert()
    assert list(run.leases.iterdir()) == []


def test_what_a_task_deserts_is_there_for_the_next_one_to_see(run: RunDir) -> None:
    claimed = claims(run, steal=False)
    works = iter(claimed)
    next(works).begin()
    next(works)
    claimed.desert()
    assert list(run.leases.iterdir()) == []
    assert Attempts(run.attempts).unended().keys() == {"c"}


def died(run: RunDir, stem: str, number: int, task: str = "000-3-0") -> None:
    """An attempt whose process and watcher are gone."""
    Attempts(run.attempts).begin(stem, Attempt(number, task, "n7"), anew=True)


def test_an_attempt_that_never_ended_is_counted_and_its_shard_tried_last(run: RunDir) -> None:
    died(run, "c", 1)
    assert numbers(claims(run, steal=False), "done") == {"d": 1, "c": 2}
    [failed] = read_records(run.record("000", 1, 0))
    assert (failed.shard, failed.state, failed.kind) == ("c", "failed", DIED)
    assert (failed.attempt, failed.task, failed.host) == (1, "000-3-0", "n7")
    assert "lost with n7" in failed.error


def test_nobody_steals_a_shard_at_which_a_process_died(run: RunDir) -> None:
    died(run, "g", 1)
    chunks = [[Job(Shard("a", "/a.tar"))], [Job(Shard("c", "/c.tar"))]]
    chunks += [[Job(Shard("g", "/g.tar"))], [Job(Shard("h", "/h.tar"), alone=True)]]
    write_chunks(run.submission("000"), chunks)
    assert stems(claims(run)) == ["c", "a"]
    assert list(run.leases.iterdir()) == []


def test_nobody_takes_a_shard_that_needs_another_task(run: RunDir) -> None:
    """One with more memory or walltime, in which its last task was killed."""
    chunks = [[Job(Shard("a", "/a.tar"))], [Job(Shard("c", "/c.tar"))]]
    chunks += [[Job(Shard(stem, f"/{stem}.tar"), need=1)] for stem in "gh"]
    write_chunks(run.submission("000"), chunks)
    assert stems(claims(run)) == ["c", "a"]
    assert stems(claims(run, index=2)) == ["g", "h"]


def test_a_death_that_is_on_record_keeps_thieves_away_and_is_counted_once(run: RunDir) -> None:
    """Two that were in hand together were recorded by who watched; both are tried alone."""
    for stem in "cg":
        Attempts(run.attempts).begin(stem, Attempt(1, "000-9-0", "n7", True, True), anew=True)
    assert "g" not in stems(claims(run))
    assert list(claims(run, index=3, steal=False)._alone) == []
    assert numbers(claims(run, index=3, steal=False), "done") == {"f": 1, "g": 2}
    assert not run.record("000", 1, 0).exists()


def test_the_last_attempt_that_is_allowed_gives_a_shard_up(run: RunDir) -> None:
    chunk = [Job(Shard("c", "/c.tar"), "", 2, 2, True), Job(Shard("d", "/d.tar"))]
    write_chunks(run.submission("000"), [[], chunk])
    died(run, "c", 3)
    assert numbers(claims(run, steal=False), "done") == {"d": 1}
    assert run.submission("000").failed("c").exists()
    assert Attempts(run.attempts).last("c") == Attempt(3, "000-3-0", "n7", True, True)


def test_the_first_loss_of_a_node_with_its_task_counts_for_nothing(run: RunDir) -> None:
    died(run, "c", 1, task="000-1-4")  # the same task, which Slurm has started again
    assert numbers(claims(run, steal=False)) == {"d": 1, "c": 2}
    assert not run.record("000", 1, 0).exists()
    Attempts(run.attempts).begin("c", Attempt(3, "000-1-4", lost=1), anew=False)
    assert numbers(claims(run, steal=False)) == {"d": 2, "c": 4}
    [failed] = read_records(run.record("000", 1, 0))
    assert failed.attempt == 3


def test_a_shard_that_is_tried_alone_waits_until_nothing_else_is_in_hand(run: RunDir) -> None:
    claimed = claims(run, steal=False, alone={"c"})
    works = iter(claimed)
    first = next(works)
    assert first.shard.stem == "d"
    came: list[str] = []
    thread = threading.Thread(target=lambda: came.extend(w.shard.stem for w in works))
    thread.start()
    time.sleep(0.3)
    assert came == []
    claimed.let_go(first)
    while not came:
        time.sleep(0.01)
    assert came == ["c"]
    claimed.let_all_go()
    with claimed:
        pass
    thread.join(5)
    assert not thread.is_alive()


def test_a_clock_that_jumps_ends_no_task(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = claims(run, steal=False, deadline=time.time() + 600)
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + 3600)
    assert not claimed.is_late


def test_a_copy_that_waits_to_be_read_is_not_to_blame(run: RunDir, tmp_path: Path) -> None:
    write_chunks(run.submission("000"), [[], [Job(Shard("c", "pipe:true"))]])
    board = Board()
    claimed = claims(run, steal=False, board=board)
    work = next(iter(claimed))
    coming = Coming(work)
    assert coming.bring(Scratch(tmp_path, 10_000))
    assert board.entries() == [Entry("c", 1, False)]
    work.read()
    assert board.entries() == [Entry("c", 1, True)]
    coming.drop()
    claimed.let_all_go()
    with pytest.raises(ShardError, match="given back before it was read"):
        work.read()


def test_results_that_wait_for_the_last_shard_do_not_keep_it_waiting(run: RunDir) -> None:
    board = Board()
    claimed = claims(run, steal=False, alone={"d"}, board=board)
    works = iter(claimed)
    first = next(works)
    first.begin()
    first.rest()
    second = next(works)
    second.begin()
    assert second.shard.stem == "d"
    assert [e.stem for e in board.entries() if e.begun] == ["d"]
    first.resume()
    assert {e.stem for e in board.entries() if e.begun} == {"c", "d"}
    claimed.let_all_go()
    assert board.entries() == []
