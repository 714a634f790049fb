"""The subset of a run's samples, against what DataComp's own way gives."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3
from pools import CLIP, finish, make_run, subset, table, uid

from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.run.folder import RunDir
from d2m_hpc.subsets import samples as pools
from d2m_hpc.subsets.finished import table as table_of
from d2m_hpc.subsets.select import Query, Selection, quota, select

SCORES = [0.1, 0.3, 0.25, 0.4, 0.3]


def _select(folder: Path, shards: dict[str, Any], query: Query, **config: Any) -> Selection:
    """Of a run made of these shards, into `folder/subset.npy`."""
    return select(*make_run(folder, shards, **config), query, folder / "subset.npy")


def _bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_a_subset_is_the_file_that_datacomps_way_makes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shards, best = {}, []
    for shard in range(5):
        names = [uid(shard * 1000 + i) for i in range(1000)]
        scores = rng.random(1000, dtype=np.float32)
        shards[f"{shard:08d}"] = table(names, scores.tolist())
        best += [u for u, score in zip(names, scores, strict=True) if score >= 0.28]
    found = _select(tmp_path, shards, Query(f"{CLIP} >= 0.28"))
    assert found == Selection(5000, 0, len(best), 0, 0, len(best))
    assert (tmp_path / "subset.npy").read_bytes() == _bytes(subset(best))


@pytest.mark.parametrize("extreme", ["0" * 32, "f" * 32, "8" + "0" * 31, "0" * 16 + "f" * 16])
def test_all_128_bits_are_told_apart(tmp_path: Path, extreme: str) -> None:
    names = [extreme, uid(1), uid(2)]
    _select(tmp_path, {"a": table(names, [0.5] * 3)}, Query())
    assert np.array_equal(np.load(tmp_path / "subset.npy"), subset(names))


def test_columns_that_differ_in_capitals_alone_are_told(tmp_path: Path) -> None:
    """duckdb calls the second one `url_1`: a condition on it found no row, without a word."""
    rows = table([uid(i) for i in range(3)], SCORES[:3], URL=["A", "B", "C"], url=["a", "b", "c"])
    found = _select(tmp_path, {"a": rows}, Query("url_1 = 'b'"))
    assert np.array_equal(np.load(tmp_path / "subset.npy"), subset([uid(1)]))
    assert found.notices == (
        "the column 'url' is 'url_1' here: in conditions, names that differ in capital letters "
        "alone are one",
    )
    one = table([uid(i) for i in range(3)], SCORES[:3], URL=["A", "B", "C"], url_1=["a", "b", "c"])
    assert _select(tmp_path / "one", {"a": one}, Query("url_1 = 'b'")).notices == ()


@pytest.mark.parametrize("name", ["file_row_number", "File_Row_Number", "d2m_file", "d2m_high"])
def test_columns_of_names_that_the_reader_needs_are_named(tmp_path: Path, name: str) -> None:
    rows = table([uid(i) for i in range(3)], SCORES[:3], **{name: [1, 2, 3]})
    with pytest.raises(ConfigError, match=rf"the run's column '{name}' is a name that duckdb"):
        _select(tmp_path, {"a": rows}, Query())


@pytest.mark.parametrize("name", ["filename", "file_index", "Shard", "place", "file", "passes"])
def test_columns_of_other_names_of_the_reader_are_columns(tmp_path: Path, name: str) -> None:
    rows = table([uid(i) for i in range(3)], SCORES[:3], **{name: [1, 2, 3]})
    run, config = make_run(tmp_path, {"a": rows})
    if name == "filename" and duckdb.__version__.startswith("1."):
        with pytest.raises(ConfigError, match=r"'filename' is a name .* duckdb 2.0 here"):
            select(run, config, Query(f"{name} = 2"), tmp_path / "x.parquet")
        return
    select(run, config, Query(f"{name} = 2"), tmp_path / "x.parquet", columns=[name])
    assert pq.read_table(tmp_path / "x.parquet").to_pydict() == {name: [2]}


def test_a_column_shard_in_capitals_stands_for_no_shard_s_name(tmp_path: Path) -> None:
    """Samples of one key in several shards were taken for one."""
    rows = table([uid(0), uid(1)], SCORES[:2], Shard=["x", "x"]).drop(["uid"])
    run, config = make_run(tmp_path, {"a": rows, "b": rows})
    with pytest.raises(ConfigError, match="or leave `Shard` out there"):
        select(run, config, Query(), tmp_path / "x.jsonl")


def test_a_joined_column_that_differs_in_capitals_alone_is_refused(tmp_path: Path) -> None:
    rows = table([uid(0)], SCORES[:1], url=["a"])
    pq.write_table(pa.table({"uid": [uid(0)], "URL": ["b"]}), tmp_path / "j.parquet")
    with pytest.raises(ConfigError, match="has columns that the run has, too: URL"):
        _select(tmp_path, {"a": rows}, Query(join=tmp_path / "j.parquet"))


def test_conditions_are_sql_over_all_columns(tmp_path: Path) -> None:
    rows = table([uid(i) for i in range(5)], SCORES, original_width=[500, 100, 500, 500, 500])
    query = Query(f"{CLIP} >= 0.28 and original_width between 200 and 600 -- small ones vanish")
    assert _select(tmp_path, {"a": rows}, query).chosen == 2
    assert np.array_equal(np.load(tmp_path / "subset.npy"), subset([uid(3), uid(4)]))


@pytest.mark.parametrize(
    ("top", "numbers"),
    [(0.4, [1, 3]), (1.0, range(5)), (2, [1, 3]), (3, [1, 3, 4]), (99, range(5))],
)
def test_top_takes_a_share_or_a_number_and_ties_by_uid(
    tmp_path: Path, top: float, numbers: list[int]
) -> None:
    """The two scores of 0.3 are 1's and 4's; in the order of uids 1 stands first."""
    assert uid(1) < uid(4)
    halves = {
        "a": table([uid(i) for i in (4, 0)], [SCORES[i] for i in (4, 0)]),
        "b": table([uid(i) for i in (3, 1, 2)], [SCORES[i] for i in (3, 1, 2)]),
    }
    found = _select(tmp_path, halves, Query(by=CLIP, top=top))
    assert found.chosen == len(numbers)
    assert np.array_equal(np.load(tmp_path / "subset.npy"), subset([uid(i) for i in numbers]))


def test_a_share_is_of_what_the_condition_leaves(tmp_path: Path) -> None:
    rows = table([uid(i) for i in range(5)], SCORES)
    assert _select(tmp_path, {"a": rows}, Query(f"{CLIP} < 0.35", CLIP, 0.5)).chosen == 2


@pytest.mark.parametrize(("top", "count"), [(0.29, 29), (0.57, 57), (0.001, 0), (1.0, 100)])
def test_a_share_is_of_the_decimal_number(top: float, count: int) -> None:
    assert quota(top, 100) == count


def test_missing_values_and_nan_fail_and_are_counted(tmp_path: Path) -> None:
    """duckdb alone has NaN greater than every number."""
    rows = table([uid(i) for i in range(4)], [math.nan, None, 0.5, 0.1])
    found = _select(tmp_path, {"a": rows}, Query(f"{CLIP} >= 0.28"))
    assert found == Selection(4, 2, 1, 0, 0, 1)
    assert np.array_equal(np.load(tmp_path / "subset.npy"), subset([uid(2)]))


def test_what_cannot_be_ranked_is_not_chosen(tmp_path: Path) -> None:
    rows = table([uid(i) for i in range(4)], [math.nan, None, 0.5, 0.1])
    found = _select(tmp_path, {"a": rows}, Query(by=CLIP, top=1.0))
    assert found == Selection(4, 2, 2, 0, 0, 2)


def test_large_integers_are_ranked_as_they_are(tmp_path: Path) -> None:
    """As floats, these were all alike, and the lowest uids were taken."""
    times = [2**60 + i for i in (0, 3, 1, 2)]
    rows = table([f"{i:032x}" for i in range(4)], [0.5] * 4, time=times)
    run = make_run(tmp_path, {"a": rows, "b": rows.slice(0, 0)})
    out = tmp_path / "newest.parquet"
    assert select(*run, Query(by="time", top=2), out, columns=["time"]).chosen == 2
    assert pq.read_table(out)["time"].to_pylist() == [2**60 + 3, 2**60 + 2]
    assert select(*run, Query(by="time"), None).survival == ((float(f"{2**60:.3g}"), 4, 1.0),)


def test_a_uid_is_in_the_subset_once_and_counts_by_its_best_row(tmp_path: Path) -> None:
    shards = {
        "a": table([uid(0), uid(1), uid(1)], [0.1, 0.2, 0.9]),
        "b": table([uid(0), uid(2)], [0.8, 0.3]),
    }
    found = _select(tmp_path, shards, Query(by=CLIP, top=2))
    assert found == Selection(5, 0, 5, 0, 2, 2)
    assert np.array_equal(np.load(tmp_path / "subset.npy"), subset([uid(0), uid(1)]))


def test_uids_of_another_spelling_are_read_and_unusable_ones_counted(tmp_path: Path) -> None:
    """As they stand in parquets without DataComp's names."""
    rows = table(["AB", uid(1), None, "", "x", "0" * 33], [0.5] * 6)
    found = _select(tmp_path, {"a": rows}, Query())
    assert found == Selection(6, 0, 6, 4, 0, 2)
    assert np.array_equal(np.load(tmp_path / "subset.npy"), subset(["ab".zfill(32), uid(1)]))


