"""The same samples in other forms than tars give the same outputs, by the same code."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import fsspec
import hubs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import DATACOMP, SHARDS, STATS, jpeg, submit, write_config, write_tar
from kit import d2m as d2m_command

import d2m_hpc as d2m
from d2m_hpc.config import Config, load
from d2m_hpc.errors import ConfigError, ShardError
from d2m_hpc.models.weights import OFFLINE
from d2m_hpc.plan.patterns import expand
from d2m_hpc.plan.workload import expanded
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import Record
from d2m_hpc.run.slices import Slice
from d2m_hpc.worker import task
from d2m_hpc.worker.read import readers
from d2m_hpc.worker.read.columns import Columns, choose
from d2m_hpc.worker.read.folder import PictureFolder
from d2m_hpc.worker.read.names import EXTENSIONS, Members
from d2m_hpc.worker.read.reader import Reader, Sample, Samples

Row = dict[str, Any]
FIELDS = ["uid", "caption", "original_width", "exif", "exif.Model", "score"]
BAD = "000000007"
"""The sample whose picture is corrupt."""


def rows(count: int = 20) -> list[Row]:
    """Samples as img2dataset has them: a picture, and the JSON's values."""
    found = []
    for i in range(count):
        key = f"{i:09d}"
        found.append(
            {
                "caption": f"ein Wörtchen {'mehr ' * (i % 4)}{i}",
                "url": f"http://here/{i}.jpg",
                "key": key,
                "status": "success",
                "error_message": None,
                "original_width": 40 + i,
                "exif": json.dumps({"Model": f"M{i}"}) if i % 3 else "{}",
                "uid": f"{i:032x}",
                "score": None if i == 3 else i / 7,
                "jpg": b"\xff\xd8\xff no picture" if key == BAD else jpeg(i),
            }
        )
    return found


def as_tar(folder: Path, samples: list[Row]) -> None:
    members: dict[str, bytes] = {}
    for row in samples:
        meta = {name: value for name, value in row.items() if name != "jpg"}
        members[f"{row['key']}.jpg"] = row["jpg"]
        members[f"{row['key']}.txt"] = row["caption"].encode()
        members[f"{row['key']}.json"] = json.dumps(meta).encode()
    write_tar(folder / "00000.tar", members)


def as_img2dataset(folder: Path, samples: list[Row]) -> None:
    """The schema of `img2dataset --output_format parquet`: failed downloads have rows, too."""
    lost = {**samples[0], "key": "000000999", "status": "failed_to_download", "jpg": None}
    table = pa.Table.from_pylist([*samples, {**lost, "error_message": "404"}])
    pq.write_table(table, folder / "00000.parquet", row_group_size=7)


def as_datasets(folder: Path, samples: list[Row]) -> None:
    """By `datasets` itself, with its `Image`: `struct<bytes, path>`."""
    made = datasets.Dataset.from_list(
        [
            {**{k: v for k, v in row.items() if k != "jpg"}, "image": {"bytes": row["jpg"]}}
            for row in samples
        ]
    ).cast_column("image", datasets.Image(decode=False))
    made.to_parquet(folder / "00000.parquet", batch_size=6)


def as_files(folder: Path, samples: list[Row]) -> None:
    """The layout of `img2dataset --output_format files`, with what it puts beside."""
    (folder / "00000").mkdir()
    for row in samples:
        meta = {name: value for name, value in row.items() if name != "jpg"}
        start = folder / "00000" / row["key"]
        start.with_suffix(".jpg").write_bytes(row["jpg"])
        start.with_suffix(".txt").write_text(row["caption"])
        start.with_suffix(".json").write_text(json.dumps(meta))
    (folder / "00000_stats.json").write_text("{}")
    (folder / "00000.parquet").write_bytes(b"PAR1")


def as_folder(folder: Path, samples: list[Row]) -> None:
    """Pictures alone, and a captions file as `datasets` takes it."""
    (folder / "00000").mkdir()
    lines = []
    for row in samples:
        meta = {name: value for name, value in row.items() if name != "jpg"}
        (folder / "00000" / f"{row['key']}.jpg").write_bytes(row["jpg"])
        lines.append({"file_name": f"00000/{row['key']}.jpg", **meta})
    lines.append({**lines[0], "file_name": "../../secret.jpg"})
    lines.append({**lines[0], "file_name": "00001/000000000.jpg"})
    # With a byte order mark, as some editors write it.
    (folder / "captions.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, lines)))
    pq.write_table(pa.Table.from_pylist(lines), folder / "captions.parquet")


WRITERS: dict[str, Callable[[Path, list[Row]], None]] = {
    "tar": as_tar,
    "img2dataset": as_img2dataset,
    "datasets": as_datasets,
    "files": as_files,
    "folder": as_folder,
}
PATTERNS = {"tar": "*.tar", "files": "", "folder": ""}


def config_of(folder: Path, pattern: str, **more: Any) -> Path:
    key = "input_tars" if pattern.endswith(".tar") else "inputs"
    values = {**STATS, "additional_fields": FIELDS, key: pattern}
    return write_config(
        folder / "c.yml", {**values, "output_metadata_dir": str(folder / "out")}, **more
    )


def made(folder: Path, stem: str = "00000") -> tuple[pa.Table, dict[str, Any], Record]:
    """The rows, arrays and record of a shard."""
    pair = Pair(OutputDir(str(folder / "out")), stem)
    record = pair.record()
    assert record is not None
    with np.load(folder / "out" / f"{stem}.npz") as arrays:
        return pair.table(), dict(arrays), record


def written(folder: Path, kind: str, samples: list[Row] | None = None) -> Path:
    """A config for a shard of some form."""
    (folder / "in").mkdir(parents=True)
    WRITERS[kind](folder / "in", rows() if samples is None else samples)
    captions = {"captions": str(folder / "in" / "captions.jsonl")} if kind == "folder" else {}
    return config_of(folder, str(folder / "in" / PATTERNS.get(kind, "*.parquet")), **captions)


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "tar"])
def test_rows_features_and_rejections_are_those_of_the_tar(kind: str, tmp_path: Path) -> None:
    for each in ("tar", kind):
        run = d2m.submit(written(tmp_path / each, each), local=True)
        assert run.status().complete
        assert run.verify().faults == []
    (table, arrays, record), (same, others, other) = made(tmp_path / "tar"), made(tmp_path / kind)
    assert table.num_rows == 19
    assert same.equals(table)
    assert same.schema.remove_metadata() == table.schema.remove_metadata()
    assert {n: a.tobytes() for n, a in others.items()} == {
        n: a.tobytes() for n, a in arrays.items()
    }
    assert [r.key for r in record.rejections] == [BAD]
    assert other.rejections == record.rejections
    lost = ["rows whose download failed are no samples: 000000999"]
    assert other.notices == (lost if kind == "img2dataset" else [])


