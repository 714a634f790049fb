"""All shards of a run have one schema, whatever their samples have; readers take the folder."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from kit import STATS, jpeg, submit, write_config, write_tar

from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError
from d2m_hpc.launch import flow
from d2m_hpc.launch.local import ThisProcess
from d2m_hpc.plan.decide import decide
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import Record
from d2m_hpc.worker.task import run_task

Values = Sequence[Mapping[str, Any]]

FIELDS = ["uid", "rank", "tags", "boxes", "note"]


def shard(path: Path, samples: Values, first: int = 0) -> None:
    members: dict[str, bytes] = {}
    for i, values in enumerate(samples, first):
        text = json.dumps({"uid": f"{i:032x}", "caption": f"of {i}", **values}).encode()
        members |= {f"{i:05d}.jpg": jpeg(i % 7), f"{i:05d}.txt": b"a b", f"{i:05d}.json": text}
    write_tar(path, members)


def run(folder: Path, *shards: Values, code: int = 0, **config: Any) -> Path:
    """Run over these shards; the output folder."""
    for number, samples in enumerate(shards):
        shard(folder / "tars" / f"{number}.tar", samples, first=100 * number)
    values = {**STATS, "postprocess_columns": ["image-brightness", "image-phash", "text-words"]}
    path = write_config(
        folder / "c.yml",
        {**values, "additional_fields": FIELDS, **config},
        input_tars=str(folder / "tars" / "*.tar"),
        output_metadata_dir=str(folder / "out"),
    )
    ended = submit(path)
    assert ended.returncode == code, ended.stdout + ended.stderr
    (folder / "said").write_text(ended.stdout + ended.stderr)
    return folder / "out"


def said(folder: Path) -> str:
    return re.sub(r"\s+", " ", (folder / "said").read_text())


def types(out: Path) -> dict[str, pa.DataType]:
    """The one schema of a folder."""
    schemas = [pq.read_schema(p).remove_metadata() for p in sorted(out.glob("*.parquet"))]
    assert schemas
    assert all(schema.equals(schemas[0]) for schema in schemas)
    return dict(zip(schemas[0].names, schemas[0].types, strict=True))


def record_of(out: Path, stem: str) -> Record:
    record = Pair(OutputDir(str(out)), stem).record()
    assert record is not None
    return record


READERS: dict[str, Callable[[list[str]], int]] = {
    "pyarrow": lambda paths: ds.dataset(paths).to_table().num_rows,
    "pandas": lambda paths: len(pd.read_parquet(paths)),
    "duckdb": lambda paths: len(duckdb.sql(f"FROM read_parquet({paths})").fetchall()),
    "polars": lambda paths: pl.scan_parquet(paths).collect().height,
}


def assert_readable(out: Path, rows: int) -> None:
    """By each reader, and in any order of the files, of which the first decides in most."""
    paths = [str(p) for p in sorted(out.glob("*.parquet"))]
    for seed in range(3):
        random.Random(seed).shuffle(paths)
        assert {name: read(paths) for name, read in READERS.items()} == dict.fromkeys(READERS, rows)


FULL = [
    {"rank": 3, "tags": ["a"], "boxes": [[0.5, 1]], "note": "n"},
    {"rank": 4, "tags": [], "boxes": [], "note": None},
]
VOID = [dict.fromkeys(FIELDS[1:]), dict.fromkeys(FIELDS[1:])]
EMPTY_LISTS = [{"rank": None, "tags": [], "boxes": [[]], "note": ""}]
FRACTIONS = [{"rank": 0.5, "tags": None, "boxes": None, "note": 7}]
KINDS = {
    "rank": pa.float64(),
    "tags": pa.list_(pa.string()),
    "boxes": pa.list_(pa.list_(pa.float64())),
    "note": pa.string(),
}


@pytest.mark.parametrize("seed", range(4))
def test_every_order_of_shards_has_the_same_schema(seed: int, tmp_path: Path) -> None:
    shards: list[Values] = [FULL, VOID, [], EMPTY_LISTS, FRACTIONS]
    random.Random(seed).shuffle(shards)
    out = run(tmp_path, *shards)
    found = types(out)
    assert {name: found[name] for name in KINDS} == KINDS
    assert found["text-words"] == pa.int64()
    assert found["image-phash"] == pa.string()
    assert_readable(out, rows=6)
    table = ds.dataset(sorted(out.glob("*.parquet"))).to_table()
    assert sorted(v for v in table["rank"].to_pylist() if v is not None) == [0.5, 3, 4]
    assert "7" in table["note"].to_pylist()
    for path in out.glob("*.npz"):
        with np.load(path) as arrays:
            assert arrays["image-histogram"].shape[1:] == (48,)


def test_hugging_faces_datasets_reads_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the schema of the first file, and refuses a later one that has another."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    out = run(tmp_path, VOID, FULL, [], EMPTY_LISTS, FRACTIONS)
    files = [str(path) for path in sorted(out.glob("*.parquet"))]
    for order in (files, files[::-1]):
        found = datasets.load_dataset(
            "parquet", data_files=order, split="train", cache_dir=str(tmp_path / "cache")
        )
        assert len(found) == 6
        assert sorted(v for v in found["rank"] if v is not None) == [0.5, 3, 4]
        assert [tags for tags in found["tags"] if tags] == [["a"]]


def test_only_an_empty_tar_has_the_declared_types(tmp_path: Path) -> None:
    found = types(run(tmp_path, []))
    assert (found["image-phash"], found["text-words"]) == (pa.string(), pa.int64())


def test_a_value_that_does_not_fit_costs_its_sample_and_says_what_helps(tmp_path: Path) -> None:
    many = [{"rank": i} for i in range(12)]
    kept = {"max_rejected_fraction": 0.2, "additional_fields": ["uid", "rank"]}
    out = run(tmp_path, many, [*many, {"rank": "n/a"}, {"rank": [1]}], **kept)
    record = record_of(out, "1")
    assert record.rows == 12
    reasons = [r.reason for r in record.rejections]
    assert [r.partition(";")[0] for r in reasons] == [
        "field 'rank' does not fit its type: found \"n/a\" where the run has float64",
        "field 'rank' does not fit its type: found [1] where the run has float64",
    ]
    assert "`rank: string` under additional_fields takes it" in reasons[0]
    assert_readable(out, rows=24)
    with np.load(out / "1.npz") as arrays:
        assert len(arrays["image-histogram"]) == 12

    # As it says: the shard with the rejections is computed anew, the other one's field is read.
    kept["additional_fields"] = ["uid", {"rank": "string"}]
    out = run(tmp_path, **kept)
    assert types(out)["rank"] == pa.string()
    assert [record_of(out, stem).rows for stem in "01"] == [12, 14]
    assert pq.read_table(out / "1.parquet")["rank"].to_pylist()[-2:] == ["n/a", "[1]"]
    assert pq.read_table(out / "0.parquet")["rank"].to_pylist()[:2] == ["0", "1"]


def test_without_warn_and_continue_it_fails_the_shard(tmp_path: Path) -> None:
    more = {"warn_and_continue": False, "additional_fields": ["rank"]}
    run(tmp_path, [{"rank": 1}], [{"rank": "a"}], code=1, **more)
    assert "does not fit its type" in said(tmp_path)


@pytest.mark.parametrize("entry", [{"rank": "int64"}, "rank: int64"], ids=["mapping", "text"])
def test_a_declared_type_is_read_again_and_no_model_runs(tmp_path: Path, entry: Any) -> None:
    out = run(tmp_path, [{"rank": 5}], [{"rank": None}], additional_fields=["rank"])
    assert types(out)["rank"] == pa.float64()
    brightness = pq.read_table(out / "0.parquet")["image-brightness"]
    out = run(tmp_path, additional_fields=[entry])
    assert types(out)["rank"] == pa.int64()
    assert pq.read_table(out / "0.parquet")["image-brightness"].equals(brightness)
    assert "models run: none" in said(tmp_path)
    assert pq.read_table(out / "0.parquet")["rank"].to_pylist() == [5]


def test_objects_and_deep_values_are_texts_or_maps(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    values = [{"tags": {f"k{i}": i}, "note": deep if i == 3 else "x"} for i in range(5)]
    fields = ["tags", "note", {"caption": "json"}]
    out = run(tmp_path / "text", values, additional_fields=fields)
    table = pq.read_table(out / "0.parquet")
    assert table["tags"].to_pylist() == [json.dumps(v["tags"]) for v in values]
    assert table["note"].to_pylist()[2:4] == ["x", json.dumps(deep)]
    assert table["caption"].to_pylist()[0] == '"of 0"'
    out = run(tmp_path / "map", values, additional_fields=[{"tags": "map<int64>"}])
    assert pq.read_table(out / "0.parquet")["tags"].to_pylist()[2] == [("k2", 2)]


def test_json_too_deep_to_be_parsed_costs_its_sample(tmp_path: Path) -> None:
    shard(tmp_path / "tars" / "0.tar", [{"note": "x"}] * 12)
    members = {"deep.jpg": jpeg(), "deep.txt": b"a"}
    members["deep.json"] = b'{"note": "[[", "other": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    write_tar(tmp_path / "tars" / "1.tar", members)
    out = run(tmp_path, additional_fields=["note"], max_rejected_fraction=1.0)
    [rejection] = record_of(out, "1").rejections
    assert rejection.reason == "the JSON cannot be parsed: it nests more than 400 deep"


# --- fields that are not there ---


def test_a_misspelt_field_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    out = run(tmp_path, FULL, FULL, code=2, additional_fields=["uid", "captoin"])
    assert f"error: {tmp_path}/c.yml: 1 mistake additional_fields: no sample of" in said(tmp_path)
    assert "has the field 'captoin'; did you mean 'caption'" in said(tmp_path)
    assert "`allow_missing_fields: true`" in said(tmp_path)
    assert re.search(r"--> \S+/c\.yml:\d+:3 \d+ \| - captoin", said(tmp_path))
    assert list(out.glob("*.parquet")) == []


@pytest.mark.parametrize("rejected", [0.1, 1.0])
@pytest.mark.parametrize("texts", ["json:captoin", {"more": "json:captoin"}])
def test_a_misspelt_text_is_told_before_anything_is_computed(
    texts: Any, rejected: float, tmp_path: Path
) -> None:
    """Where all samples may be rejected, all were, and the run was complete."""
    name = "text-words" if isinstance(texts, str) else "text-more-words"
    more = {"text_from": texts, "max_rejected_fraction": rejected}
    run(tmp_path, FULL, FULL, code=2, postprocess_columns=[name], **more)
    assert "text_from: no sample of" in said(tmp_path)
    assert "has the field 'captoin'; did you mean 'caption'" in said(tmp_path)


def compressed(folder: Path) -> str:
    plain = folder / "tars" / "0.tar"
    plain.with_name("0.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return str(plain.with_name("*.gz"))


def sent(folder: Path) -> str:
    name = f"memory://{folder.name}/0.tar"
    with fsspec.open(name, "wb") as file:
        file.write((folder / "tars" / "0.tar").read_bytes())
    return name


def piped(folder: Path) -> str:
    return f"pipe:cat {folder}/tars/0.tar"


@pytest.mark.parametrize("kind", [compressed, sent, piped])
def test_a_misspelt_field_of_a_tar_that_is_copied_costs_no_attempt(
    kind: Callable[[Path], str], tmp_path: Path
) -> None:
    """Such tars are looked at once they are on this node, and the config is at fault, no shard."""
    shard(tmp_path / "tars" / "0.tar", FULL)
    tars = kind(tmp_path)
    values = {**STATS, "postprocess_columns": ["text-words"], "max_attempts": 1}
    values |= {"input_tars": tars, "output_metadata_dir": str(tmp_path / "out")}
    path = tmp_path / "c.yml"
    for _ in range(2):
        write_config(path, values, additional_fields=["uid", "orignal_widht"])
        workload = inspect(configs.load(path), str(path))
        with pytest.raises(ConfigError) as caught:
            flow.submit(workload, ThisProcess())
    assert "additional_fields: no sample of " in str(caught.value)
    assert "has the field 'orignal_widht'; valid: " in str(caught.value)
    assert "`allow_missing_fields: true`" in str(caught.value)
    assert [*workload.run.records.iterdir()] == []
    assert [*workload.run.leases.iterdir()] == []
    write_config(path, values, additional_fields=["uid", "caption"])
    flow.submit(inspect(configs.load(path), str(path)), ThisProcess())
    assert pq.read_table(tmp_path / "out" / "0.parquet")["caption"].to_pylist() == ["of 0", "of 1"]


def test_a_field_that_may_be_missing_is_nulls_and_a_notice(tmp_path: Path) -> None:
    more = {"allow_missing_fields": True, "additional_fields": ["uid", "captoin"]}
    out = run(tmp_path, FULL, [{"captoin": 5}], **more)
    assert types(out)["captoin"] == pa.float64()
    [notice] = record_of(out, "0").notices
    assert notice.startswith(
        "no sample of this shard has the field 'captoin'; did you mean 'caption'?"
    )
    assert record_of(out, "1").notices == []


def test_a_field_of_the_first_shard_may_be_missing_in_another(tmp_path: Path) -> None:
    out = run(tmp_path, FULL, [{}], additional_fields=["uid", "rank"])
    assert pq.read_table(out / "1.parquet")["rank"].to_pylist() == [None]
    assert "has the field 'rank'" in record_of(out, "1").notices[0]


def test_key_is_the_first_column_asked_for_or_not(tmp_path: Path) -> None:
    out = run(tmp_path, [{"key": "00000"}, {"key": "other"}], additional_fields=["key", "uid"])
    table = pq.read_table(out / "0.parquet")
    assert table.column_names[0] == "key"
    assert table.column_names.count("key") == 1
    assert table["key"].to_pylist() == ["00000", "00001"]
    assert record_of(out, "0").notices == [
        "samples with another `key` in their JSON than their file's name, which the column `key` "
        "has: 1"
    ]


# --- custom models ---

CUSTOM = """
import torch