def test_only_finished_shards_of_the_run_are_read(tmp_path: Path) -> None:
    run, config = make_run(tmp_path, {"a": table([uid(0)], [0.5]), "b": None})
    other = RunDir(tmp_path / "other")
    other.create()
    for stem in ("b", "foreign"):
        finish(other, str(tmp_path / "out"), stem, table([uid(1)], [0.5]))
    found = select(run, config, Query(), tmp_path / "subset.npy")
    assert (found.rows, found.unfinished) == (1, 1)
    assert np.array_equal(np.load(tmp_path / "subset.npy"), subset([uid(0)]))


def test_shards_that_lack_what_the_last_submit_asked_for_are_not_read(tmp_path: Path) -> None:
    run, config = make_run(tmp_path, {"a": table([uid(0)], [0.5]), "b": None})
    finish(run, str(tmp_path / "out"), "b", table([uid(1)], [0.5]), of="an earlier submit's")
    found = select(run, config, Query(), tmp_path / "subset.npy")
    assert (found.rows, found.unfinished) == (1, 1)


def test_shards_may_differ_in_types_and_columns(tmp_path: Path) -> None:
    """A field that a shard has no value of is text there; an older shard may lack a column."""
    old = table([uid(0)], [0.5]).drop_columns(["original_width"])
    void = table([uid(1)], [0.5], original_width=pa.array([None], pa.string()))
    empty = table([], []).drop_columns(["original_width"])
    new = table([uid(2)], [0.5], original_width=[500])
    shards = {"a": old, "b": void, "c": new, "d": empty}
    assert _select(tmp_path, shards, Query("original_width > 200")) == Selection(3, 2, 1, 0, 0, 1)