def test_the_six_models_give_the_same_bits_for_every_form(
    tmp_path: Path, checkpoints: Path
) -> None:
    """A tar that img2dataset wrote, and its samples in each other form, in one run."""
    tar = _members(SHARDS / "00000.tar")
    samples = [
        {**json.loads(data), "jpg": tar[f"{name[:-5]}.jpg"]}
        for name, data in tar.items()
        if name.endswith(".json")
    ][:12]
    assert all(tar[f"{s['key']}.txt"] == s["caption"].encode() for s in samples)
    (tmp_path / "tar").mkdir()
    write_tar(tmp_path / "tar" / "00000.tar", {n: d for n, d in tar.items() if n < "0000012"})
    for kind, write in WRITERS.items():
        if kind != "tar":
            (tmp_path / kind).mkdir()
            write(tmp_path / kind, samples)
    (tmp_path / "captions.jsonl").write_text(
        (tmp_path / "folder" / "captions.jsonl").read_text().replace("00000/", "folder/00000/")
    )
    patterns = {"tar": "/*.tar", "img2dataset": "/*.parquet", "datasets": "/*.parquet"}
    config = write_config(
        tmp_path / "c.yml",
        DATACOMP,
        inputs=[f"{tmp_path}/{kind}{patterns.get(kind, '')}" for kind in WRITERS],
        captions=str(tmp_path / "captions.jsonl"),
        output_metadata_dir=str(tmp_path / "out"),
        weights_dir=str(checkpoints),
        allow_unpublished_weights=True,
    )
    run = d2m.submit(config, local=True)
    assert run.status().complete
    assert run.verify().faults == []
    found = {p.stem: made(tmp_path, p.stem) for p in (tmp_path / "out").glob("*.parquet")}
    assert len(found) == len(WRITERS), [*found]
    (table, arrays, _), *others = found.values()
    assert (table.num_rows, len(arrays)) == (12, 5)
    assert table["sha256"].null_count == 0
    for same, features, _ in others:
        assert same.equals(table)
        assert {n: a.tobytes() for n, a in features.items()} == {
            n: a.tobytes() for n, a in arrays.items()
        }


DOWNLOAD = """
import multiprocessing as mp
import sys

fork = mp.get_context("fork")  # each process that it spawns would import for seconds
mp.get_context, mp.context.SpawnProcess = lambda method="": fork, mp.context.ForkProcess
import img2dataset

for name in sys.argv[2:]:
    img2dataset.download(
        f"{sys.argv[1]}/urls.parquet",
        output_folder=f"{sys.argv[1]}/{name}",
        output_format=name,
        input_format="parquet",
        caption_col="caption",
        save_additional_columns=["uid"],
        number_sample_per_shard=6,
        thread_count=2,
    )
"""


def test_what_img2dataset_downloads_in_three_formats_gives_the_same_rows(tmp_path: Path) -> None:
    """The real program, from a server on loopback; two of its downloads fail."""
    if importlib.util.find_spec("img2dataset") is None:
        pytest.skip("scripts/test installs img2dataset")
    pictures(tmp_path / "web", *(f"{i}.jpg" for i in range(9)))
    (tmp_path / "web" / "9.jpg").write_text("no picture")
    formats = {"webdataset": "/*.tar", "files": "", "parquet": "/*.parquet"}
    with hubs.serving_folder(tmp_path / "web") as address:
        urls = [
            {"url": f"{address}/{i}.jpg", "caption": f"Nº {i}", "uid": f"{i:032x}"}
            for i in range(11)
        ]
        pq.write_table(pa.Table.from_pylist(urls), tmp_path / "urls.parquet")
        command = [sys.executable, "-c", DOWNLOAD, str(tmp_path), *formats]
        subprocess.run(command, check=True, timeout=300)
    fields = ["uid", "url", "caption", "original_width", "sha256", "exif"]
    inputs = [f"{tmp_path}/{name}{pattern}" for name, pattern in formats.items()]
    run = d2m.submit(config_of(tmp_path, "", inputs=inputs, additional_fields=fields), local=True)
    assert run.status().complete
    assert run.verify().faults == []
    for shard, numbers, lost in (
        ("00000", range(6), []),
        (
            "00001",
            range(6, 9),
            [r"rows whose download failed are no samples: 00001[34], 00001[34]"],
        ),
    ):
        found = [made(tmp_path, f"{name}_{shard}") for name in formats]
        assert [r.rejections for _, _, r in found] == [[], [], []]
        assert [r.notices for _, _, r in found[:2]] == [[], []]
        for notice, wanted in zip(found[2][2].notices, lost, strict=True):
            assert re.fullmatch(wanted, notice)  # in the order in which downloads ended
        # The rows of tars and parquets are in the order in which their downloads ended.
        orders = [np.argsort(table["uid"].to_numpy()) for table, _, _ in found]
        first, *others = (t.take(o) for (t, _, _), o in zip(found, orders, strict=True))
        assert first["uid"].to_pylist() == [f"{i:032x}" for i in numbers]
        assert first["sha256"].null_count == 0
        assert all(other.equals(first) for other in others)
        histograms = [
            a["image-histogram"][o].tobytes() for (_, a, _), o in zip(found, orders, strict=True)
        ]
        assert len({*histograms}) == 1


def test_a_run_over_parquets_resumes_extends_and_tells_what_was_replaced(tmp_path: Path) -> None:
    path = written(tmp_path, "img2dataset")
    d2m.submit(path, local=True)
    made_at = (tmp_path / "out" / "00000.parquet").stat().st_mtime_ns
    d2m.submit(path, local=True)
    assert (tmp_path / "out" / "00000.parquet").stat().st_mtime_ns == made_at
    before, _, _ = made(tmp_path)
    more = {"postprocess_columns": [*STATS["postprocess_columns"], "image-contrast"]}
    path = config_of(tmp_path, str(tmp_path / "in" / "*.parquet"), **more)
    d2m.submit(path, local=True)
    after, _, _ = made(tmp_path)
    assert after.drop_columns(["image-contrast"]).equals(before)
    as_img2dataset(tmp_path / "in", rows(7))
    assert d2m.submit(path, local=True).verify().changed.stems == ["00000"]
    d2m.submit(path, local=True, recompute_changed=True)
    assert made(tmp_path)[0].num_rows == 7


def test_a_parquet_in_a_store_is_copied_to_the_node(tmp_path: Path) -> None:
    path = written(tmp_path, "datasets")
    with fsspec.open(f"memory://{tmp_path.name}/00000.parquet", "wb") as file:
        file.write((tmp_path / "in" / "00000.parquet").read_bytes())
    config_of(tmp_path, f"memory://{tmp_path.name}/*.parquet")
    d2m.submit(path, local=True)
    assert made(tmp_path)[0].num_rows == 19


def test_rows_have_the_keys_of_the_parquet_or_their_numbers(tmp_path: Path) -> None:
    pictures = [jpeg(i) for i in range(3)]
    for name, keys, expected in (
        ("none", None, ["000000000", "000000001", "000000002"]),
        ("text", ["a", None, ""], ["a", "000000001", "000000002"]),
        ("number", [7, 8, 9], ["7", "8", "9"]),
    ):
        columns = {"image": pictures, "text": ["x"] * 3} | ({"key": keys} if keys else {})
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(columns), tmp_path / name / "00000.parquet")
        config = config_of(tmp_path / name, f"{tmp_path}/{name}/*.parquet", additional_fields=[])
        d2m.submit(config, local=True)
        assert made(tmp_path / name)[0]["key"].to_pylist() == expected