class Words(torch.nn.Module):
    raw_inputs = ["text"]
    preprocessors = ["identity"]
    dependencies = []
    to_device = False

    def __init__(self, device):
        super().__init__()

    def forward(self, texts):
        return [[w for w in t.split() if w != "a"] for t in texts], torch.ones(len(texts), 3)

model_lookup = {"words": Words}
postprocess_parquet_lookup = {"words": lambda cache: cache["words"][0]}
postprocess_feature_lookup = {"ones": lambda cache: cache["words"][1]}
"""


@pytest.mark.parametrize("declared", ["", "output_types = {'words': 'list<string>', 'ones': [3]}"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_outputs_of_custom_models_have_one_type(
    tmp_path: Path, declared: str, order: tuple[int, ...]
) -> None:
    """A shard of empty lists and one without rows come before and after one with words."""
    (tmp_path / "mine.py").write_text(CUSTOM + declared)
    for number, place in enumerate(order):
        texts = ([], [b"a"], [b"a cat"])[place]
        members: dict[str, bytes] = {}
        for i, text in enumerate(texts):
            members |= {f"{number}{i}.txt": text, f"{number}{i}.json": b"{}"}
        write_tar(tmp_path / "tars" / f"{number}.tar", members)
    out = run(
        tmp_path,
        models=["words"],
        postprocess_columns=["words"],
        postprocess_features=["ones"],
        additional_fields=[],
        custom_pypath=str(tmp_path / "mine.py"),
    )
    assert types(out)["words"] == pa.list_(pa.string())
    for path in out.glob("*.npz"):
        with np.load(path) as arrays:
            assert arrays["ones"].shape[1:] == (3,)
    assert_readable(out, rows=2)


@pytest.mark.parametrize("void", [[], [b"a"]])
def test_a_task_of_shards_without_values_has_the_runs_types(tmp_path: Path, void: Any) -> None:
    """Its outputs of undeclared types are written first; nobody can tell their types from them."""
    (tmp_path / "mine.py").write_text(CUSTOM)
    for number, texts in enumerate((void, void, [b"a cat"])):
        pairs = [(f"{number}{i}.{e}", t) for i, t in enumerate(texts) for e in ("txt", "json")]
        members = [(name, b"{}" if name.endswith("json") else text) for name, text in pairs]
        write_tar(tmp_path / "tars" / f"{number}.tar", members)
    values = {
        **STATS,
        "models": ["words"],
        "postprocess_columns": ["words"],
        "postprocess_features": ["ones"],
        "additional_fields": [],
        "custom_pypath": str(tmp_path / "mine.py"),
        "input_tars": str(tmp_path / "tars" / "*.tar"),
        "output_metadata_dir": str(tmp_path / "out"),
        "steal": False,
    }
    workload = inspect(configs.load(path := write_config(tmp_path / "c.yml", values)), str(path))
    with flow.submitting(workload):
        pending = decide(workload).pending
        flow.commit(decide(workload), [[job] for job in pending])
    for index in range(3):
        run_task(workload.run.root, "000", index)
    assert types(tmp_path / "out")["words"] == pa.list_(pa.string())
    shapes = {np.load(path)["ones"].shape[1:] for path in (tmp_path / "out").glob("*.npz")}
    assert shapes == {(3,)}
    assert_readable(tmp_path / "out", rows=2 * len(void) + 1)


def test_a_column_that_cannot_be_written_fails_its_shard_and_not_the_task(tmp_path: Path) -> None:
    """Its type is asked for before it is written, while it is not known in the run."""
    custom = CUSTOM.replace('cache["words"][0]', '[[1, "a"]] * len(cache["words"][0])')
    (tmp_path / "mine.py").write_text(custom)
    for number in range(2):
        shard(tmp_path / "tars" / f"{number}.tar", [{}])
    run(
        tmp_path,
        code=1,
        models=["words"],
        postprocess_columns=["words"],
        postprocess_features=[],
        additional_fields=[],
        custom_pypath=str(tmp_path / "mine.py"),
    )
    assert "2 failed" in said(tmp_path)
    assert "column 'words' cannot be written" in said(tmp_path)


def test_what_is_no_type_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CUSTOM + "output_types = {'words': 'list<x>', 'ones': [0]}")
    shard(tmp_path / "tars" / "0.tar", [{}])
    more = {"models": ["words"], "postprocess_columns": ["words"], "postprocess_features": []}
    more |= {"custom_pypath": str(tmp_path / "mine.py"), "additional_fields": []}
    run(tmp_path, code=2, **more)
    assert "output_types: found 'words': 'list<x>'; valid are a column's type" in said(tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([{"rank": "flaot"}], "'rank' has the unknown type 'flaot'; valid: bool, int64"),
        (["rank: list<int>"], "has the unknown type 'list<int>'"),
        (["rank", {"rank": "int64"}], "found 'rank' more than once"),
    ],
)
def test_mistakes_in_declared_types(tmp_path: Path, fields: Any, says: str) -> None:
    run(tmp_path, [{"rank": 1}], code=2, additional_fields=fields)
    assert says in said(tmp_path)


def test_a_parquet_of_another_program_decides_no_type(tmp_path: Path) -> None:
    strange = {"rank": pa.array([1], pa.int16()), "uid": pa.array([[2.5]], pa.list_(pa.float32()))}
    (tmp_path / "out").mkdir()
    pq.write_table(pa.table(strange), tmp_path / "out" / "other.parquet")
    out = run(tmp_path, [{"rank": 1}], [{"rank": 2}], additional_fields=["uid", "rank"])
    (out / "other.parquet").unlink()
    assert types(out)["uid"] == pa.string()
    assert types(out)["rank"] == pa.float64()


@pytest.mark.parametrize(
    "text", ["{", "", "[]", '{"type": "none"}', '{"kind": 1}', '{"type": 7}', "[" * 90_000]
)
def test_a_damaged_note_of_a_type_stops_the_task_and_is_named(tmp_path: Path, text: str) -> None:
    fields = {"additional_fields": ["rank"], "max_attempts": 1}
    out = run(tmp_path, [{"rank": 1}], **fields)
    note = RunDir(out / ".d2m").agreed("field", "rank")
    note.write_text(text)
    shard(tmp_path / "tars" / "1.tar", [{"rank": 2}])
    shard(tmp_path / "tars" / "2.tar", [{"rank": 3}])
    run(tmp_path, code=2, **fields)
    assert re.sub(r"\s", "", f"{note} is damaged:") in re.sub(r"\s", "", said(tmp_path))
    assert "remove it, and run the same command again" in said(tmp_path)
    note.unlink()
    run(tmp_path, **fields)
    assert types(out)["rank"] == pa.float64()