def _widths(folder: Path, group: int, *columns: pa.Array, by: str = "") -> Selection:
    """What `original_width > 5` chooses of shards with these columns, read so many at once."""
    shards = {
        f"{i}": table([uid(10 * i + j) for j in range(len(c))], [0.5] * len(c), original_width=c)
        for i, c in enumerate(columns)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "GROUP", group)
        return _select(folder, shards, Query("original_width > 5", by, 1.0 if by else 0.0))


@pytest.mark.parametrize("group", [1, 2, 256])
@pytest.mark.parametrize("last", [0, 1])
def test_the_widest_type_decides_and_not_the_newest_shards(
    tmp_path: Path, group: int, last: int
) -> None:
    """5.4 is more than 5; cast to the integers of the other shard it is not."""
    columns = [pa.array([5.4, 4.9, None]), pa.array([5, 6], pa.int64())]
    found = _widths(tmp_path, group, *(columns if last else columns[::-1]))
    assert (found.passed, found.chosen, found.undecided, found.notices) == (2, 2, 1, ())


def test_float32_and_large_integers_meet_in_float64(tmp_path: Path) -> None:
    numbers = [pa.array([5.5], pa.float32()), pa.array([2**24 + 1, 5], pa.int32())]
    assert _widths(tmp_path, 1, *numbers).passed == 2
    chosen = _select_by(tmp_path / "again", "original_width = 16777217", numbers)
    assert chosen.passed == 1


def _select_by(folder: Path, where: str, columns: list[pa.Array]) -> Selection:
    folder.mkdir()
    rows = {f"{i}": table([uid(i)], [0.5], original_width=c[:1]) for i, c in enumerate(columns)}
    return _select(folder, rows, Query(where))


@pytest.mark.parametrize("group", [1, 256])
def test_integers_that_a_cast_rounds_are_told(tmp_path: Path, group: int) -> None:
    columns = [pa.array([2**60 + 1, 7, None], pa.int64()), pa.array([0.5])]
    found = _widths(tmp_path, group, *columns)
    [notice] = found.notices
    assert "1 integers of 'original_width' are beyond 2**53 and were rounded" in notice
    assert found.passed == 2