def test_odd_values_cost_their_sample_alone(tmp_path: Path) -> None:
    """A path in place of bytes, a null picture, a null text, bytes that are no UTF-8."""
    texts = [b"fine", b"\xff\xfe", None, *[b"fine"] * 3]
    bad = pa.array(texts, pa.binary()).view(pa.string())
    image = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(4)]
    image += [{"path": "/etc/passwd"}, None]
    times = pa.array([1, 2, 3, 4, 5, 6], pa.timestamp("s"))
    columns = {"image": image, "text": bad, "when": times, "other": [b"\xff"] * 6}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "in" / "00000.parquet")
    fields = ["when", "image.path"]
    more = {"additional_fields": fields, "max_rejected_fraction": 1}
    d2m.submit(config_of(tmp_path, f"{tmp_path}/in/*.parquet", **more), local=True)
    table, _, record = made(tmp_path)
    assert table["when"].to_pylist() == ["1970-01-01 00:00:01", "1970-01-01 00:00:04"]
    assert table["image.path"].to_pylist() == ["0.jpg", "3.jpg"]
    assert [r.reason[:22] for r in record.rejections] == [
        "the text is not UTF-8:",
        "no text (txt); it has ",
        *["no image (jpg or png o"] * 2,
    ]
    assert any("images have a path and no bytes (000000004)" in n for n in record.notices)


# --- which column ---

BYTES, IMAGE = pa.binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})
TEXT = pa.string()
CHOSEN: dict[str, tuple[dict[str, pa.DataType], dict[str, Any], Columns | str]] = {
    "datasets": ({"image": IMAGE, "text": TEXT}, {}, Columns("", "image", "text")),
    "beside other bytes": (
        {"thumb": BYTES, "image": IMAGE, "caption": pa.large_string()},
        {},
        Columns("", "image", "caption"),
    ),
    "by name": (
        {"png": BYTES, "embedding": BYTES, "txt": TEXT, "key": TEXT},
        {},
        Columns("key", "png", "txt"),
    ),
    "the only bytes": (
        {"pixels": pa.large_binary(), "text": TEXT},
        {},
        Columns("", "pixels", "text"),
    ),
    "as the config says": (
        {"a": IMAGE, "B": IMAGE, "Recap": pa.dictionary(pa.int32(), TEXT)},
        {"image_key": ["none", "b"], "text_key": "recap"},
        Columns("", "B", "Recap"),
    ),
    "several": (
        {"a": IMAGE, "b": IMAGE, "text": TEXT},
        {},
        "several columns hold bytes (a, b); image_key says which",
    ),
    "URLs": (
        {"URL": TEXT, "text": TEXT},
        {},
        "it holds URLs or paths of images (column 'URL') and no images; download them first",
    ),
    "paths without bytes": (
        {"image": pa.struct({"bytes": pa.null(), "path": TEXT}), "text": TEXT},
        {},
        "it holds URLs or paths of images (column 'image')",
    ),
    "paths": (
        {"image": TEXT, "text": TEXT},
        {},
        "it holds URLs or paths of images (column 'image')",
    ),
    "nothing": ({"a": pa.int32(), "text": TEXT}, {}, "no column holds images; it has a, text"),
    "another type": (
        {"image": IMAGE, "a": TEXT, "text": TEXT},
        {"image_key": "a"},
        "the column 'a' holds string and no images (image_key)",
    ),
    "lists of texts": (
        {"image": IMAGE, "captions": pa.list_(TEXT)},
        {"text_key": "captions"},
        "the column 'captions' holds list<item: string> and no texts (text_key)",
    ),
    "no text": (
        {"image": IMAGE, "alt": TEXT},
        {},
        "no column of texts is called txt, text, caption",
    ),
    "lists in a usual place": (
        {"image": IMAGE, "text": pa.list_(TEXT)},
        {},
        "the column 'text' holds list<item: string> and no texts; no column holds texts",
    ),
    "lists, and a text": (
        {"image": IMAGE, "text": pa.list_(TEXT), "alt": TEXT},
        {},
        "the column 'text' holds list<item: string> and no texts; text_key names one, of alt",
    ),
    "not there": ({"image": IMAGE}, {"image_key": "x"}, "no column x (image_key); it has image"),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_columns_are_chosen_by_keys_or_by_names_and_types(case: str) -> None:
    columns, values, expected = CHOSEN[case]
    config = Config(models=["m"], inputs=["x"], output_metadata_dir="x", **values)
    schema = pa.schema([*columns.items()])
    if isinstance(expected, Columns):
        assert choose(schema, config, EXTENSIONS) == expected
        return
    with pytest.raises(ValueError, match=r"^") as caught:
        choose(schema, config, EXTENSIONS)
    assert str(caught.value).startswith(expected)


def test_what_no_model_asks_for_need_not_be_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a b", "c"], "url": ["u", "v"]}), tmp_path / "0.parquet")
    more = {"models": ["text-stats"], "postprocess_columns": ["text-words"]}
    more |= {"postprocess_features": [], "additional_fields": ["url"]}
    path = config_of(tmp_path, f"{tmp_path}/0.parquet", **more)
    table = d2m.submit(path, local=True).table()
    assert table.select(["text-words", "url"]).to_pydict() == {
        "text-words": [2, 1],
        "url": ["u", "v"],
    }


def test_a_parquet_of_urls_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://x/0.jpg"], "text": ["a"]}), tmp_path / "0.parquet")
    with pytest.raises(ConfigError) as caught:
        d2m.submit(config_of(tmp_path, f"{tmp_path}/*.parquet"), local=True)
    [mistake] = caught.value.mistakes
    assert "0.parquet cannot be read: it holds URLs or paths of images (column 'url')" in mistake
    assert "download them first, for example by img2dataset" in mistake


# --- sizes and damage ---

PEAK = """
import sys
from pathlib import Path
from d2m_hpc.config import Config
from d2m_hpc.worker.read.names import EXTENSIONS
from d2m_hpc.worker.read.parquet import Parquet

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

config = Config(models=["m"], inputs=["x"], output_metadata_dir="x")
before = status("VmRSS")
reader = Parquet("x", Path(sys.argv[1]), config)
index = reader.index(EXTENSIONS)
sizes = [len(reader.read(*sample.members["jpg"])) for sample in index]
print(index.count, sum(sizes), status("VmHWM") - before)
"""


def test_a_row_group_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """One row group of 320 MB, of pictures of 100 kB and some of 2 MB."""
    rng = np.random.default_rng(0)
    sizes = [2_000_000 if i % 40 == 0 else 100_000 for i in range(2160)]
    noise = rng.bytes(2_100_000)
    pictures = [noise[i : i + size] for i, size in enumerate(sizes)]
    table = pa.table({"image": pictures, "text": ["x"] * len(sizes)})
    pq.write_table(table, tmp_path / "0.parquet", use_dictionary=False, write_batch_size=16)
    assert pq.ParquetFile(tmp_path / "0.parquet").num_row_groups == 1
    command = [sys.executable, "-c", PEAK, str(tmp_path / "0.parquet")]
    count, total, peak = map(int, subprocess.check_output(command, text=True).split())
    assert (count, total) == (len(sizes), sum(sizes))
    assert peak < 120 << 20


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda data: data[:-30], "it is no whole parquet: "),
    "no footer": (lambda data: data[:200], "it is no whole parquet: "),
    "no pages": (lambda data: data[:4] + bytes(5000) + data[5004:], "it is no whole parquet: "),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_parquet_fails_its_shard_in_one_line(case: str, tmp_path: Path) -> None:
    path = written(tmp_path, "datasets")
    damage, told = DAMAGE[case]
    parquet = tmp_path / "in" / "00000.parquet"
    as_datasets(tmp_path / "in", rows())
    whole = parquet.read_bytes()
    parquet.with_name("1.parquet").write_bytes(damage(whole))  # no first, middle or last one
    for name in ("0", "2", "3"):
        parquet.with_name(f"{name}.parquet").write_bytes(whole)
    run = d2m.submit(path, local=True)
    [failure] = run.status().failures
    assert told in failure.error
    assert "\n" not in failure.error
    assert run.status().done == 4


