"""Records survive kills, other versions and odd names; the state follows from their union."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest, Outcome
from d2m_hpc.run.records import Record, Recorder, Rejection, encode, read_records
from d2m_hpc.storage.texts import safe

STEM = "döner \udcff\n☃"
FULL = Record(
    STEM,
    "failed",
    rows=3,
    rejections=[Rejection("a\\xe9/b", "nö"), Rejection("", "x y")],
    recomputed=1,
    fingerprint="f" * 16,
    npz_sha256="0" * 64,
    parquet_sha256="1" * 64,
    started=1.25,
    finished=2.5,
    task="000-1-0",
    host="node one",
    error="bröken",
    kind="ShardError",
    traceback='File "x"\n',
    rebuilt=True,
)


def record(shard: str, state: Literal["done", "failed"], finished: float, **more: Any) -> Record:
    return Record(shard, state, finished=finished, **more)


def of(records: list[Record]) -> Manifest:
    return Manifest.of(r.to_dict() for r in records)


def outcome(record: Record) -> Outcome:
    return Outcome.of(record.to_dict())


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    least = Record("s", "done")
    recorder = Recorder(path)
    recorder.append(FULL)
    recorder.append(least)
    Recorder(path).append(FULL)
    assert list(read_records(path)) == [FULL, least, FULL]
    assert path.read_bytes().count(b"\n") == 3


@given(
    st.builds(
        Record,
        shard=st.text(st.characters()),
        state=st.sampled_from(["done", "failed"]),
        rows=st.integers(0, 10**9),
        rejections=st.lists(st.builds(Rejection, st.text(st.characters()), st.text())),
        finished=st.floats(0, 1e12),
        error=st.text(st.characters()),
    )
)
def test_any_record_is_read_back(tmp_path_factory: pytest.TempPathFactory, made: Record) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.unlink(missing_ok=True)
    Recorder(path).append(made)
    shown = [Rejection(safe(key), safe(reason)) for key, reason in made.rejections]
    assert list(read_records(path)) == [replace(made, rejections=shown, error=safe(made.error))]
    path.read_bytes().decode()


def test_texts_on_record_are_escaped_and_bounded() -> None:
    odd = "\udce9\x1b[2J\u2028\n" * 10_000
    made = Record("s\u0085\udcff", "failed", rejections=[Rejection(odd, odd)], host=odd, kind=odd)
    made.error = made.traceback = odd
    line = encode(made)
    assert len(line) < 60_000
    (text,) = line.decode().splitlines()
    assert text.isprintable()
    values = json.loads(text)
    assert values["shard"] == made.shard
    assert values["rejections"][0][0].startswith("\\xe9\\x1b[2J\\u2028\\n")
    assert "\n" in values["traceback"]
    assert "\n" not in values["error"]


def test_every_torn_line_is_dropped_and_the_next_append_is_whole(tmp_path: Path) -> None:
    path, whole, after = tmp_path / "r.jsonl", Record("first", "done"), Record("after", "done")
    Recorder(path).append(whole)
    start = path.stat().st_size
    Recorder(path).append(FULL)
    data = path.read_bytes()
    for cut in range(start, len(data)):
        path.write_bytes(data[:cut])
        # The newline may be all that is missing: then the record is there.
        kept = [whole, FULL] if cut == len(data) - 1 else [whole]
        assert list(read_records(path)) == kept
        Recorder(path).append(after)
        assert list(read_records(path)) == [*kept, after]


@pytest.mark.parametrize(
    "junk",
    [
        b"\x00" * 512,
        b"\xff\xfe",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        b"{}",
        b'{"shard": "x"}',
        b"",
        b'{"shard": "x", "state": "done", "rejections": 3}',
        b'{"shard": 1, "state": "done"}',
    ],
)
def test_a_line_that_is_no_record_costs_no_other(tmp_path: Path, junk: bytes) -> None:
    path, other = tmp_path / "r.jsonl", Record("s", "done")
    Recorder(path).append(other)
    whole = path.read_bytes()
    path.write_bytes(whole + junk + b"\n" + whole)
    assert list(read_records(path)) == [other, other]


def test_lines_that_make_json_only_together_cost_no_other(tmp_path: Path) -> None:
    path, other = tmp_path / "r.jsonl", Record("s", "done")
    Recorder(path).append(other)
    whole = path.read_bytes()
    path.write_bytes(whole + b"[1\n" + whole + b"2]\n" + whole)
    assert list(read_records(path)) == [other] * 3


def test_records_that_fill_more_than_is_read_at_once_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    names = [Rejection("k" * 1000, f"no json {i}") for i in range(1000)]
    records = [Record(f"s{i}", "done", rejections=names) for i in range(5)]
    path.write_bytes(b"".join(map(encode, records)))
    assert path.stat().st_size > 4 << 20
    assert list(read_records(path)) == records


@pytest.mark.parametrize(
    "junk",
    [
        None,
        7,
        "text",
        ["shard", "state"],
        {"shard": "x"},
        {"shard": 1, "state": "done"},
        {"shard": "x", "state": "done", "rejections": 3},
        {"shard": "x", "state": "done", "rejections": [["k"]]},
        {"shard": "x", "state": "done", "rejections": [["k", 3]]},
        {"shard": "x", "state": "done", "host": 5},
        {"shard": "x", "state": "failed", "finished": "soon"},
    ],
)
def test_what_is_no_record_costs_the_manifest_no_other(junk: Any) -> None:
    good = record("s", "done", 1.0).to_dict()
    assert Manifest.of([good, junk, good]) == Manifest.of([good])


def test_a_record_is_held_without_what_its_samples_are_called() -> None:
    rejections = [Rejection(f"key{i}", f"no json: byte {i}; see {i}") for i in range(100)]
    held = of([Record("s", "done", 5, rejections, traceback="long")]).done["s"]
    assert held.rejected == (("no json", 100),)
    assert "key1" not in str(held)
    assert "long" not in str(held)


def test_what_a_newer_version_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    line = {"shard": "s", "state": "done", "rows": 2, "colour": "red"}
    path.write_text(json.dumps({**line, "rejections": [["k", "why", "more"]]}) + "\n")
    assert list(read_records(path)) == [Record("s", "done", 2, [Rejection("k", "why")])]


def test_a_state_that_is_not_known_is_not_taken_for_done() -> None:
    manifest = of([record("s", "parked", 1.0)])  # type: ignore[arg-type]
    assert manifest == Manifest()


def test_the_manifest_is_the_union_of_all_files(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert Manifest.load(run) == Manifest()
    run.create()
    a, b, c = record("a", "done", 1), record("b", "failed", 2), record(STEM, "done", 3)
    for i, made in enumerate([a, b, c]):
        Recorder(run.record("000", i, 0)).append(made)
    (run.records / "notes.txt").write_text("no records")
    expected = Manifest({"a": outcome(a), STEM: outcome(c)}, {"b": [outcome(b)]})
    assert Manifest.load(run) == expected


def test_the_newest_done_record_counts_in_whatever_order_they_are_read() -> None:
    old, new = record("s", "done", 1, rows=1), record("s", "done", 2, rows=2)
    assert of([old, new]).done == of([new, old]).done == {"s": outcome(new)}


def test_the_record_of_the_models_is_kept_whatever_was_derived_since() -> None:
    """A shard that is computed, derived, extended and derived again, its lines in any order."""
    prints = ("a", "a+1", "b", "b+1", "b+2")
    made = [
        record("s", "done", n, fingerprint=p, attempt=n, rows=n) for n, p in enumerate(prints, 1)
    ]
    for count, last in ((1, 1), (2, 1), (3, 3), (5, 3)):
        for records in permutations(made[:count]):
            manifest = of([*records])
            assert manifest.done == {"s": outcome(made[count - 1])}
            assert manifest.computed(manifest.done) == {"s": outcome(made[last - 1])}


def test_the_shards_own_attempts_tell_what_is_later_and_not_the_clocks_of_nodes() -> None:
    """The second node's clock is a day slow; the third one's an hour fast."""
    first = record("s", "failed", 90_000.0, attempt=1, task="000-0-0")
    second = record("s", "done", 3_600.0, attempt=2, task="001-4-0")
    third = record("s", "failed", 99_000.0, attempt=3, task="001-2-0")
    for records in ([first, second], [second, first]):
        assert of(records) == Manifest({"s": outcome(second)})
    for records in ([first, third, second], [third, second, first]):
        assert of(records) == Manifest({"s": outcome(second)}, {"s": [outcome(third)]})
    assert (
        of([second, replace(second, attempt=3, task="010-0-0", finished=1.0)]).done["s"].attempt
        == 3
    )


def test_records_without_attempts_are_told_apart_by_submission_and_are_older() -> None:
    old = record("s", "done", 500.0, task="002-0-0", rows=1)
    slow = record("s", "done", 20.0, task="010-0-0", rows=2)
    assert of([slow, old]).done["s"].rows == 2
    counted = record("s", "done", 10.0, task="003-0-0", attempt=1, rows=3)
    assert of([counted, slow, old]).done["s"].rows == 3
    rebuilt = record("s", "done", 20.0, task="rebuilt")
    assert of([rebuilt, old]).done["s"].rows == 1


def test_an_attempt_that_is_done_was_not_lost_with_its_process() -> None:
    """Killed between the rename and the record, it is read back after it was counted as died."""
    died = record("s", "failed", 9.0, attempt=2, task="000-0-0")
    done = record("s", "done", 5.0, attempt=2, task="000-0-0")
    assert of([died, done]).failures == of([done, died]).failures == {}


def test_a_later_success_settles_failures() -> None:
    records = [record("s", "failed", 1), record("s", "failed", 2), record("s", "done", 3)]
    for order in (records, records[::-1]):
        assert of(order).failures == {}


def test_failures_since_the_last_success_stay_oldest_first() -> None:
    early, late, later = (record("s", "failed", t) for t in (1, 3, 4))
    manifest = of([later, early, record("s", "done", 2), late])
    assert manifest.failures == {"s": [outcome(late), outcome(later)]}


@given(
    st.lists(
        st.builds(
            record,
            st.sampled_from("ab"),
            st.sampled_from(["done", "failed"]),
            st.integers(0, 99),
        ),
        max_size=8,
        unique_by=lambda r: r.finished,
    )
)
def test_the_state_does_not_depend_on_which_file_is_read_first(records: list[Record]) -> None:
    assert of(records) == of(records[::-1])


def test_records_files_are_not_world_writable(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        Recorder(tmp_path / "r.jsonl").append(FULL)
    finally:
        os.umask(old)
    assert (tmp_path / "r.jsonl").stat().st_mode & 0o777 == 0o664