def test_numbers_that_are_text_elsewhere_are_told(tmp_path: Path) -> None:
    columns = [pa.array(["n/a", "7"]), pa.array([6, 3], pa.int64()), pa.array([], pa.int64())]
    with pytest.raises(ConfigError, match="VARCHAR"):
        _widths(tmp_path, 2, *columns)
    query = Query("TRY_CAST(original_width AS DOUBLE) > 5")
    shards = {
        f"{i}": table([uid(10 * i), uid(10 * i + 1)], [0.5] * 2, original_width=c)
        for i, c in enumerate(columns[:2])
    }
    (tmp_path / "again").mkdir()
    found = _select(tmp_path / "again", shards, query)
    assert (found.passed, found.undecided) == (2, 1)
    [notice] = found.notices
    assert notice == (
        "'original_width' is text in some shards and bigint in others; conditions see it as text"
    )


@pytest.mark.parametrize("folder", ["out[1]", "o?t", "*", "[a-z]", "o[[]1]"])
@pytest.mark.parametrize("remote", [False, True])
def test_names_are_no_patterns(tmp_path: Path, folder: str, remote: bool) -> None:
    """Each of these shards' names, taken for a pattern, matches the others' or nothing."""
    names = ["?", "a", "*", "[ab]", "b", "part[1]", "part1"]
    shards = {name: table([uid(i)], [0.5]) for i, name in enumerate(names)}
    root = f"memory://{tmp_path.name}" if remote else str(tmp_path)
    if not remote:
        (tmp_path / folder).mkdir()
    run, config = make_run(tmp_path, shards, url=f"{root}/{folder}")
    try:
        found = select(run, config, Query(), tmp_path / "subset.npy")
    finally:
        if remote:
            fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
    assert (found.rows, found.passed, found.repeated, found.chosen) == (7, 7, 0, 7)


def test_shards_are_read_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "GROUP", 2)
    shards = {f"{i}": table([uid(i)], [0.5]) for i in range(5)}
    told: list[tuple[int, int]] = []
    run, config = make_run(tmp_path, shards)
    found = select(run, config, Query(), tmp_path / "s.npy", lambda *n: told.append(n))
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert found.chosen == 5