ZIP = b"PK\x03\x04" + bytes(600)


def test_a_reader_that_is_closed_early_leaves_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    config = Config(models=["m"], inputs=["x"], output_metadata_dir="x")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ShardError, match="no whole parquet"):
        readers.opener(config)("x", tmp_path / "x.parquet", "")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["x.parquet", "x.tar"])
@pytest.mark.parametrize(
    ("data", "what"),
    [(b"", "it is empty"), (b"<html>no such file", "it is an HTML page"), (ZIP, "it is a zip")],
    ids=["empty", "HTML", "zip"],
)
def test_an_input_of_no_form_is_told_so(name: str, data: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    config = Config(models=["m"], inputs=["x"], output_metadata_dir="x")
    with pytest.raises(ShardError, match=f"^x is neither a tar nor a parquet: {what}"):
        readers.opener(config)("x", tmp_path / name, "")


# --- patterns ---


def test_outputs_never_replace_their_inputs(tmp_path: Path) -> None:
    as_datasets(tmp_path, rows(2))
    whole = (tmp_path / "00000.parquet").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    for output in (tmp_path, tmp_path / "link"):
        more = {"output_metadata_dir": f"{output}/", "reprocess": True}
        path = config_of(tmp_path, f"{tmp_path}/*.parquet", **more)
        with pytest.raises(ConfigError, match="is an input there; take a folder of the outputs'"):
            d2m.submit(path, local=True)
    assert (tmp_path / "00000.parquet").read_bytes() == whole


def test_inputs_name_parquets_and_tars_and_stems_are_their_own(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    as_datasets(tmp_path / "a", rows(2))
    as_tar(tmp_path / "a", rows(2))
    values = {**STATS, "inputs": [f"{tmp_path}/a/*.tar", f"{tmp_path}/a/*.parquet"]}
    path = write_config(tmp_path / "c.yml", values, output_metadata_dir=str(tmp_path / "out"))
    d2m.submit(path, local=True)
    first, second = sorted((tmp_path / "out").glob("*.parquet"))
    assert pq.read_table(first).equals(pq.read_table(second))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"inputs": ["x"], "input_tars": ["y"]}, "inputs: found input_tars, too; valid is one"),
        ({}, "input_tars: found nothing; the key is required, or `inputs` in its place"),
        ({"inputs": []}, "inputs: found []"),
    ],
)
def test_a_config_has_one_key_of_inputs(values: Row, told: str, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yml", {**STATS, **values, "output_metadata_dir": "out"})
    with pytest.raises(ConfigError) as caught:
        d2m.load_config(path)
    [mistake] = caught.value.mistakes
    assert mistake.startswith(told)


def test_parquets_named_as_tars_are_told_of_the_other_key(tmp_path: Path) -> None:
    as_datasets(tmp_path, rows(2))
    [mistake] = expand([f"{tmp_path}/*"]).mistakes
    assert "; `inputs` names parquets with images; valid is" in mistake
    assert expand([f"{tmp_path}/*"], key="inputs").mistakes == []
    (tmp_path / "notes.txt").write_text("none of both")
    [mistake] = expand([f"{tmp_path}/*"], key="inputs").mistakes
    assert "names 1 files that are neither tars nor parquets: 1 with .txt" in mistake


# --- the seam ---


class Zip(Reader):
    """A zip whose members are named as a tar's: all that a fourth form takes."""

    def __init__(self, url: str, path: Path, config: Config) -> None:
        self._zip = zipfile.ZipFile(path)

    def index(self, needed: Members = EXTENSIONS) -> ZipSamples:
        return ZipSamples(self._zip, needed)

    def read(self, place: str, size: int) -> bytes:
        return self._zip.read(place)

    def close(self) -> None:
        self._zip.close()


class ZipSamples(Samples):
    def __init__(self, file: zipfile.ZipFile, needed: Members) -> None:
        super().__init__(needed)
        self._file = file

    def __iter__(self) -> Iterator[Sample]:
        found: dict[str, Sample] = {}
        for info in self._file.infolist():
            key, _, extension = info.filename.partition(".")
            sample = found.setdefault(key, Sample(key))
            sample.members[extension] = (info.filename, info.file_size)
        for sample in found.values():
            self.count += 1
            yield sample


def test_a_fourth_form_takes_forty_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(readers.READERS, b"PK\x03\x04", Zip)
    assert d2m.submit(written(tmp_path / "tar", "tar"), local=True).status().complete
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "00000.zip", "w") as file:
        for name, data in _members(tmp_path / "tar" / "in" / "00000.tar").items():
            file.writestr(name, data)
    run = d2m.submit(config_of(tmp_path, f"{tmp_path}/in/*.zip"), local=True)
    assert run.verify().faults == []
    table, _, record = made(tmp_path, "00000.zip")
    same, _, other = made(tmp_path / "tar")
    assert table.equals(same)
    assert record.rejections == other.rejections


def _members(tar: Path) -> Mapping[str, bytes]:
    from d2m_hpc.worker.read.tar import ReadAhead, members

    data = tar.read_bytes()
    found = members(ReadAhead(io.BytesIO(data)), len(data))
    return {m.name: data[m.offset : m.offset + m.size] for m in found}


def test_the_first_samples_of_a_parquet_are_computed_as_those_of_a_tar(tmp_path: Path) -> None:
    tar, parquet = (d2m.head(written(tmp_path / each, each), 3) for each in ("tar", "datasets"))
    assert parquet.table.num_rows == 3
    assert parquet.table.equals(tar.table)


# --- folders of pictures ---


def pictures(folder: Path, *names: str, first: int = 0) -> Path:
    for seed, name in enumerate(names, first):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(seed))
    return folder


def of_pictures(folder: Path, **more: Any) -> Path:
    values = {"models": ["image-stats"], "postprocess_columns": ["image-phash"]}
    values |= {"postprocess_features": [], "additional_fields": []}
    return config_of(folder, str(folder / "in"), **{**values, **more})


