"""Exports of a finished run, each read by the program that it is for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
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
import yaml
from pools import CLIP, CONFIG, make_run, table, uid
from typer.testing import CliRunner

import d2m_hpc as d2m
from d2m_hpc.cli.commands import app
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage.lease import Lease
from d2m_hpc.subsets import exports, layouts

ROWS = [4, 0, 3, 6, 1, 5]
"""Of each shard; the second has no samples."""
FEATURES = ["oai-clip-vit-l14-image", "oai-clip-vit-l14-text", "image-histogram"]
NAMES = ["l14_img", "l14_txt", "image-histogram"]
KEYS = [f"{uid(100 * shard + i)}" for shard, rows in enumerate(ROWS) for i in range(rows)]


def vectors(shard: int, rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(shard)
    flat = {name: rng.normal(size=(rows, 16)).astype(np.float16) for name in NAMES[:2]}
    return flat | {NAMES[2]: rng.random((rows, 2, 3)).astype(np.float16)}


def shard(number: int, rows: int) -> pa.Table:
    uids: list[str | None] = [uid(100 * number + i) for i in range(rows)]
    captions = [None if i == 2 else f"of {i}" for i in range(rows)]
    return table(uids, [i / 8 for i in range(rows)], caption=pa.array(captions, pa.string()))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> d2m.Run:
    """Of six shards, exported in parts of seven rows and more: two parts, and the rest."""
    monkeypatch.setattr(exports, "PART_ROWS", 7)
    return finished(tmp_path, len(ROWS))


def finished(folder: Path, shards: int) -> d2m.Run:
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    names = {f"{i:05d}": shard(i, rows) if i < shards else None for i, rows in enumerate(ROWS)}
    models = [*CONFIG["models"], "image-stats"]
    where = make_run(folder, names, models=models, postprocess_features=FEATURES)
    for number, rows in enumerate(ROWS[:shards]):
        np.savez(folder / "out" / f"{number:05d}.npz", **vectors(number, rows))
    return d2m.Run(*where)


def whole(name: str) -> np.ndarray:
    return np.concatenate([vectors(number, rows)[name] for number, rows in enumerate(ROWS)])


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the log, which has a line for each time."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != exports.LOG]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def datasets_rows(folder: Path, streaming: bool = False) -> list[dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    cache = str(folder.parent / "cache")
    return [
        *datasets.load_dataset(str(folder), split="train", streaming=streaming, cache_dir=cache)
    ]


@pytest.fixture(autouse=True)
def _no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# --- links ---

READERS: dict[str, Callable[[Path], int]] = {
    "pandas": lambda folder: len(pd.read_parquet(folder)),
    "pyarrow.parquet": lambda folder: pq.read_table(folder).num_rows,
    "pyarrow.dataset": lambda folder: ds.dataset(folder).count_rows(),
    "duckdb": lambda folder: len(duckdb.sql(f"FROM '{folder}/*.parquet'").fetchall()),
    "polars": lambda folder: pl.scan_parquet(folder).collect().height,
    "datasets": lambda folder: len(datasets_rows(folder)),
    "datasets, streaming": lambda folder: len(datasets_rows(folder, streaming=True)),
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_take_the_folder_of_links(run: d2m.Run, tmp_path: Path, reader: str) -> None:
    run.export("links", tmp_path / "view")
    assert READERS[reader](tmp_path / "view") == len(KEYS)


def test_links_follow_the_run_and_lead_to_the_outputs(tmp_path: Path) -> None:
    view = tmp_path / "view"
    with pytest.raises(D2MError, match="1 of 6 shards are not finished"):
        finished(tmp_path, 5).export("links", view)
    found = finished(tmp_path, 5).export("links", view, allow_missing=True)
    assert (found.written, found.unfinished) == (4, 1)
    again = finished(tmp_path, 6).export("links", view)
    assert (again.written, again.parts, again.rows) == (1, 5, len(KEYS))
    for path in view.iterdir():
        assert path.samefile(tmp_path / "out" / path.name)
        assert not os.path.isabs(os.readlink(path))
    (view / "mine.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"mine.parquet is no link to an output of this run"):
        finished(tmp_path, 6).export("links", view)


@pytest.mark.parametrize("layout", ["links", "hf", "npy"])
def test_a_finished_run_without_rows_has_no_export(tmp_path: Path, layout: str) -> None:
    run = d2m.Run(*make_run(tmp_path, {"a": shard(0, 0)}))
    with pytest.raises(D2MError, match="all shards are finished, and none has a row; `d2m status`"):
        run.export(layout, tmp_path / "view")
    assert not (tmp_path / "view").exists()


def test_a_store_has_no_links(tmp_path: Path) -> None:
    run = d2m.Run(*make_run(tmp_path, {"a": shard(0, 1)}, url="memory://links"))
    with pytest.raises(ConfigError, match="on a store, which has no links; export `hf`"):
        run.export("links", tmp_path / "view")


# --- npy ---


def test_npy_is_mapped_and_its_columns_have_the_same_rows(run: d2m.Run, tmp_path: Path) -> None:
    run.export("npy", tmp_path / "npy")
    for name in NAMES:
        found = np.load(tmp_path / "npy" / f"{name}.npy", mmap_mode="r")
        assert found.dtype == np.float16
        assert np.array_equal(found, whole(name))
    columns = pd.read_parquet(tmp_path / "npy" / "columns")
    assert columns.uid.tolist() == KEYS
    index = pq.read_table(tmp_path / "npy" / "shards.parquet").to_pylist()
    assert [row["rows"] for row in index] == [rows for rows in ROWS if rows]
    for row in index:
        rows = slice(row["start"], row["start"] + row["rows"])
        assert np.array_equal(
            whole("l14_img")[rows], vectors(int(row["shard"]), row["rows"])["l14_img"]
        )


def test_columns_have_a_dictionary_where_values_come_again(tmp_path: Path) -> None:
    half = pa.array(np.arange(100) % 7, pa.float16())
    more = {"language": ["de", "en"] * 50, "half": half}
    made = table([uid(i) for i in range(100)], [i / 8 for i in range(100)], **more)
    run = d2m.Run(*make_run(tmp_path, {"a": made}, postprocess_features=[]))
    run.export("npy", tmp_path / "npy")
    [path] = (tmp_path / "npy" / "columns").iterdir()
    assert pq.read_table(path).equals(made)
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    found = {c.path_in_schema.partition(".")[0] for c in columns if c.has_dictionary_page}
    assert found == {"original_width", "language", "half"}


# --- clip-retrieval ---


def test_embedding_reader_reads_what_clip_retrieval_would_have_written(
    run: d2m.Run, tmp_path: Path
) -> None:
    reader = pytest.importorskip("embedding_reader")
    run.export("clip-retrieval", tmp_path / "clip")
    assert sorted(path.name for path in (tmp_path / "clip").iterdir() if path.is_dir()) == [
        *("img_emb", "metadata", "text_emb")
    ]
    for folder, name in (("img_emb", "l14_img"), ("text_emb", "l14_txt")):
        found = reader.EmbeddingReader(
            str(tmp_path / "clip" / folder),
            file_format="parquet_npy",
            metadata_folder=str(tmp_path / "clip" / "metadata"),
            meta_columns=["image_path", "caption", "uid"],
        )
        assert (found.count, found.dimension) == (len(KEYS), 16)
        batches = [*found(batch_size=5, show_progress=False)]
        assert np.array_equal(np.concatenate([batch for batch, _ in batches]), whole(name))
        meta = pd.concat([meta for _, meta in batches])
        assert meta.uid.tolist() == KEYS
        assert meta.image_path.tolist()[:2] == ["000000000", "000000001"]
        assert meta.caption.tolist()[:2] == ["of 0", "of 1"]


def test_autofaiss_finds_the_neighbours_that_brute_force_finds(
    run: d2m.Run, tmp_path: Path
) -> None:
    autofaiss = pytest.importorskip("autofaiss")
    run.export("clip-retrieval", tmp_path / "clip", image="oai-clip-vit-l14-image")
    assert not (tmp_path / "clip" / "text_emb").exists()
    index, _ = autofaiss.build_index(
        str(tmp_path / "clip" / "img_emb"), save_on_disk=False, metric_type="l2", verbose=40
    )
    points = whole("l14_img").astype(np.float32)
    _, found = index.search(points, 3)
    distances = ((points[:, None] - points[None]) ** 2).sum(-1)
    assert np.array_equal(found, np.argsort(distances, axis=1)[:, :3])


def test_one_feature_may_stand_for_images_and_texts(run: d2m.Run, tmp_path: Path) -> None:
    name = "oai-clip-vit-l14-image"
    run.export("clip-retrieval", tmp_path / "clip", image=name, text=name)
    for folder in ("img_emb", "text_emb"):
        found = [np.load(path) for path in sorted((tmp_path / "clip" / folder).iterdir())]
        assert np.array_equal(np.concatenate(found), whole("l14_img"))


def test_which_feature_is_meant_is_asked(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    two = [*FEATURES[:2], "oai-clip-vit-b32-image"]
    run = d2m.Run(*make_run(tmp_path, {"a": shard(0, 2)}, postprocess_features=two))
    with pytest.raises(ConfigError, match="--image: name one of l14_img, b32_img"):
        run.export("clip-retrieval", tmp_path / "clip")
    with pytest.raises(ConfigError, match="found no feature 'l14_imag'; did you mean 'l14_img'"):
        run.export("clip-retrieval", tmp_path / "clip", image="l14_imag")
    with pytest.raises(ConfigError, match="layout: found 'hff'; valid: npy, clip-retrieval, hf"):
        run.export("hff", tmp_path / "clip")
    run = d2m.Run(*make_run(tmp_path / "none", {"a": shard(0, 2)}, postprocess_features=[]))
    with pytest.raises(ConfigError, match="valid is a feature of images or texts, by --image"):
        run.export("clip-retrieval", tmp_path / "clip")


# --- hf ---


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_loads_the_export(run: d2m.Run, tmp_path: Path, streaming: bool) -> None:
    run.export("hf", tmp_path / "hf-export")
    rows = datasets_rows(tmp_path / "hf-export", streaming)
    assert [row["uid"] for row in rows] == KEYS
    for name in NAMES:
        assert np.array_equal(np.array([row[name] for row in rows], np.float16), whole(name))
    assert rows[2]["caption"] is None


def test_the_card_and_one_schema(run: d2m.Run, tmp_path: Path) -> None:
    out = tmp_path / "hf-export"
    run.export("hf", out, features=["l14_img"])
    schemas = [pq.read_schema(path) for path in sorted((out / "data").iterdir())]
    assert len(schemas) == 3
    assert all(schema.equals(schemas[0]) for schema in schemas)
    assert schemas[0].field("l14_img").type == pa.list_(pa.float16(), 16)
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["configs"][0]["data_files"][0]["path"] == "data/*.parquet"
    assert "19 samples of 5 shards" in text
    assert f"| `{CLIP}` | float |" in text
    rows = duckdb.sql(f"SELECT uid, l14_img FROM '{out}/data/*.parquet'").fetchall()
    read = pl.read_parquet(out / "data").select("uid", "l14_img").rows()
    for found in (dict(rows), dict(read)):
        assert np.array_equal([found[key] for key in KEYS], whole("l14_img"))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int8])
def test_polars_and_arrow_write_the_same_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    monkeypatch.setattr(layouts, "GROUP_ROWS", 4)
    run = finished(tmp_path, len(ROWS))
    for number, rows in enumerate(ROWS):
        made = {name: array.astype(kind) for name, array in vectors(number, rows).items()}
        np.savez(tmp_path / "out" / f"{number:05d}.npz", **made)
    run.export("hf", tmp_path / "polars")
    monkeypatch.setitem(sys.modules, "polars", None)
    run.export("hf", tmp_path / "arrow")
    name = "data/train-00000-of-00001.parquet"
    files = [pq.ParquetFile(tmp_path / by / name) for by in ("polars", "arrow")]
    assert [file.metadata.created_by.split()[0] for file in files] == [
        "Polars",
        "parquet-cpp-arrow",
    ]
    ours, other = (file.read() for file in files)
    assert ours.schema.equals(other.schema, check_metadata=True)
    assert ours.equals(other)
    cards = [(tmp_path / by / "README.md").read_text() for by in ("polars", "arrow")]
    assert cards[0] == cards[1]
    features = [datasets_rows(tmp_path / by) for by in ("polars", "arrow")]
    assert features[0] == features[1] == datasets_rows(tmp_path / "polars", streaming=True)


@pytest.mark.parametrize(
    ("lengths", "groups", "by"),
    [([9] * 6, 1, "Polars"), ([999] * 6, 6, "Polars"), ([9, 9, 9, 9999, 9, 9], 6, "parquet-cpp")],
)
def test_memory_is_bounded_whatever_the_length_of_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int], groups: int, by: str
) -> None:
    """A row group, which polars has in memory, is small; where it may not be, Arrow writes."""
    monkeypatch.setattr(layouts, "GROUP_BYTES", 4000)
    names = {
        f"{number:05d}": shard(number, 4).set_column(4, "caption", pa.array(["é" * length] * 4))
        for number, length in enumerate(lengths)
    }
    where = make_run(tmp_path, names, postprocess_features=[FEATURES[0]])
    for number in range(len(lengths)):
        np.savez(tmp_path / "out" / f"{number:05d}.npz", **vectors(number, 4))
    d2m.Run(*where).export("hf", tmp_path / "hf")
    [path] = (tmp_path / "hf" / "data").glob("*")
    with pq.ParquetFile(path) as file:
        assert file.metadata.created_by.startswith(by)
        assert file.metadata.num_row_groups >= groups
        found = file.read()
    captions = [caption for rows in names.values() for caption in rows["caption"].to_pylist()]
    assert found["caption"].to_pylist() == captions
    made = [vectors(number, 4)["l14_img"] for number in range(len(lengths))]
    assert np.array_equal(np.array(found["l14_img"].to_pylist(), np.float16), np.concatenate(made))


def test_names_in_the_card_keep_its_table(tmp_path: Path) -> None:
    odd = {"a|b": pa.array([1.0]), "c\n| d": pa.array([2.0])}
    names = {"00000": table([uid(0)], [0.5], **odd)}
    d2m.Run(*make_run(tmp_path, names, postprocess_features=[])).export("hf", tmp_path / "hf")
    lines = (tmp_path / "hf" / "README.md").read_text().splitlines()
    rows = [line for line in lines if "|" in line]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [3] * len(rows)
    assert r"| `a\|b` | double |" in rows


def test_columns_of_other_types_are_arrows_to_write(tmp_path: Path) -> None:
    made = pa.array([{"Model": "X"}] * 4, pa.struct({"Model": pa.string()}))
    names = {"00000": shard(0, 4).append_column("exif", made)}
    fields = [*CONFIG["additional_fields"], "exif"]
    where = make_run(tmp_path, names, additional_fields=fields)
    np.savez(tmp_path / "out" / "00000.npz", **vectors(0, 4))
    d2m.Run(*where).export("hf", tmp_path / "hf-export")
    [path] = (tmp_path / "hf-export" / "data").iterdir()
    assert pq.read_table(path)["exif"].to_pylist() == made.to_pylist()
    assert "parquet-cpp" in pq.read_metadata(path).created_by


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(20_000, np.float16)), 20)
    rows = pa.table({"x": lists})
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb") as file:
        layouts._sink(file, rows.schema, iter([rows] * 20))


# --- all of them ---

LAYOUTS = ["npy", "clip-retrieval", "hf"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_that_broke_off_goes_on(
    run: d2m.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    run.export(layout, tmp_path / "at-once")
    broken, npz = tmp_path / "broken", tmp_path / "out" / "00003.npz"
    content = npz.read_bytes()
    npz.write_bytes(content[:200])
    with pytest.raises(D2MError, match=r"00003 cannot be read: .*; see `d2m verify`"):
        run.export(layout, broken)
    assert [path for path in tree(broken) if path.endswith(".tmp")] == []
    assert layout != "npy" or not (broken / "l14_img.npy").exists()
    npz.write_bytes(content)
    seen: list[tuple[int, int]] = []
    found = run.export(layout, broken, on_rows=lambda *count: seen.append(count))
    assert (found.parts, found.written) == (3, 2)
    assert seen == [(7, 19), (14, 19), (19, 19)]
    assert tree(broken) == tree(tmp_path / "at-once")
    assert run.export(layout, broken).written == 0
    assert tree(broken) == tree(tmp_path / "at-once")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_values_are_in_no_export(run: d2m.Run, tmp_path: Path, layout: str) -> None:
    """One bit, in the last shard."""
    npz, out = tmp_path / "out" / "00005.npz", tmp_path / "export"
    data = bytearray(content := npz.read_bytes())
    data[content.index(vectors(5, 5)["l14_txt"].tobytes()) + 5] ^= 1
    npz.write_bytes(data)
    with pytest.raises(D2MError, match=r"00005 cannot be read: BadZipFile: Bad CRC-32 for file"):
        run.export(layout, out)
    assert not [*out.rglob("*.tmp"), *out.glob("*.npy")]
    npz.write_bytes(content)
    assert run.export(layout, out).written == 1
    run.export(layout, tmp_path / "at-once")
    assert tree(out) == tree(tmp_path / "at-once")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_of_any_form_are_exported(
    run: d2m.Run, tmp_path: Path, layout: str, compressed: bool
) -> None:
    """Such as custom code, or another tool, may have written them."""
    run.export(layout, tmp_path / "plain")
    save = np.savez_compressed if compressed else np.savez
    for number, rows in enumerate(ROWS):
        made = {name: np.asfortranarray(array) for name, array in vectors(number, rows).items()}
        save(tmp_path / "out" / f"{number:05d}.npz", **made)
    run.export(layout, tmp_path / "other")
    assert tree(tmp_path / "other") == tree(tmp_path / "plain")


def test_an_export_that_is_interrupted_reads_no_further_shard(run: d2m.Run, tmp_path: Path) -> None:
    def interrupt(done: int, of: int) -> None:
        raise KeyboardInterrupt

    run.export("npy", tmp_path / "at-once")
    folder = RunDir(run.path)
    layout = layouts.of("npy", folder, run.config, tmp_path / "npy")
    with pytest.raises(KeyboardInterrupt):
        exports.export(folder, layout, interrupt)
    with pytest.raises(D2MError, match="the export was stopped"):
        next(layout.source.read(layout.parts[0]))
    assert not (tmp_path / "npy" / "l14_img.npy").exists()
    assert exports.export(folder, layout).rows == 19
    assert tree(tmp_path / "npy") == tree(tmp_path / "at-once")


KILLED = """
import os, sys
import d2m_hpc
from d2m_hpc.storage.lease import Lease
from d2m_hpc.subsets import exports, layouts
exports.PART_ROWS = 7
kill = lambda done, of: done == 14 and os.kill(os.getpid(), 9)
d2m_hpc.open(sys.argv[1]).export(sys.argv[2], sys.argv[3], on_rows=kill)
"""


INTERRUPTED = """
import os, signal, sys
from d2m_hpc.cli import main
left = [signal.SIGINT]
at_rename = lambda event, _: event == "os.rename" and left and os.kill(os.getpid(), left.pop())
sys.addaudithook(at_rename)
main()
"""


def test_an_interrupted_export_says_that_it_goes_on(run: d2m.Run, tmp_path: Path) -> None:
    options = ["export", "npy", str(run.path), "-o", str(tmp_path / "npy")]
    command = [sys.executable, "-c", INTERRUPTED, *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    told = "interrupted; the same command goes on from here\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", told)
    assert run.export("npy", tmp_path / "npy").rows == len(KEYS)


def test_a_killed_export_goes_on(run: d2m.Run, tmp_path: Path) -> None:
    run.export("npy", tmp_path / "at-once")
    words = [sys.executable, "-c", KILLED, str(run.path), "npy", str(tmp_path / "npy")]
    assert subprocess.run(words).returncode == -9
    assert (tmp_path / "npy" / exports.LOCK).exists()
    assert not (tmp_path / "npy" / "l14_img.npy").exists()
    (tmp_path / "npy" / "columns" / ".00002.parquet.tmp").write_bytes(b"half")
    assert run.export("npy", tmp_path / "npy").written == 1
    assert tree(tmp_path / "npy") == tree(tmp_path / "at-once")


def test_two_exports_do_not_write_into_one_folder(run: d2m.Run, tmp_path: Path) -> None:
    run.export("npy", tmp_path / "npy")
    lease = Lease(tmp_path / "npy" / exports.LOCK)
    assert lease.claim()
    with pytest.raises(D2MError, match="npy: another export is writing there; wait for its end"):
        run.export("npy", tmp_path / "npy")
    lease.release()
    assert run.export("npy", tmp_path / "npy").written == 0
    (tmp_path / "npy" / exports.LOCK).touch()  # as a kill leaves it before its first byte
    assert run.export("npy", tmp_path / "npy").written == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_on_a_store_are_exported(run: d2m.Run, tmp_path: Path, layout: str) -> None:
    run.export(layout, tmp_path / "from-disk")
    url = f"memory://{tmp_path.name}/out"
    fs = fsspec.filesystem("memory")
    fs.put(f"{tmp_path}/out/", f"{url}/", recursive=True)
    values = yaml.safe_load((run.path / "config.yml").read_text())
    (run.path / "config.yml").write_text(yaml.safe_dump({**values, "output_metadata_dir": url}))
    d2m.open(run.path).export(layout, tmp_path / "from-store")
    fs.rm(f"/{tmp_path.name}", recursive=True)
    assert tree(tmp_path / "from-store") == tree(tmp_path / "from-disk")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_grows_with_its_run_and_loses_nothing(
    run: d2m.Run, tmp_path: Path, layout: str
) -> None:
    run.export(layout, tmp_path / "at-once")
    part = finished(tmp_path, 3)
    before = part.export(layout, tmp_path / "grown", allow_missing=True)
    assert (before.rows, before.unfinished) == (7, 3)
    finished(tmp_path, 6).export(layout, tmp_path / "grown")
    assert tree(tmp_path / "grown") == tree(tmp_path / "at-once")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lost_file_is_written_again(run: d2m.Run, tmp_path: Path, layout: str) -> None:
    run.export(layout, tmp_path / "export")
    first = tree(tmp_path / "export")
    for name in first:
        (tmp_path / "export" / name).unlink()
        run.export(layout, tmp_path / "export")
        assert tree(tmp_path / "export") == first


def test_another_s_folder_is_left_alone(run: d2m.Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"mine has thesis.tex and the like; name a new or empty"):
        run.export("hf", tmp_path / "mine")
    run.export("npy", tmp_path / "npy")
    with pytest.raises(ConfigError, match=r"npy has the export npy of .*; name a new or empty"):
        run.export("hf", tmp_path / "npy")
    with pytest.raises(ConfigError, match="found s3:/b/x; valid is a local folder"):
        run.export("hf", "s3://b/x")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("place", ["out/view", "run/view", "links-to-out/view", "out"])
def test_an_export_lies_outside_of_the_folders_of_its_run(
    run: d2m.Run, tmp_path: Path, place: str
) -> None:
    (tmp_path / "links-to-out").symlink_to("out")
    (tmp_path / "kept.jsonl").touch()
    folder, before = tmp_path / place, tree(tmp_path)
    calls: list[Callable[[], object]] = [
        *(partial(run.export, name, folder) for name in (*LAYOUTS, "links")),
        partial(run.export, "subset-tars", folder, lists=tmp_path / "kept.jsonl"),
        partial(run.export_tasks, folder, tmp_path / "kept.jsonl", 2),
        partial(run.export_datacomp, folder),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=rf"{place} is in the (output|run) folder /.*; name "):
            call()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["out/00000.parquet", "out/00000.npz", "run/shards.parquet"])
def test_no_file_takes_the_place_of_an_output(run: d2m.Run, tmp_path: Path, name: str) -> None:
    path, before = tmp_path / name, tree(tmp_path)
    calls: list[Callable[[], object]] = [
        partial(run.report, path),
        partial(run.select, tmp_path / "kept.npy", look=path),
    ]
    if path.suffix == ".parquet":
        calls.append(partial(run.select, path))
    for call in calls:
        with pytest.raises(ConfigError, match=rf"{name} is in the (output|run) folder /.*; name "):
            call()
    assert tree(tmp_path) == before


def test_pages_and_subsets_may_lie_beside_the_outputs(run: d2m.Run, tmp_path: Path) -> None:
    run.select(tmp_path / "out" / "subset.npy", look=tmp_path / "out" / "look.html")
    run.report(tmp_path / "run" / "report.html")
    assert run.select(tmp_path / "out" / "kept.jsonl").chosen == len(KEYS)


def test_names_of_features_are_no_paths(tmp_path: Path) -> None:
    name = "../a/b"
    own = tmp_path / "own.py"
    own.write_text(f"postprocess_feature_lookup = {{{name!r}: None}}")
    more: dict[str, Any] = {"postprocess_features": [name], "custom_pypath": str(own)}
    run = d2m.Run(*make_run(tmp_path, {"a": shard(0, 2)}, **more))
    np.savez(tmp_path / "out" / "a.npz", **{name: np.ones((2, 3))})
    run.export("npy", tmp_path / "npy")
    assert [path.name for path in (tmp_path / "npy").glob("*.npy")] == ["..%2Fa%2Fb.npy"]


def test_an_npz_of_another_shape_is_named(run: d2m.Run, tmp_path: Path) -> None:
    wrong = vectors(5, 5) | {"l14_img": np.zeros((5, 8), np.float16)}
    np.savez(tmp_path / "out" / "00005.npz", **wrong)
    with pytest.raises(D2MError, match="00005 cannot be read: 'l14_img' is of another shape"):
        run.export("hf", tmp_path / "hf-export")


def test_the_commands(run: d2m.Run, tmp_path: Path) -> None:
    for layout in [*LAYOUTS, "links"]:
        words = ["export", layout, str(run.path), "-o", str(tmp_path / "by-command" / layout)]
        (tmp_path / "by-command").mkdir(exist_ok=True)
        ended = CliRunner().invoke(app, words)
        assert (ended.exit_code, ended.stderr) == (0, "")
        assert "19 rows of " in ended.stdout


@pytest.mark.skipif(duckdb.__version__ < "2", reason="of DuckDB 2")
def test_duckdb_reads_a_folder_of_links(run: d2m.Run, tmp_path: Path) -> None:
    run.export("links", tmp_path / "links")
    found = duckdb.sql(f"SELECT uid FROM read_parquet('{tmp_path / 'links'}')").fetchall()
    assert sorted(uid for (uid,) in found) == sorted(KEYS)


def test_a_feature_with_a_columns_name_is_refused(tmp_path: Path) -> None:
    features = pa.array([1.0, 2.0], pa.float32())
    rows = table([uid(0), uid(1)], [0.0, 1.0], **{"image-histogram": features})
    where = make_run(
        tmp_path,
        {"00000": rows},
        models=["image-stats"],
        postprocess_features=["image-histogram"],
        postprocess_columns=[],
    )
    np.savez(tmp_path / "out" / "00000.npz", **{"image-histogram": np.zeros((2, 3), np.float16)})
    with pytest.raises(ConfigError, match="'image-histogram' is a column's name, too; name the"):
        d2m.Run(*where).export("hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    d2m.Run(*where).export("npy", tmp_path / "npy")  # whose columns lie apart


def test_damaged_values_are_in_no_lance_data_set(run: d2m.Run, tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    npz, out = tmp_path / "out" / "00003.npz", tmp_path / "lance"
    data = bytearray(content := npz.read_bytes())
    data[content.index(vectors(3, 6)["l14_txt"].tobytes()) + 5] ^= 1
    npz.write_bytes(data)
    with pytest.raises(D2MError, match=r"00003 cannot be read: BadZipFile: Bad CRC-32 for file"):
        run.export("lance", out)
    assert lance.dataset(out / "data.lance").count_rows() == 7
    npz.write_bytes(content)
    assert run.export("lance", out).written == 2
    assert lance.dataset(out / "data.lance").to_table()["uid"].to_pylist() == KEYS


def test_rows_of_a_lance_data_set_are_on_disk_before_they_count(
    run: d2m.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lance")
    synced: set[Path] = set()
    real, commit, left = os.fsync, layouts.Lance.commit, []

    def fsync(fd: int) -> None:
        real(fd)
        synced.add(Path(os.readlink(f"/proc/self/fd/{fd}")))

    def checked(layout: layouts.Lance, part: exports.ExportPart) -> list[Path]:
        names = [file.path for one in layout._written[part.number] for file in one.files]
        left.append({layout._data / name for name in names} - synced)
        return commit(layout, part)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(layouts.Lance, "commit", checked)
    run.export("lance", tmp_path / "lance")
    assert left == [set()] * 3


def test_a_disk_that_takes_no_more_of_a_lance_data_set_is_one_line(tmp_path: Path) -> None:
    """Of files, not more than a KiB: as a full disk does."""
    pytest.importorskip("lance")
    run, out = finished(tmp_path, len(ROWS)), tmp_path / "lance"
    d2m_command = Path(sys.executable).with_name("d2m")
    line = f"ulimit -f 1; exec {d2m_command} export lance {run.path} -o {out}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (
        2,
        f"error: {out}/data.lance: File too large; the limit of a file's size (ulimit -f) is too "
        "low\n",
    )
    assert run.export("lance", out).rows == len(KEYS)


def test_lance_reads_all_rows_and_an_export_goes_on(tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    run, out = finished(tmp_path, len(ROWS)), tmp_path / "lance"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "PART_ROWS", 7)
        for step, written in (("commit", 3), ("write", 2)):
            real = getattr(layouts.Lance, step)

            def broken(layout: layouts.Lance, part: exports.ExportPart, real: Any = real) -> Any:
                made = real(layout, part)
                if part.number == 1:  # with its rows there or not, and nothing on the log
                    raise D2MError("killed")
                return made

            shutil.rmtree(out, ignore_errors=True)
            patch.setattr(layouts.Lance, step, broken)
            with pytest.raises(D2MError, match="killed"):
                run.export("lance", out)
            patch.setattr(layouts.Lance, step, real)
            assert run.export("lance", out).written == written
            assert run.export("lance", out).written == 0
            assert len([*(out / "data.lance" / "data").iterdir()]) == 3
    found = lance.dataset(out / "data.lance")
    assert found.data_storage_version == layouts.LANCE
    table = found.to_table()
    assert table["uid"].to_pylist() == KEYS
    for name in NAMES:
        found = np.array(table[name].to_pylist(), np.float16)
        assert (found == whole(name)).all()