def test_outputs_may_be_on_a_store(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/out"
    rows = table([uid(i) for i in range(5)], SCORES)
    try:
        assert _select(tmp_path, {"a": rows}, Query(by=CLIP, top=2), url=url).chosen == 2
    finally:
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_outputs_may_be_on_s3(tmp_path: Path, bucket: s3.Server) -> None:
    rows = table([uid(i) for i in range(5)], SCORES)
    url = f"s3://bucket/{tmp_path.name}"
    assert _select(tmp_path, {"a": rows, "b": None}, Query(by=CLIP, top=2), url=url).chosen == 2


def test_odd_names_of_files_and_columns(tmp_path: Path) -> None:
    column = 'my "score", 100%'
    rows = table([uid(0), uid(1)], [0.5, 0.6], **{column: [1.0, 2.0]})
    query = Query('"my ""score"", 100%" > 1', by=column, top=1.0)
    assert _select(tmp_path, {"it's [ä]": rows}, query).chosen == 1


def test_nothing_chosen_leaves_an_older_file_alone(tmp_path: Path) -> None:
    (tmp_path / "subset.npy").write_bytes(b"older")
    assert _select(tmp_path, {"a": table([uid(0)], [0.5])}, Query(f"{CLIP} > 1")).chosen == 0
    assert (tmp_path / "subset.npy").read_bytes() == b"older"


# --- mistakes ---


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (Query("clip_l14_similarity >= 0.28"), f"unknown column .*did you mean '{CLIP}'"),
        (Query("original_width >="), "--where.*original_width >=.*syntax error"),
        (Query("1 = 1); DROP TABLE kept; SELECT (1"), "--where.*Parser Error"),
        (Query("true; SELECT 1"), "--where.*Parser Error"),
        (Query("key > 3"), "--where.*VARCHAR"),
        (Query("count(*) > 1"), "--where.*aggregates"),
        (Query("regexp_matches(key, '[')"), "--where.*missing \\]"),
        (Query("('x' || key)::INTEGER = 1"), "--where.*Conversion Error"),
        (Query("(SELECT count(*) FROM read_csv('/etc/passwd')) > 0"), "--where.*Permission"),
        (
            Query("(SELECT count(*) FROM '/x.parquet') > 0"),
            "--where.*the run's columns alone.*--join",
        ),
        (
            Query("random() < 0.5"),
            r"--where: .*random\(\) gives another value each .*; --sample draw",
        ),
        (Query("original_width > epoch(now())"), r"--where: .*now\(\) gives another value each"),
        (Query(by="clip", top=0.3), f"--by: found 'clip', no column of numbers.*{CLIP}"),
        (Query(by="key", top=0.3), "--by: found 'key', no column of numbers"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_a_line(
    tmp_path: Path, query: Query, says: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        _select(tmp_path, {"a": table([uid(0)], [0.5])}, query)
    assert len(raised.value.mistakes) == 1
    assert re.search(says, raised.value.mistakes[0])
    assert "\n" not in raised.value.mistakes[0]
    assert not (tmp_path / "subset.npy").exists()


def _named(scores: dict[str, list[float]], **more: Any) -> dict[str, pa.Table]:
    """Shards without uids, whose keys are the same in all of them."""
    return {
        stem: pa.table({"key": [str(i) for i in range(len(some))], CLIP: some, **more})
        for stem, some in scores.items()
    }


def test_samples_without_uids_are_told_by_shard_and_key(tmp_path: Path) -> None:
    """As those of folders of pictures; a user's file of them is joined likewise."""
    shards = _named({"cats.1": [0.1, 0.9, 0.5], "dogs [2]": [0.8, 0.2]})
    run, config = make_run(tmp_path, shards)
    with pytest.raises(ConfigError, match=r"an .npy is of uids, .* valid are .parquet and .jsonl"):
        select(run, config, Query(), tmp_path / "kept.npy")
    best = Query(by=CLIP, top=3)
    found = select(run, config, best, tmp_path / "kept.jsonl")
    assert (found.chosen, found.without_uid, found.repeated) == (3, 0, 0)
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert sorted(map(str, lines)) == [
        str({"shard": "cats.1", "keys": ["1", "2"]}),
        str({"shard": "dogs [2]", "keys": ["0"]}),
    ]
    select(run, config, best, tmp_path / "kept.parquet")
    kept = pq.read_table(tmp_path / "kept.parquet")
    assert sorted(zip(*kept.to_pydict().values(), strict=True)) == [
        *(("cats.1", "1"), ("cats.1", "2"), ("dogs [2]", "0"))
    ]
    pq.write_table(kept.append_column("mine", [[True] * 3]), tmp_path / "mine.parquet")
    rest = Query("mine IS NULL AND shard = 'cats.1'", join=tmp_path / "mine.parquet")
    select(run, config, rest, tmp_path / "rest.parquet", columns=["key"])
    assert pq.read_table(tmp_path / "rest.parquet").to_pydict() == {"key": ["0"]}
    read = table_of(run, config, ["shard", "key"]).to_pydict()
    assert read == {"shard": ["cats.1"] * 3 + ["dogs [2]"] * 2, "key": ["0", "1", "2", "0", "1"]}


def test_what_is_joined_to_samples_without_uids_names_shard_and_key(tmp_path: Path) -> None:
    run, config = make_run(tmp_path, _named({"a": [0.1]}))
    pq.write_table(pa.table({"uid": ["0"], "mine": [1]}), tmp_path / "mine.parquet")
    np.save(tmp_path / "mine.npy", subset([uid(1)]))
    for name, says in (
        ("mine.parquet", "no columns `shard` and `key`"),
        ("mine.npy", "the run has none"),
    ):
        with pytest.raises(ConfigError, match=says):
            select(run, config, Query(join=tmp_path / name), tmp_path / "kept.jsonl")


@pytest.mark.parametrize("names", [{"uid": pa.array([1])}, {"shard": ["mine"]}])
def test_a_run_whose_samples_nothing_tells_apart_has_no_subset(
    tmp_path: Path, names: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="name `uid` in additional_fields"):
        _select(tmp_path, _named({"a": [0.5]}, **names), Query(), additional_fields=[*names])


def test_a_run_without_finished_shards_has_no_subset(tmp_path: Path) -> None:
    with pytest.raises(D2MError, match="no finished shard has rows; `d2m status` says"):
        _select(tmp_path, {"a": None, "b": table([], [])}, Query())


def test_a_finished_run_without_rows_has_no_subset(tmp_path: Path) -> None:
    told = "all shards are finished, and none has a row; `d2m status` says what was rejected"
    with pytest.raises(D2MError, match=told):
        _select(tmp_path, {"a": table([], [])}, Query())


def test_a_damaged_parquet_is_not_the_conditions_fault(tmp_path: Path) -> None:
    run, config = make_run(tmp_path, {s: table([uid(0)], [0.5]) for s in "ab"})
    (tmp_path / "out" / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(D2MError, match=r"out cannot be read: .*a\.parquet.*`d2m verify`") as raised:
        select(run, config, Query(), tmp_path / "subset.npy")
    assert not isinstance(raised.value, ConfigError)
    (tmp_path / "out" / "a.parquet").unlink()
    with pytest.raises(
        D2MError,
        match=r"out: outputs of 1 finished shard are missing \(a\); see `d2m verify`",
    ):
        select(run, config, Query(), tmp_path / "subset.npy")


# --- by group, at random, with columns of one's own ---

LANGUAGES = ["en", "de", "en", "fr", "en", "de", None, "en"]
OF_EIGHT = [0.1, 0.9, 0.3, 0.5, 0.2, 0.8, 0.99, 0.4]


def _eight(folder: Path, query: Query) -> list[str]:
    """The uids that are chosen of eight samples in two shards, as the place of each."""
    names = [uid(i) for i in range(8)]
    rows = table(names, OF_EIGHT, language=LANGUAGES, weight=[1.0, 0, 1, 5, 1, 1, 1, 1])
    _select(folder, {"a": rows.slice(0, 3), "b": rows.slice(3)}, query)
    chosen = np.load(folder / "subset.npy")
    return sorted(names.index(f"{high:016x}{low:016x}") for high, low in chosen.tolist())


@pytest.mark.parametrize(
    ("top", "best"),
    [(0.5, [1, 2, 7]), (1.0, [0, 1, 2, 3, 4, 5, 7]), (2, [1, 2, 3, 5, 7]), (0.75, [1, 2, 4, 7])],
)
def test_the_best_of_each_group(tmp_path: Path, top: float, best: list[int]) -> None:
    """Of four texts in English, two in German and one in French; one has no language."""
    assert _eight(tmp_path, Query(by=CLIP, top=top, within="language")) == best


def test_a_draw_is_decided_by_its_seed_and_not_by_the_shards(tmp_path: Path) -> None:
    names = [uid(i) for i in range(1000)]
    rows = table(names, [0.5] * 1000)
    drawn = []
    for number, (size, seed) in enumerate(((1000, 1), (100, 1), (1000, 2))):
        (folder := tmp_path / str(number)).mkdir()
        shards = {f"{i:04d}": rows.slice(i, size) for i in range(0, 1000, size)}
        assert _select(folder, shards, Query(sample=0.3, seed=seed)).chosen == 300
        drawn.append({*map(tuple, np.load(folder / "subset.npy").tolist())})
    assert drawn[0] == drawn[1] != drawn[2]
    assert 50 < len(drawn[0] & drawn[2]) < 130  # 90 by chance
    rank = {pair: i for i, pair in enumerate(map(tuple, subset(names).tolist()))}
    assert 400 < np.mean([rank[pair] for pair in drawn[0]]) < 600


def test_a_draw_of_each_group_and_of_the_best(tmp_path: Path) -> None:
    drawn = _eight(tmp_path, Query(sample=0.5, within="language"))
    assert sorted(str(LANGUAGES[i]) for i in drawn) == ["de", "en", "en"]
    (tmp_path / "b").mkdir()
    two = _eight(tmp_path / "b", Query(by=CLIP, top=4, sample=2))
    assert len(two) == 2
    assert {*two} < {6, 1, 5, 3}


def test_weights_decide_how_often_a_sample_is_drawn(tmp_path: Path) -> None:
    """Against the chance of the first draw: five of ten; without a weight never."""
    rows = table([uid(i) for i in range(6)], [0.5] * 6, weight=[5.0, 1, 1, 1, 2, 0])
    run, first = make_run(tmp_path, {"a": rows}), []
    every = select(*run, Query(sample=1.0, weight="weight"), tmp_path / "all.npy")
    assert every.chosen == 5
    assert every.notices == ("1 sample has a 'weight' of 0 or less; never drawn",)
    more = select(*run, Query(sample=600, weight="weight"), tmp_path / "all.npy")
    fewer = "fewer than 600 are chosen, as no more samples are left to choose"
    assert (more.chosen, more.notices) == (5, (*every.notices, fewer))
    for seed in range(60):
        select(*run, Query(sample=0.2, weight="weight", seed=seed), tmp_path / "one.npy")
        first += np.load(tmp_path / "one.npy").tolist()
    assert len(first) == 60
    assert 15 < first.count(subset([uid(0)]).tolist()[0]) < 45  # four standard deviations
    assert subset([uid(5)]).tolist()[0] not in first


def test_a_user_s_parquet_is_joined_by_uid(tmp_path: Path) -> None:
    rows = {"a": table([uid(0), uid(1)], [0.5, 0.6]), "b": table([uid(2)], [0.7])}
    mine = tmp_path / "mine.parquet"
    own = pa.table(
        {"uid": [uid(2).upper(), uid(0), "x"], "cluster": [7, 8, 9], "good": [1.0, 2, 3]}
    )
    pq.write_table(own, mine)
    run = make_run(tmp_path, rows)
    found = select(*run, Query("cluster = 7 or good > 1", join=mine), tmp_path / "subset.npy")
    assert (found.chosen, found.undecided) == (2, 1)
    best = Query(by="good", top=1.0, join=mine)
    out = tmp_path / "best.parquet"
    columns = ["uid", "cluster", CLIP]
    assert select(*run, best, out, columns=columns).chosen == 2
    assert pq.read_table(out).sort_by("cluster").to_pylist() == [
        {"uid": uid(2), "cluster": 7, CLIP: pytest.approx(0.7)},
        {"uid": uid(0), "cluster": 8, CLIP: 0.5},
    ]


def test_a_joined_nan_is_a_missing_value(tmp_path: Path) -> None:
    """It was above all numbers, and so the best."""
    mine = tmp_path / "mine.parquet"
    own = {"uid": [uid(i) for i in range(3)], "good": pa.array([math.nan, 0.5, 0.1], pa.float32())}
    pq.write_table(pa.table({**own, "same": [1, 2, 3]}), mine)
    run = make_run(tmp_path, {"a": table([uid(i) for i in range(3)], [0.5] * 3)})
    best, out = Query(by="good", top=2, join=mine), tmp_path / "best.parquet"
    found = select(*run, best, out, columns=["uid", "same"])
    assert (found.undecided, found.passed, found.chosen) == (1, 2, 2)
    assert pq.read_table(out)["same"].to_pylist() == [2, 3]
    assert select(*run, Query("good > 0", join=mine), out).undecided == 1


@pytest.mark.parametrize("whose", ["theirs", "the run's"])
def test_columns_of_any_name_are_joined(tmp_path: Path, whose: str) -> None:
    """`high` and `low` once were what samples are told apart by: nothing was joined."""
    more = {"high": [5, 6], "low": [7, 8]}
    rows = table([uid(0), uid(1)], [0.5, 0.6], **(more if whose == "the run's" else {}))
    mine = pa.table({"uid": [uid(1), uid(0)], "mine": [1, 0]})
    if whose == "theirs":
        mine = mine.append_column("high", [[6, 5]]).append_column("low", [[8, 7]])
    pq.write_table(mine, tmp_path / "mine.parquet")
    query = Query("mine = 1 AND high = 6", join=tmp_path / "mine.parquet")
    run, out = make_run(tmp_path, {"a": rows}), tmp_path / "out.parquet"
    assert select(*run, query, out, columns=["uid", "mine", "high", "low"]).chosen == 1
    assert pq.read_table(out).to_pylist() == [{"uid": uid(1), "mine": 1, "high": 6, "low": 8}]


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"key": ["a"]}, "mine.parquet has no column `uid` of texts"),
        ({"uid": [1]}, "mine.parquet has no column `uid` of texts"),
        ({"uid": [uid(0), uid(0).upper()]}, "has 1 row with the uid of another row"),
        ({"uid": [uid(0)], "key": ["a"]}, "has columns that the run has, too: key"),
        (None, "mine.parquet is not there; check the path"),
    ],
)
def test_what_cannot_be_joined_is_told(tmp_path: Path, made: Any, says: str) -> None:
    mine = tmp_path / "mine.parquet"
    if made:
        pq.write_table(pa.table(made), mine)
    with pytest.raises(ConfigError) as raised:
        _select(tmp_path, {"a": table([uid(0)], [0.5])}, Query(join=mine))
    assert says in str(raised.value)