def made_records(folder: Path) -> list[Record]:
    output = OutputDir(str(folder / "out"))
    found = (
        Pair(output, path.stem).record() for path in sorted((folder / "out").glob("*.parquet"))
    )
    return [record for record in found if record]


def keys_of(run: d2m.Run) -> dict[str, list[str]]:
    """The keys of each shard, in their order."""
    paths = sorted(Path(run.config.output_metadata_dir).glob("*.parquet"))
    return {path.stem: pq.read_table(path)["key"].to_pylist() for path in paths}


def test_a_run_over_a_folder_goes_on_as_planned_when_pictures_come(tmp_path: Path) -> None:
    pictures(tmp_path / "in", *(f"cats/{i}.jpg" for i in range(10, 17)), "dogs/10.png", "top.JPG")
    path = of_pictures(tmp_path, samples_per_shard=3)
    run = d2m.submit(path, local=True)
    before = keys_of(run)
    assert before == {
        "in": ["top"],
        "cats_00000": ["10", "11", "12"],
        "cats_00001": ["13", "14", "15"],
        "cats_00002": ["16"],
        "dogs": ["10"],
    }
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    pictures(tmp_path / "in", "cats/0.jpg", "cats/125.jpg", "cats/9.jpg", "birds/1.jpg", first=40)
    run = d2m.submit(of_pictures(tmp_path, samples_per_shard=100), local=True)
    new = {"cats_00003": ["0"], "cats_00004": ["125"], "cats_00005": ["9"], "birds": ["1"]}
    assert keys_of(run) == before | new
    assert (
        times.items()
        <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}.items()
    )
    assert run.status().complete
    assert run.verify().faults == []


def test_a_picture_that_is_replaced_or_comes_within_a_shard_is_noticed(tmp_path: Path) -> None:
    pictures(tmp_path / "in", "a/1.jpg", "a/3.jpg", "b/1.jpg")
    path = of_pictures(tmp_path)
    run = d2m.submit(path, local=True)
    assert run.verify().changed.stems == []
    pictures(tmp_path / "in", "a/2.jpg", first=9)
    assert run.verify().changed.stems == ["a"]
    run = d2m.submit(path, local=True, recompute_changed=True)
    assert keys_of(run)["a"] == ["1", "2", "3"]
    assert run.verify().changed.stems == []


def test_links_are_not_followed_and_what_is_no_sample_is_told(tmp_path: Path) -> None:
    outside = pictures(tmp_path / "outside", "secret.jpg", "more/secret.jpg")
    inside = pictures(tmp_path / "in", *(f"{i}.jpg" for i in range(9)), "x.2020.jpeg")
    (inside / "link.jpg").symlink_to(outside / "secret.jpg")
    (inside / "folder").symlink_to(outside / "more")
    (inside / "9.jpg").symlink_to(outside / "secret.jpg")
    (inside / "9.txt").write_text("its text")
    os.mkfifo(inside / "pipe.jpg")
    (inside / ".hidden.jpg").write_bytes(b"")
    (inside / "notes.md").write_text("")
    run = d2m.submit(of_pictures(tmp_path, max_rejected_fraction=1), local=True)
    [(stem, keys)] = keys_of(run).items()
    assert keys == [*map(str, range(9)), "x.2020"]
    record = Pair(OutputDir(str(tmp_path / "out")), stem).record()
    assert record is not None
    assert {r.key: r.reason for r in record.rejections} == {
        "9": "no image (jpg or png or jpeg or webp); it has txt; jpg is a link, and links are not "
        "followed",
        "link.jpg": "a link or a special file",
        "pipe.jpg": "a device, a pipe or a socket",
    }
    said = (
        "files are links (9.jpg, link.jpg); copy what they lead to in their place, as `cp -L` does"
    )
    assert said in record.notices
    assert "files are devices, pipes or sockets and are not read: pipe.jpg" in record.notices
    notes = expanded(run.config, RunDir(tmp_path / "none"), sized=False).notes
    assert notes == [
        f"{inside}: files belong to no picture and are not read: notes.md",
        f"{inside}: links to folders are not followed: folder",
    ]


def test_captions_may_be_a_csv_and_only_the_first_of_a_picture_counts(tmp_path: Path) -> None:
    pictures(tmp_path / "in", "a/1.jpg", "a/2.jpg", "b/1.jpg")
    (tmp_path / "in" / "b" / "1.txt").write_text("of its own")
    text = (
        'file_name,text,uid\na/1.jpg,"one, ""two""\nthree",u1\n./b/1.jpg,x y,u3\nb/1.jpg,again,u4\n'
    )
    (tmp_path / "in" / "captions.csv").write_text("\ufeff" + text)
    more = {"models": ["text-stats"], "postprocess_columns": ["text-words"]}
    more |= {"additional_fields": ["uid"], "max_rejected_fraction": 0.5}
    more |= {"captions": str(tmp_path / "in" / "captions.csv")}
    run = d2m.submit(of_pictures(tmp_path, **more), local=True)
    assert run.table(["key", "text-words", "uid"]).to_pydict() == {
        "key": ["1", "1"],
        "text-words": [3, 2],
        "uid": ["u1", "u3"],
    }
    records = {s: Pair(OutputDir(str(tmp_path / "out")), s).record() for s in "ab"}
    assert records["a"] is not None
    assert records["b"] is not None
    assert [tuple(r) for r in records["a"].rejections] == [("2", "no text (txt); it has jpg")]
    assert "pictures have no row in the captions file: 2.jpg" in records["a"].notices
    assert sorted(records["b"].notices) == [
        "files are not read, as the captions file has a row of their picture: 1.txt",
        "further captions of a picture are not read: 1.jpg",
    ]
    # The file is told apart from those of no picture, and by its size and time, as pictures are.
    assert not expanded(run.config, RunDir(tmp_path / "none"), sized=False).notes
    assert run.verify().changed.stems == []
    (tmp_path / "in" / "captions.csv").write_text(text.replace("x y", "only"))
    assert sorted(run.verify().changed.texts) == ["a", "b"]
    run = d2m.submit(of_pictures(tmp_path, **more), local=True, recompute_changed=True)
    assert run.table()["text-words"].to_pylist() == [3, 1]


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize(("on_disk", "in_file"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_captions_are_found_by_names_that_macos_has_decomposed(
    tmp_path: Path, kind: str, on_disk: Any, in_file: Any
) -> None:
    name = unicodedata.normalize(on_disk, "Ärger/Größe é.jpg")
    pictures(tmp_path / "in", name, "plain.jpg")
    rows = [
        {"file_name": unicodedata.normalize(in_file, name), "text": "one two three"},
        {"file_name": "plain.jpg", "text": "a caption"},
    ]
    path = tmp_path / "in" / f"c.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        lines = ["file_name,text", *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"models": ["text-stats"], "postprocess_columns": ["text-words"]}
    run = d2m.submit(of_pictures(tmp_path, captions=str(path), **more), local=True)
    assert sorted(run.table()["text-words"].to_pylist()) == [2, 3]


@pytest.mark.parametrize("most", [2, 1])
def test_pictures_whose_names_differ_by_their_form_alone_keep_their_captions(
    tmp_path: Path, most: int
) -> None:
    """Also if they are in different shards; a row of one is never the other's."""
    composed, decomposed = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))
    pictures(tmp_path / "in", composed, decomposed)
    path = tmp_path / "in" / "c.csv"
    more: dict[str, Any] = {"models": ["text-stats"], "postprocess_columns": ["text-words"]}
    more |= {"captions": str(path), "samples_per_shard": most, "max_rejected_fraction": 1.0}
    path.write_text(f"file_name,text\n{decomposed},of the other one\n{composed},mine\n")
    run = d2m.submit(of_pictures(tmp_path, **more), local=True)
    words = dict(zip(*run.table(["key", "text-words"]).to_pydict().values(), strict=True))
    assert words == {composed[:-4]: 1, decomposed[:-4]: 4}
    path.write_text(f"file_name,text\n{decomposed},of the other one\n")
    run = d2m.submit(of_pictures(tmp_path, **more), local=True, recompute_changed=True)
    assert run.table(["key"])["key"].to_pylist() == [decomposed[:-4]]


