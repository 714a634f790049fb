"""What is in a shard's two files, and how they get to their place."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import STATS, write_config

from d2m_hpc import config as configs
from d2m_hpc.errors import D2MError, DiskError, ShardError
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import Record, Rejection
from d2m_hpc.run.schema import Schema
from d2m_hpc.worker.batch import Outputs
from d2m_hpc.worker.write.table import Table
from d2m_hpc.worker.write.writer import Committer, write_pair

BOXES = pa.list_(pa.list_(pa.float32()))
RNG = np.random.default_rng(20261122)


@pytest.fixture
def config(tmp_path: Path) -> configs.Config:
    return _config(tmp_path)


def _config(folder: Path, **values: Any) -> configs.Config:
    common = {"input_tars": "x.tar", "output_metadata_dir": str(folder / "out")}
    return configs.load(write_config(folder / "c.yml", {**STATS, **common, **values}))


def _outputs(rows: int, first: int = 0, **columns: Any) -> Outputs:
    """Of the STATS workload."""
    return Outputs(
        keys=[f"{first + i:09d}" for i in range(rows)],
        columns={
            "image-brightness": RNG.random(rows),
            "image-phash": [f"{i:016x}" for i in RNG.integers(0, 2**63, rows).tolist()],
            "text-words": list(range(rows)),
            **columns,
        },
        features={"image-histogram": RNG.random((rows, 8), dtype=np.float32)},
        fields={
            "uid": [f"{i:032x}" for i in range(rows)],
            "caption": [f"caption {i}" for i in range(rows)],
        },
    )


def _table(config: configs.Config, *parts: Outputs, schema: Schema | None = None) -> Table:
    table = Table(config, schema)
    for part in parts:
        table.add(part)
    return table


def _record(rows: int, shard: str = "00000") -> Record:
    return Record(shard, "done", rows=rows, fingerprint="f" * 16, task="000-0-0")


def _column(
    config: configs.Config, name: str, *batches: Any, schema: Schema | None = None
) -> pa.ChunkedArray:
    """A column of its values, batch by batch."""
    changed = config.model_copy(
        update={"postprocess_columns": [name], "postprocess_features": [], "additional_fields": []}
    )
    parts = [Outputs([str(i) for i in range(len(b))], {name: b}) for b in batches]
    return _table(changed, *parts, schema=schema).table()[name]


def _field(config: configs.Config, *values: Any) -> pa.ChunkedArray:
    changed = config.model_copy(
        update={
            "postprocess_columns": [],
            "postprocess_features": [],
            "additional_fields": ["field"],
        }
    )
    keys = [str(i) for i in range(len(values))]
    return _table(changed, Outputs(keys, fields={"field": list(values)})).table()["field"]


# --- what is written ---


def test_a_parquet_has_key_columns_and_fields_in_this_order(config: configs.Config) -> None:
    first, second = _outputs(3), _outputs(2, first=3)
    table = _table(config, first, second).table()
    assert table.schema.names == [
        "key",
        "image-brightness",
        "image-phash",
        "text-words",
        "uid",
        "caption",
    ]
    assert table.schema.types == [
        pa.string(),
        pa.float32(),
        pa.string(),
        pa.int64(),
        pa.string(),
        pa.string(),
    ]
    assert table["key"].to_pylist() == [f"{i:09d}" for i in range(5)]
    for name in config.postprocess_columns:
        want = np.concatenate([first.columns[name], second.columns[name]])
        assert np.array_equal(table[name].to_numpy(), want.astype(table[name].to_numpy().dtype))
    assert table["caption"].to_pylist() == [
        "caption 0",
        "caption 1",
        "caption 2",
        "caption 0",
        "caption 1",
    ]


def test_a_pair_is_what_was_computed(config: configs.Config, tmp_path: Path) -> None:
    outputs = _outputs(4)
    histogram = outputs.features["image-histogram"]
    npz, parquet = write_pair(_table(config, outputs), _record(4), tmp_path)
    with np.load(npz) as arrays:
        assert arrays.files == ["image-histogram"]
        assert arrays["image-histogram"].dtype == np.float16
        assert np.array_equal(arrays["image-histogram"], histogram.astype(np.float16))
    assert pq.read_table(parquet).equals(_table(config, outputs).table())


def test_features_are_float32_on_demand(tmp_path: Path) -> None:
    config = _config(tmp_path, feature_dtype="float32")
    outputs = _outputs(2)
    histogram = outputs.features["image-histogram"].copy()
    features = _table(config, outputs).features()
    assert features["image-histogram"].dtype == np.float32
    assert np.array_equal(features["image-histogram"], histogram)


def test_names_are_datacomps_on_demand(tmp_path: Path) -> None:
    config = _config(
        tmp_path,
        models=["oai-clip-vit-b32"],
        postprocess_columns=["oai-clip-vit-b32-score"],
        postprocess_features=["oai-clip-vit-b32-image"],
        additional_fields=[],
        use_datacomp_keys=True,
    )
    score, image = np.ones(1, np.float32), np.ones((1, 4), np.float32)
    outputs = Outputs(
        ["a"],
        {"oai-clip-vit-b32-score": score},
        {"oai-clip-vit-b32-image": image},
        {"text": ["a caption"]},
    )
    table = _table(config, outputs)
    assert table.table().schema.names == ["key", "clip_b32_similarity_score", "text"]
    assert list(table.features()) == ["b32_img"]


def test_a_parquet_tells_its_record_and_the_versions(
    config: configs.Config, tmp_path: Path
) -> None:
    record = _record(2)
    record.rejections = [Rejection("x", "the image file is empty")]
    _, parquet = write_pair(_table(config, _outputs(2)), record, tmp_path)
    note = json.loads(pq.read_schema(parquet).metadata[b"d2m"])
    assert note["shard"] == "00000"
    assert note["rows"] == 2
    assert note["rejections"] == [["x", "the image file is empty"]]
    assert note["fingerprint"] == "f" * 16
    assert note["npz_sha256"] == record.npz_sha256
    assert {"d2m_hpc", "torch", "timm"} <= note["versions"].keys()
    read = Pair(OutputDir(str(tmp_path)), "00000").record()
    assert read is not None
    assert (read.rejections, read.npz_sha256) == (record.rejections, record.npz_sha256)


# --- columns ---


def test_float64_and_half_become_float32(config: configs.Config) -> None:
    for dtype in (np.float64, np.float16, np.float32, np.longdouble):
        column = _column(config, "score", np.array([0.5, 0.25], dtype))
        assert (column.type, column.to_pylist()) == (pa.float32(), [0.5, 0.25])
    column = _column(config, "score", [np.float16(0.5), 0.25])
    assert (column.type, column.to_pylist()) == (pa.float32(), [0.5, 0.25])


def test_boxes_have_one_type_with_faces_and_without(config: configs.Config) -> None:
    box = np.array([0.0, 0.25, 0.5, 1.0], np.float32).tolist()
    for batches in ([[[box], []]], [[[], []], [[box, box]]], [[[], []]], []):
        assert _column(config, "face-boxes", *batches).type == BOXES
    assert _column(config, "face-boxes", [[box], []]).to_pylist() == [[box], []]


def test_a_column_of_texts_stays_one(config: configs.Config) -> None:
    column = _column(config, "caption", ["a cat", ""], ["☃"])
    assert (column.type, column.to_pylist()) == (pa.string(), ["a cat", "", "☃"])


def test_a_column_of_vectors_is_lists_of_float32(config: configs.Config) -> None:
    column = _column(config, "vector", np.ones((2, 3)))
    assert (column.type, column.to_pylist()) == (pa.list_(pa.float32()), [[1.0] * 3] * 2)


def test_a_column_of_two_kinds_is_the_shards_error(config: configs.Config) -> None:
    with pytest.raises(ShardError, match="column 'odd' cannot be written"):
        _column(config, "odd", ["a", 1])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([None, {"a": 1}], "has values of struct<a: int64>; valid are numbers"),
        ([[{"a": "x"}], [{"b": 2}]], r"has values of list<item: struct<a: string, b: int64>>; val"),
        ([{}], "has values of struct<>; valid .* return json.dumps of a dict"),
        ([Decimal("1.5")], r"has values of decimal128\(2, 1\); valid are numbers"),
        (
            [np.longdouble(1.5)],
            "cannot be written: .*; its first value is of (longdouble|float128); valid are",
        ),
        ([object()], "cannot be written: .*; its first value is of object; valid are"),
        ([{1, "a"}], "cannot be written: .*; its first value is of set; valid are"),
    ],
)
def test_a_column_whose_type_no_shard_could_agree_on_is_refused(
    values: Any, told: str, config: configs.Config
) -> None:
    with pytest.raises(ShardError, match=f"column 'odd' {told}"):
        _column(config, "odd", values)


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ([b"a"], ["a"]),
        ([date(2026, 1, 2)], [datetime(2026, 1, 2, 3)]),
        ([timedelta(1)], [1]),
        ([1], [date(2026, 1, 2)]),
    ],
)
def test_bytes_and_times_are_of_the_runs_type(
    first: list[Any], later: list[Any], config: configs.Config
) -> None:
    """Arrow would convert some of them to others."""
    schema = Schema()
    made = _column(config, "odd", first, schema=schema)
    assert made.to_pylist() == first
    assert _column(config, "odd", [None], schema=schema).type == made.type
    with pytest.raises(ShardError, match=r"'odd' is .* here, and the rest of the run has"):
        _column(config, "odd", later, schema=schema)


@pytest.mark.parametrize(
    "values",
    [
        np.array([1.0, np.nan]),
        np.array([1.0, np.inf], np.float32),
        np.array([1.0, 1e300]),
        [[[0.0, float("nan")]], []],
        [1.0, float("-inf")],
    ],
    ids=["nan", "inf", "over float32", "nan in a list", "list"],
)
def test_a_column_that_is_not_finite_is_the_shards_error(
    values: Any, config: configs.Config
) -> None:
    """A NaN fails every comparison that filters a dataset, and its row vanishes silently."""
    with pytest.raises(ShardError, match="column 'score' has values that float32 cannot hold"):
        _column(config, "score", values)


def test_a_null_in_a_column_is_no_number(config: configs.Config) -> None:
    assert _column(config, "maybe", [1.0, None]).to_pylist() == [1.0, None]


# --- features ---


def test_a_float16_overflow_is_the_shards_error(config: configs.Config) -> None:
    outputs = _outputs(2)
    outputs.features["image-histogram"][1, 1] = 1e6
    with pytest.raises(ShardError, match=r"'image-histogram'.*feature_dtype: float32"):
        _table(config, outputs).features()


def test_a_feature_of_texts_is_the_shards_error(config: configs.Config) -> None:
    outputs = _outputs(2)
    outputs.features["image-histogram"] = np.array(["a", "b"])
    with pytest.raises(ShardError, match=r"'image-histogram' is made of <U1; valid are numbers"):
        _table(config, outputs).features()


def test_features_of_integers_are_narrowed_too(config: configs.Config) -> None:
    outputs = _outputs(2)
    outputs.features["image-histogram"] = np.array([[1, 2], [3, 4]])
    made = _table(config, outputs).features()["image-histogram"]
    assert (made.dtype, made.tolist()) == (np.float16, [[1, 2], [3, 4]])


# --- fields ---


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None, 3], pa.float64()),
        ([1, None, 2**53 + 1], pa.int64()),
        ([1, 2.5], pa.float64()),
        (["a", None], pa.string()),
        ([True, None], pa.bool_()),
        ([[1], []], pa.list_(pa.float64())),
        ([{"a": 1}, {"b": "x"}], pa.string()),
        ([None, None], pa.string()),
        ([], pa.string()),
    ],
)
def test_a_field_has_its_jsons_type(
    values: list[Any], kind: pa.DataType, config: configs.Config
) -> None:
    assert _field(config, *values).type == kind


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1, "a", None, [2]], ["1", "a", None, "[2]"]),
        ([2**70, 1], [str(2**70), "1"]),
        ([True, 1.5], ["true", "1.5"]),
        ([{}, {}], ["{}", "{}"]),
        ([{"a": {}}, None], ['{"a": {}}', None]),
        ([[{}], []], ["[{}]", "[]"]),
    ],
)
def test_a_field_that_no_type_holds_becomes_json_texts(
    values: list[Any], texts: list[str | None], config: configs.Config, tmp_path: Path
) -> None:
    column = _field(config, *values)
    assert (column.type, column.to_pylist()) == (pa.string(), texts)
    pq.write_table(pa.table({"field": column}), tmp_path / "x.parquet")


# --- sizes ---


def test_a_shard_without_rows_has_a_pair(config: configs.Config, tmp_path: Path) -> None:
    npz, parquet = write_pair(Table(config), _record(0), tmp_path)
    table = pq.read_table(parquet)
    assert table.num_rows == 0
    assert table.schema.names[:2] == ["key", "image-brightness"]
    with np.load(npz) as arrays:
        assert [(n, len(arrays[n])) for n in arrays.files] == [("image-histogram", 0)]


def test_a_workload_without_features_has_an_empty_npz(tmp_path: Path) -> None:
    config = _config(tmp_path, postprocess_features=[])
    outputs = _outputs(2)
    outputs.features = {}
    npz, _ = write_pair(_table(config, outputs), _record(2), tmp_path)
    with np.load(npz) as arrays:
        assert arrays.files == []


def test_what_is_not_as_long_as_its_record_is_not_committed(
    config: configs.Config, tmp_path: Path
) -> None:
    out = OutputDir(config.output_metadata_dir)
    with pytest.raises(ShardError, match="read back \\[2\\], wrote 3 rows"):
        Committer(out, tmp_path).commit(_table(config, _outputs(2)), _record(3))
    assert out.pairs() == {".npz": set(), ".parquet": set()}


def test_a_byte_that_the_disk_flipped_is_found_before_anyone_sees_it(
    config: configs.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    savez = np.savez

    def flip(file: Any, **arrays: Any) -> None:
        savez(file, **arrays)
        file.seek(-100, os.SEEK_END)  # the archive's directory takes what follows the data
        file.write(b"\xff")

    monkeypatch.setattr(np, "savez", flip)
    out = OutputDir(config.output_metadata_dir)
    with pytest.raises(ShardError, match=r"read back Bad CRC-32.*, wrote 2 rows"):
        Committer(out, tmp_path).commit(_table(config, _outputs(2)), _record(2))
    assert out.stems() == set()


# --- committing ---


def _commit(output: OutputDir, config: configs.Config, scratch: Path, shard: str = "00000") -> None:
    committer = Committer(output, scratch)
    committer.commit(_table(config, _outputs(3)), _record(3, shard))
    committer.close()


def test_a_local_commit_leaves_the_pair_and_nothing_else(
    config: configs.Config, tmp_path: Path
) -> None:
    out = tmp_path / "not" / "yet" / "there"
    _commit(OutputDir(str(out)), config, tmp_path)
    assert sorted(p.name for p in out.iterdir()) == ["00000.npz", "00000.parquet"]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_commit_to_an_fsspec_url_leaves_the_pair_and_nothing_else(
    scheme: str, config: configs.Config, tmp_path: Path
) -> None:
    folder = f"{tmp_path}/out"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    output = OutputDir(f"{scheme}://{folder}")
    for _ in range(2):  # the second replaces the first
        _commit(output, config, scratch)
    fs = fsspec.filesystem(scheme)
    names = sorted(name.rsplit("/", 1)[-1] for name in fs.ls(folder, detail=False))
    assert names == ["00000.npz", "00000.parquet"]
    assert [p.name for p in scratch.rglob("*") if p.is_file()] == []
    record = Pair(output, "00000").record()
    assert record is not None
    assert record.npz_sha256 == output.sha256("00000.npz")
    with fs.open(f"{folder}/00000.parquet", "rb") as file:
        assert pq.read_table(file).num_rows == 3


def test_a_replaced_pair_is_the_new_one(config: configs.Config, tmp_path: Path) -> None:
    output = OutputDir(config.output_metadata_dir)
    committer = Committer(output, tmp_path)
    for rows in (3, 5):
        committer.commit(_table(config, _outputs(rows)), _record(rows))
    assert pq.read_metadata(output.path("00000.parquet")).num_rows == 5
    with np.load(output.path("00000.npz")) as arrays:
        assert len(arrays["image-histogram"]) == 5


def test_what_a_killed_attempt_left_is_swept_for_this_shard_alone(
    config: configs.Config, tmp_path: Path
) -> None:
    output = OutputDir(config.output_metadata_dir)
    committer = Committer(output, tmp_path)
    staging = committer.staging.root
    for name in ("00000.000-7-0", "00001.000-8-0", "00000.x.000-9-0"):
        (staging / name).mkdir(parents=True)
        (staging / name / "half.npz").write_bytes(b"x")
    committer.clean("00000", 8)
    left = sorted(p.name for p in staging.iterdir())
    assert left == ["00000.x.000-9-0", "00001.000-8-0"]
    committer.close()  # others use it still
    assert staging.is_dir()


def test_nothing_is_world_writable_under_umask_0(config: configs.Config, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        committer = Committer(OutputDir(str(tmp_path / "a" / "b")), tmp_path)
        write_pair(_table(config, _outputs(2)), _record(2), tmp_path)
        committer.commit(_table(config, _outputs(2)), _record(2))
    finally:
        os.umask(before)
    made = [tmp_path / "a", *(tmp_path / "a").rglob("*"), *tmp_path.glob("00000.*")]
    assert len(made) == 7
    modes = {str(p.relative_to(tmp_path)): oct(stat.S_IMODE(p.stat().st_mode)) for p in made}
    assert "a/b/.d2m-tmp" in modes
    assert {p for p, mode in modes.items() if int(mode, 8) & 0o002} == set(), modes


# --- a full disk ---


@contextmanager
def _tmpfs(folder: Path, size: str) -> Iterator[bool]:
    """A really small filesystem; False where this user may mount none."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def _file_limit(size: int) -> Iterator[None]:
    """No file of this process may grow over a size: write fails, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def _assert_refused(
    output: OutputDir, table: Table, record: Record, scratch: Path, as_: type[D2MError]
) -> None:
    committer = Committer(output, scratch)
    with pytest.raises(as_, match="00001 cannot be written") as caught:
        committer.commit(table, record)
    assert output.url in str(caught.value)
    committer.close()
    assert not committer.staging.root.exists()
    assert output.pairs() == {".npz": {"00000"}, ".parquet": {"00000"}}


def _large(rows: int) -> Outputs:
    outputs = _outputs(rows)
    outputs.features["image-histogram"] = RNG.random((rows, 1000), dtype=np.float32)
    return outputs


def _fill(disk: Path, leave: int) -> Path:
    """Leave so many bytes, rounded up to the disk's blocks."""
    free = os.statvfs(disk)
    blocks = free.f_bfree - -(-leave // free.f_bsize)
    filler = disk / "filler"
    filler.write_bytes(bytes(blocks * free.f_bsize))
    return filler


@pytest.mark.parametrize("leave", [8_000, 60_000], ids=["no npz fits", "only the npz fits"])
def test_a_full_disk_is_no_shards_error_and_leaves_no_half_pair(
    leave: int, config: configs.Config, tmp_path: Path
) -> None:
    with _tmpfs(tmp_path / "disk", "200k") as mounted:
        if not mounted:
            pytest.skip("needs root to mount a small disk")
        output = OutputDir(str(tmp_path / "disk"))
        _commit(output, config, tmp_path)
        filler = _fill(tmp_path / "disk", leave)
        table, record = _table(config, _large(29)), _record(29, "00001")
        _assert_refused(output, table, record, tmp_path, DiskError)
        assert bool(record.npz_sha256) == (leave > 58_000)  # which of the files was refused
        filler.unlink()
        Committer(output, tmp_path).commit(table, record)


def test_a_write_that_fails_half_way_leaves_no_half_pair(
    config: configs.Config, tmp_path: Path
) -> None:
    output = OutputDir(str(tmp_path / "out"))
    _commit(output, config, tmp_path)
    with _file_limit(50_000):
        table, record = _table(config, _large(100)), _record(100, "00001")
        _assert_refused(output, table, record, tmp_path, ShardError)


def test_the_texts_in_a_parquet_are_as_safe_and_short_as_those_on_record(
    config: configs.Config, tmp_path: Path
) -> None:
    """A reason may be any exception's words: with a secret, controls, or of megabytes."""
    record = _record(2)
    reason = "failed at s3://key:hush-hush@host/x \x1b[2J" + "y" * 3_000_000
    record.rejections = [Rejection("k\x1b[31m", reason)]
    _, parquet = write_pair(_table(config, _outputs(2)), record, tmp_path)
    note = pq.read_schema(parquet).metadata[b"d2m"].decode()
    assert len(note) < 3000
    [[key, told]] = json.loads(note)["rejections"]
    assert key == "k\\x1b[31m"
    assert "\x1b" not in told
    assert "hush-hush" not in note