def test_what_a_threshold_keeps(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0.28, 0.1, 3000).astype(np.float32)
    shards = {"a": table([uid(i) for i in range(3000)], scores.tolist())}
    run = make_run(tmp_path, shards)
    found = select(*run, Query("true", CLIP), None)
    assert (found.chosen, len(found.survival)) == (0, 13)
    for threshold, kept, share in found.survival:
        assert kept == (scores.astype(float) >= threshold).sum()
        assert share == kept / 3000
    assert [f"{share:.1f}" for _, _, share in found.survival[2:11]] == [
        f"0.{i}" for i in range(9, 0, -1)
    ]


def test_an_infinite_score_is_a_threshold(tmp_path: Path) -> None:
    scores = [-math.inf, 0.5, math.inf, math.inf]
    run = make_run(tmp_path, {"a": table([uid(i) for i in range(4)], scores)})
    found = select(*run, Query("true", CLIP), None)
    assert found.survival == ((-math.inf, 4, 1.0), (0.5, 3, 0.75), (math.inf, 2, 0.5))


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (Query(within="key"), "--within: found neither --top nor --sample"),
        (Query(weight=CLIP), "--weight: found no --sample"),
        (Query(seed=0), "--seed: found no --sample"),
        (Query(seed=1, by=CLIP, top=0.5), "--seed: found no --sample"),
        (Query(sample=-1), "--sample: found -1; valid is a share"),
        (Query(sample=2, within="langage"), "--within: found 'langage', no column"),
        (Query(sample=2, weight="key"), "--weight: found 'key', no column of numbers"),
    ],
)
def test_mistakes_in_groups_and_draws(tmp_path: Path, query: Query, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        _select(tmp_path, {"a": table([uid(0)], [0.5])}, query)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("query", "told"),
    [
        (Query(by=CLIP, top=0.5), "--top: found no --output"),
        (Query(by=CLIP, sample=2), "--sample: found no --output"),
        (Query(by=CLIP, top=2, sample=1.0), "--top and --sample: found no --output"),
    ],
)
def test_what_would_choose_without_a_file_is_told(tmp_path: Path, query: Query, told: str) -> None:
    run = make_run(tmp_path, {"a": table([uid(0), uid(1)], [0.5, 0.6])})
    with pytest.raises(ConfigError, match=f"{told}; valid are both, .* --look, or --by alone"):
        select(*run, query, None)
    shown = []
    found = select(*run, query, None, look=lambda pool, query, found: shown.append(found.chosen))
    assert (shown, found.survival) == ([found.chosen], ())
    assert found.chosen