WORDS: dict[str, Any] = {"models": ["text-stats"], "postprocess_columns": ["text-words"]}


@pytest.mark.parametrize("most", [100, 1])
@pytest.mark.parametrize(("of_picture", "of_text"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_texts_are_found_beside_pictures_by_names_that_macos_has_decomposed(
    tmp_path: Path, most: int, of_picture: Any, of_text: Any
) -> None:
    picture = unicodedata.normalize(of_picture, "Größe é.jpg")
    folder = pictures(tmp_path / "in", picture, "Gr.jpg", "z.jpg")
    text = folder / unicodedata.normalize(of_text, "Größe é.txt")
    text.write_text("one two three")
    for name in ("Gr.txt", "z.txt"):
        (folder / name).write_text("a b")
    run = d2m.submit(of_pictures(tmp_path, samples_per_shard=most, **WORDS), local=True)
    words = dict(zip(*run.table(["key", "text-words"]).to_pydict().values(), strict=True))
    assert words == {picture[:-4]: 3, "Gr": 2, "z": 2}
    assert expanded(run.config, RunDir(tmp_path / "none"), sized=False).notes == []
    assert run.verify().changed.stems == []
    text.write_text("one two three four")
    assert len(run.verify().changed.stems) == 1


@pytest.mark.parametrize("most", [100, 1])
def test_a_text_is_of_the_picture_of_its_own_name(tmp_path: Path, most: int) -> None:
    names = [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")]
    folder = pictures(tmp_path / "in", *names, "Å.jpg", "A\u030a.jpg")
    (folder / f"{names[1][:-4]}.txt").write_text("mine alone")
    (folder / "\u212b.txt").write_text("of neither, as both names differ by their form alone")
    more = {"samples_per_shard": most, "max_rejected_fraction": 1.0}
    run = d2m.submit(of_pictures(tmp_path, **more, **WORDS), local=True)
    assert run.table(["key"])["key"].to_pylist() == [names[1][:-4]]
    [note] = expanded(run.config, RunDir(tmp_path / "none"), sized=False).notes
    assert note.endswith("files belong to no picture and are not read: \u212b.txt")
    (folder / f"{names[0][:-4]}.txt").write_text("a text of its own")
    run = d2m.submit(of_pictures(tmp_path, **more, **WORDS), local=True, recompute_changed=True)
    assert run.table()["text-words"].to_pylist() == [2, 5]


def test_a_folder_is_listed_once_for_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "in", *(f"é{i}.jpg" for i in range(6)))
    path = tmp_path / "in" / "c.csv"
    path.write_text("file_name,text\n" + "".join(f"é{i}.jpg,one two\n" for i in range(6)))
    more = {"captions": str(path), "samples_per_shard": 2}
    config = load(of_pictures(tmp_path, **more, **WORDS))
    urls = [*expanded(config, RunDir(tmp_path / "none"), sized=False).sizes]
    listed: list[str] = []
    for name in ("listdir", "scandir"):
        real = getattr(os, name)
        spy = lambda path, real=real: listed.append(str(path)) or real(path)  # noqa: E731
        monkeypatch.setattr(os, name, spy)
    for url in urls:
        with closing(PictureFolder(url, config)) as reader:
            assert all({"jpg", "json", "txt"} == {*s.members} for s in reader.index())
    assert listed == [str(folder)] * 3


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_each_row_on_a_picture_that_is_not_there_is_told_by_one_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Before, within, between and behind the slices of a folder; a decomposed name is there."""
    there = ["1.jpg", "3.jpg", "5-b.jpg", "7.jpg", "sub/1.jpg", "o\u0308.jpg", "p.jpg", "z.jpg"]
    monkeypatch.setattr("d2m_hpc.worker.read.members.SHOWN", 20)
    folder = pictures(tmp_path / "in", *there)
    (folder / "4.txt").write_text("of no picture")
    gone = [
        "0.jpg",
        "2.jpg",
        "3b.PNG",
        "4.jpg",
        "5.jpg",
        "6.jpg",
        "8.jpg",
        "zz.jpg",
        "sub/2.jpg",
        "\u00e4.jpg",
    ]
    named = [*there[:-3], "\u00f6.jpg", *there[-2:], *gone, "4.txt", "none/1.jpg", "2.jpg"]
    table = pa.table({"file_name": named, "text": ["a b"] * len(named)})
    path = tmp_path / "in" / f"c.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "csv":
        table.to_pandas().to_csv(path, index=False)
    else:
        path.write_text("\n".join(map(json.dumps, table.to_pylist())))
    more = {"models": ["text-stats"], "postprocess_columns": ["text-words"]}
    run = d2m.submit(
        of_pictures(tmp_path, captions=str(path), samples_per_shard=2, **more), local=True
    )
    assert run.table().num_rows == len(there)
    output = OutputDir(str(tmp_path / "out"))
    records = [Pair(output, p.stem).record() for p in (tmp_path / "out").glob("*.parquet")]
    told = [n.partition(": ") for record in records if record for n in record.notices]
    assert {what for what, _, _ in told} == {
        "rows of the captions file are on pictures that are not there"
    }
    names = [name for _, _, some in told for name in some.split(", ")]
    assert sorted(names) == sorted([*(name.rpartition("/")[2] for name in gone), "2.jpg"])


def test_a_shard_that_failed_with_its_captions_has_a_record_like_others(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", "1.jpg", "2.jpg")
    (folder / "a.csv").write_text("file_name,text\n1.jpg,one\n")
    more = {"models": ["text-stats"], "postprocess_columns": ["text-words"]}
    run = d2m.submit(of_pictures(tmp_path, captions=str(folder / "a.csv"), **more), local=True)
    [failure] = run.status().failures
    assert failure.error.startswith(f"{tmp_path}/in (1 to 2): 1 of 2 samples are rejected")
    assert "pictures have no row in the captions file: 2.jpg" in failure.error
    assert not run.verify().faults


def test_a_caption_is_that_of_the_picture_which_is_read(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", "1.bmp", "1.JPG")
    (folder / "a.csv").write_text("file_name,text\n1.bmp,no\n1.JPG,a longer one\n")
    more = {"models": ["text-stats"], "postprocess_columns": ["text-words"]}
    path = of_pictures(tmp_path, captions=str(folder / "a.csv"), **more)
    assert d2m.submit(path, local=True).table()["text-words"].to_pylist() == [3]


def test_captions_in_a_parquet_are_those_of_json_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "folder")
    d2m.submit(path, local=True)
    table, _, record = made(tmp_path)
    more = {"captions": str(tmp_path / "in" / "captions.parquet")}
    d2m.submit(
        config_of(tmp_path, f"{tmp_path}/in", output_metadata_dir=f"{tmp_path}/2", **more),
        local=True,
    )
    assert pq.read_table(tmp_path / "2" / "00000.parquet").equals(table)
    assert record.rows == 19


WRONG = {
    "of another kind": ("a.txt", "", "found 'a.txt'; valid is a jsonl, csv or parquet"),
    "missing": ("in/none.csv", None, "which is no file here; check the path"),
    "aside": ("other/a.csv", "file_name\n", "or above, as its paths begin there"),
}


@pytest.mark.parametrize("case", WRONG)
def test_captions_that_cannot_be_those_of_the_pictures_are_refused(
    case: str, tmp_path: Path
) -> None:
    name, text, told = WRONG[case]
    pictures(tmp_path / "in", "1.jpg")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        d2m.submit(of_pictures(tmp_path, captions=str(tmp_path / name)), local=True)
    [mistake] = caught.value.mistakes
    assert mistake.startswith("captions: ")
    assert told in mistake


BROKEN = {
    "a.jsonl": (
        '{"file_name": "1.jpg"}\n{broken\n',
        "it cannot be read: line 2: the JSON cannot be parsed",
    ),
    "a.csv": ("name,text\n1.jpg,a\n", "no row has 'file_name', the picture's path"),
    "a.parquet": ("PAR1", "it cannot be read: "),
    "comma.csv": (
        "file_name,text\n1.jpg,one, two\n",
        "it cannot be read: line 2 has more values than the first line has names; a value with a",
    ),
    "break.csv": (
        "file_name,text\n1.jpg,one\ntwo\n",
        "it cannot be read: line 3 has fewer values than the first line has names; a value with a "
        "line break stands in double quotes",
    ),
    "semicolon.csv": (
        "file_name;text\n1.jpg;one\n",
        "it cannot be read: its first line is 'file_name;text'; take commas between values",
    ),
    "other.jsonl": (
        '{"image": "1.jpg", "text": "a"}\n',
        "no row has 'file_name', the picture's path, as a text; it has image, text",
    ),
    "open.csv": (
        'file_name,text\n0.jpg,"a\nb"\n1.jpg,"one\n2.jpg,two\n',
        "it cannot be read: the row that begins in line 4 has a double quote that is not closed",
    ),
    "16.csv": ("\ufefffile_name,text\n", "it cannot be read: it is not UTF-8; save it as UTF-8"),
    "16.jsonl": ("\ufeff{}\n", "it cannot be read: it is UTF-16; save it as UTF-8"),
    "latin.jsonl": (
        '{"file_name": "1.jpg"}\n{"text": "\udce9"}\n',
        "it cannot be read: line 2: the JSON is not UTF-8: invalid continuation byte at byte 10",
    ),
    "mark.jsonl": (
        '{"file_name": "1.jpg" "text": "a"}\n',
        "it cannot be read: line 1: the JSON cannot be parsed: Expecting ',' delimiter at "
        "column 23",
    ),
    "twice.csv": ("file_name,text,text\n1.jpg,a,b\n", "it cannot be read: two of its"),
    "list.jsonl": ('{"file_name": ["1.jpg"]}\n', "no row has 'file_name', the picture's path"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_captions_fail_the_shard_in_one_line(name: str, tmp_path: Path) -> None:
    pictures(tmp_path / "in", "1.jpg")
    text, told = BROKEN[name]
    coded = text.encode("utf-16" if "16" in name else "utf-8", "surrogateescape")
    (tmp_path / "in" / name).write_bytes(coded.replace(b"\xff\xfe\xff\xfe", b"\xff\xfe"))
    run = d2m.submit(of_pictures(tmp_path, captions=str(tmp_path / "in" / name)), local=True)
    [failure] = run.status().failures
    assert f"{tmp_path}/in/{name}: {told}" in failure.error
    assert "\n" not in failure.error


def test_a_parquet_of_captions_without_paths_names_its_columns(tmp_path: Path) -> None:
    pictures(tmp_path / "in", "1.jpg")
    captions = tmp_path / "in" / "a.parquet"
    for columns, told in (({"path": ["1.jpg"]}, "path"), ({"file_name": [b"1.jpg"]}, "file_name")):
        pq.write_table(pa.table(columns), captions)
        run = d2m.submit(of_pictures(tmp_path, captions=str(captions)), local=True)
        [failure] = run.status().failures
        said = f"no row has 'file_name', the picture's path, as a text; it has {told}"
        assert said in failure.error


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_without_a_path_and_captions_that_are_no_texts_are_told(
    tmp_path: Path, kind: str
) -> None:
    """Such rows passed without a word, as did numbers, but for their samples' missing text."""
    pictures(tmp_path / "in", *(f"{i}.jpg" for i in range(4)))
    texts: list[Any] = ["one", "x", "y", "four"]
    if kind == "parquet":
        texts = [None, b"x", b"y", b"\xff"]
    elif kind == "jsonl":
        texts[3] = 7
    names = ["0.jpg", None, None, "1.jpg"]
    found = [{"file_name": n, "text": t, "n": 1} for n, t in zip(names, texts, strict=True)]
    captions = tmp_path / "in" / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(found), captions)
    elif kind == "csv":
        pa.Table.from_pylist(found).to_pandas().to_csv(captions, index=False)
    else:
        captions.write_text("\n".join(map(json.dumps, found)))
    more = {"models": ["text-stats"], "postprocess_columns": ["text-words"]}
    more |= {"additional_fields": ["n"], "samples_per_shard": 2, "max_rejected_fraction": 1.0}
    d2m.submit(of_pictures(tmp_path, captions=str(captions), **more), local=True)
    records = made_records(tmp_path)
    told = [note for record in records for note in record.notices]
    assert told.count("rows of the captions file have no `file_name`: 2") == 1
    of = {"jsonl": "int", "csv": "", "parquet": "bytes"}[kind]
    said = [f"rows of the captions file hold {of} in place of a text: 1.jpg"] if of else []
    assert [note for note in told if "in place of a text" in note] == said


def test_columns_of_bytes_in_a_captions_file_are_no_fields(tmp_path: Path) -> None:
    """They became texts such as b'..'."""
    pictures(tmp_path / "in", "0.jpg")
    captions = tmp_path / "in" / "a.parquet"
    pq.write_table(pa.table({"file_name": ["0.jpg"], "n": [1], "thumb": [b"\xff"]}), captions)
    path = of_pictures(tmp_path, captions=str(captions), additional_fields=["n", "thumb"])
    with pytest.raises(ConfigError, match="has the field 'thumb'; valid: file_name, n"):
        d2m.submit(path, local=True)


def test_a_csv_may_have_numbers_of_rows_without_a_name(tmp_path: Path) -> None:
    """As pandas writes it; they counted as more values than names."""
    pictures(tmp_path / "in", "1.jpg")
    captions = tmp_path / "in" / "a.csv"
    captions.write_text(",file_name,text\n1,1.jpg,one\n")
    path = of_pictures(tmp_path, captions=str(captions), additional_fields=["text"])
    run = d2m.submit(path, local=True)
    assert run.status().complete
    assert run.table(["text"])["text"].to_pylist() == ["one"]


def test_pictures_that_are_gone_fail_their_shard(tmp_path: Path) -> None:
    pictures(tmp_path / "in", "a/1.jpg", "b/1.jpg")
    path = of_pictures(tmp_path)
    plan = expanded(d2m.load_config(path), RunDir(tmp_path / "none"), sized=False)
    reader = readers.opener(d2m.load_config(path))
    for url, told in zip(
        plan.sizes, ("none of the shard's pictures", "it cannot be listed"), strict=True
    ):
        folder = Path(Slice.of(url).folder)
        (folder / "1.jpg").unlink()
        if "listed" in told:
            folder.rmdir()
        with pytest.raises(ShardError, match=told), closing(reader(url, Path(), "")) as shard:
            shard.index()


def test_a_file_that_becomes_a_link_or_shorter_is_not_read(tmp_path: Path) -> None:
    pictures(tmp_path, "in/1.jpg", "secret.jpg")
    config = d2m.load_config(of_pictures(tmp_path))
    [url] = expanded(config, RunDir(tmp_path / "none"), sized=False).sizes
    with closing(readers.opener(config)(url, Path(), "")) as shard:
        [sample] = shard.index()
        (tmp_path / "in" / "1.jpg").write_bytes(b"\xff\xd8")
        with pytest.raises(ShardError, match="changed while the shard was read"):
            shard.read(*sample.members["jpg"])
        (tmp_path / "in" / "1.jpg").unlink()
        (tmp_path / "in" / "1.jpg").symlink_to(tmp_path / "secret.jpg")
        with pytest.raises(ShardError, match="cannot be read: Too many levels of symbolic links"):
            shard.read(*sample.members["jpg"])


def test_a_folder_without_pictures_is_told_what_it_may_stand_for(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    as_tar(tmp_path / "in", rows(2))
    with pytest.raises(ConfigError) as caught:
        d2m.submit(of_pictures(tmp_path), local=True)
    [mistake] = caught.value.mistakes
    assert f"inputs: found no picture in {tmp_path}/in or below; name parquets and tars" in mistake
    d2m.submit(
        config_of(tmp_path, str(tmp_path / "in"), inputs=None, input_tars=str(tmp_path / "in")),
        local=True,
    )
    assert made(tmp_path)[0].num_rows == 2


@pytest.mark.parametrize("name", ["picture", "parquet", "tar"])
def test_a_folder_whose_name_is_not_utf8_is_told_by_every_command(
    tmp_path: Path, name: str
) -> None:
    """Of pictures, a submit and a head ended with a traceback; init wrote a config."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/caf\xe9"))
    folder.mkdir(parents=True)
    if name == "picture":
        pictures(folder, "1.jpg", "2.jpg", "3.jpg")
        path = of_pictures(tmp_path, samples_per_shard=1)
    elif name == "tar":
        as_tar(folder, rows(2))
        path = config_of(tmp_path, "", inputs=None, input_tars=f"{tmp_path}/in/*/*.tar")
    else:
        with open(folder / "0.parquet", "wb") as file:
            pq.write_table(pa.table({"jpg": [jpeg()]}), file)
        path = config_of(tmp_path, f"{tmp_path}/in/*/*.parquet")
    for command in (
        lambda: d2m.submit(path, local=True),
        lambda: d2m.head(path),
        lambda: d2m.init(tmp_path / "in", tmp_path / "new.yml"),
    ):
        with pytest.raises(ConfigError) as caught:
            command()
        [mistake] = caught.value.mistakes
        assert f"the name '{tmp_path}/in/caf\\xe9" in mistake
        assert "' is not UTF-8; rename it" in mistake
    assert not (tmp_path / "new.yml").exists()


def test_the_report_shows_pictures_of_folders_and_parquets(tmp_path: Path) -> None:
    for kind in ("files", "datasets"):
        run = d2m.submit(written(tmp_path / kind, kind), local=True)
        page = tmp_path / f"{kind}.html"
        run.report(page)
        text = page.read_text()
        assert text.count("data:image/jpeg;base64") >= 6
        assert "W\u00f6rtchen" in text


def test_a_shard_of_a_folder_that_was_forgotten_does_not_come_back(tmp_path: Path) -> None:
    pictures(tmp_path / "in", *(f"{i}.jpg" for i in range(4)))
    path = of_pictures(tmp_path, samples_per_shard=2)
    run = d2m.submit(path, local=True)
    assert [*keys_of(run)] == ["in_00000", "in_00001"]
    assert d2m_command("forget", path, "in_00001").returncode == 0
    (tmp_path / "out" / "in_00001.parquet").unlink(missing_ok=True)
    run = d2m.submit(path, local=True)
    assert [*keys_of(run)] == ["in_00000"]
    assert run.status().shards == 1


def test_datacomps_tools_are_given_tars_only(tmp_path: Path) -> None:
    pictures(tmp_path / "in", "1.jpg")
    run = d2m.submit(of_pictures(tmp_path), local=True)
    with pytest.raises(ConfigError, match="inputs: DataComp's tools read tars"):
        run.export_datacomp(tmp_path / "export")


def test_parquets_on_the_hub_are_read_and_no_token_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path, "datasets")
    repo = "datasets/me/pictures"
    with hubs.serving() as hub:
        data = (tmp_path / "in" / "00000.parquet").read_bytes()
        hub.put_files(repo, {"data/00000.parquet": data, "README.md": b"x"})
        hub.gated.add(repo)
        path = config_of(tmp_path, f"hf://{repo}/data/*.parquet")
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hubs.TOKEN, "HF_HOME": str(tmp_path / "home")}
        # Tasks that other tests ran in this process have told it to ask no hub.
        others = {name: value for name, value in os.environ.items() if name not in OFFLINE}
        ended = submit(path, env={**others, **env})
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert made(tmp_path)[0].num_rows == 19
        assert hub.leaked == []
    kept = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not [p for p in kept if hubs.TOKEN.encode() in p.read_bytes()]


@pytest.mark.parametrize("is_on_hub", [True, False])
def test_tasks_ask_the_hub_for_shards_alone(
    is_on_hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    task._set_variables(RunDir(tmp_path), is_on_hub)
    assert ("HF_HUB_OFFLINE" not in os.environ) is is_on_hub