@pytest.mark.parametrize("name", ["kept.npy", "kept.jsonl", None])
def test_columns_are_of_a_parquet(tmp_path: Path, name: str | None) -> None:
    run = make_run(tmp_path, {"a": table([uid(0)], [0.5])})
    with pytest.raises(ConfigError, match=r"--column: found no name in \.parquet for --output"):
        select(*run, Query(by=CLIP), tmp_path / name if name else None, columns=["uid"])


def test_a_parquet_has_each_uid_once(tmp_path: Path) -> None:
    shards = {
        "a": table([uid(0), uid(1), uid(1)], [0.1, 0.2, 0.9], caption=["a", "b", "c"]),
        "b": table([uid(0), uid(2)], [0.8, 0.3], caption=["d", None]),
    }
    out = tmp_path / "kept.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "GROUP", 1)
        run = make_run(tmp_path, shards)
        assert select(*run, Query(), out, columns=["uid", "caption"]).chosen == 3
    found = pq.read_table(out)
    assert found.column_names == ["uid", "caption"]
    assert sorted(found["uid"].to_pylist()) == sorted(map(uid, range(3)))
    with pytest.raises(ConfigError, match=r"--column: found 'captoin', no column.*'caption'"):
        select(*run, Query(), out, columns=["captoin"])


def test_of_several_rows_with_a_uid_the_one_is_written_that_was_chosen(tmp_path: Path) -> None:
    """Neither one that the condition leaves out, nor one of a lower score; in the run's order."""
    uids = [uid(2), uid(0), uid(0), uid(0), uid(1), uid(1)]
    scores, captions = [0.5, 0.9, 0.2, 0.3, 0.4, 0.4], ["a", "bad", "b", "c", "d", "e"]
    run = make_run(tmp_path, {"a": table(uids, scores, caption=captions, key=[*"012345"])})
    query, out = Query("caption <> 'bad'", by=CLIP, top=1.0), tmp_path / "kept.parquet"
    assert select(*run, query, out, columns=["caption"]).chosen == 3
    assert pq.read_table(out)["caption"].to_pylist() == ["a", "c", "d"]
    select(*run, query, tmp_path / "kept.jsonl")
    assert json.loads((tmp_path / "kept.jsonl").read_text())["keys"] == ["0", "3", "4"]


def test_a_subset_of_others_is_joined(tmp_path: Path) -> None:
    np.save(tmp_path / "theirs.npy", subset([uid(1), uid(77)]))
    run = make_run(tmp_path, {"a": table([uid(i) for i in range(4)], [0.5] * 4)})
    query = Query("in_subset", join=tmp_path / "theirs.npy")
    found = select(*run, query, tmp_path / "subset.npy")
    assert (found.passed, found.undecided) == (1, 0)
    assert np.array_equal(np.load(tmp_path / "subset.npy"), subset([uid(1)]))
    np.save(tmp_path / "theirs.npy", np.arange(3))
    with pytest.raises(
        ConfigError, match=r"theirs\.npy cannot be read: found int64, valid is u8,u8"
    ):
        select(*run, query, tmp_path / "subset.npy")
