"""Lists of kept samples, and the tars of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import STATS, jpeg, write_config, write_shards
from kit import d2m as command
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

import d2m_hpc as d2m
from d2m_hpc.errors import ConfigError, D2MError


@pytest.fixture
def run(tmp_path: Path) -> d2m.Run:
    write_shards(tmp_path / "tars", 3, 4)
    places = {
        "input_tars": str(tmp_path / "tars" / "*.tar"),
        "output_metadata_dir": str(tmp_path / "out"),
    }
    return d2m.submit(write_config(tmp_path / "c.yml", STATS, **places), local=True)


def submitted(folder: Path, inputs: str, **more: Any) -> d2m.Run:
    """A run over other inputs than tars."""
    names = {"models": ["image-stats"], "postprocess_columns": ["image-phash"], "device": "cpu"}
    places = {"inputs": str(folder / inputs), "output_metadata_dir": str(folder / "out")}
    (folder / "c.yml").write_text(json.dumps({**names, **places, **more}))
    return d2m.submit(folder / "c.yml", local=True)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def lines(path: Path) -> dict[str, Any]:
    found = map(json.loads, path.read_text().splitlines())
    return {line["shard"]: line["keys"] for line in found}


def test_the_tars_have_the_kept_samples_with_all_their_members(
    run: d2m.Run, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.jsonl"
    where = "caption LIKE '%1' OR caption LIKE '%3' AND key < '00001'"
    run.select(kept, where)
    assert lines(kept) == {
        "00000": ["000000001", "000000003"],
        "00001": ["000010001"],
        "00002": ["000020001"],
    }
    done = command(
        "export", "subset-tars", tmp_path / "c.yml", "-o", tmp_path / "kept", "--lists", kept
    )
    assert "4 rows of 3 shards, 3 parts written" in done.stdout
    for stem, keys in lines(kept).items():
        whole = members(tmp_path / "tars" / f"{stem}.tar")
        found = members(tmp_path / "kept" / f"{stem}.tar")
        assert found == {n: data for n, data in whole.items() if n.partition(".")[0] in keys}
    tar = tmp_path / "kept" / "00000.tar"
    with tar.open("rb") as file:
        read = [*group_by_keys(tar_file_expander([{"url": str(tar), "stream": file}]))]
    assert [sample["__key__"] for sample in read] == ["000000001", "000000003"]

    refused = command("select", tmp_path / "c.yml", "--sample", "0", "-o", kept)
    assert "--top and --sample: found 0; valid is more" in refused.stderr

    # Of lists that are divided among tasks, some may be empty.
    (tmp_path / "none.jsonl").touch()
    nothing = run.export("subset-tars", tmp_path / "none", lists=tmp_path / "none.jsonl")
    assert (nothing.rows, nothing.parts) == (0, 0)

    # The same again writes nothing; other lists write what they change, and remove the rest.
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert run.export("subset-tars", tmp_path / "kept", lists=kept).written == 0
    run.select(kept, "caption LIKE '%1' AND key < '00002'")
    assert run.export("subset-tars", tmp_path / "kept", lists=kept).written == 1
    tars = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.tar")}
    assert tars.keys() == {"00000.tar", "00001.tar"}
    assert tars["00001.tar"] == before["00001.tar"]


def test_a_tar_that_has_changed_is_named(run: d2m.Run, tmp_path: Path) -> None:
    run.select(tmp_path / "kept.jsonl")
    write_shards(tmp_path / "tars", 2, 3)
    with pytest.raises(D2MError, match=r"0000\d.tar: 1 kept samples are not there, such as '0000"):
        run.export("subset-tars", tmp_path / "kept", lists=tmp_path / "kept.jsonl")
    assert not (tmp_path / "kept" / "00000.tar").exists()


def test_pictures_of_a_parquet_are_named_by_their_format_and_keys_have_no_dot(
    tmp_path: Path,
) -> None:
    image, data = Image.new("RGB", (8, 8)), []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"):
        image.save(buffer := io.BytesIO(), kind)
        data.append(buffer.getvalue())
    keys = [f"a.b/x.{i}" for i in range(9)]
    pq.write_table(pa.table({"image": data, "key": keys}), tmp_path / "a.parquet")
    run = submitted(tmp_path, "a.parquet", image_key="image")
    run.select(kept := tmp_path / "kept.jsonl")
    run.export("subset-tars", tmp_path / "kept", lists=kept)
    found = members(tmp_path / "kept" / "a.tar")
    kinds = ("jpg", "png", "webp", "gif", "bmp", "tif", "avif", "jp2", "ppm")
    pictures = {f"a.b/x_{i}.{kind}": d for i, (kind, d) in enumerate(zip(kinds, data, strict=True))}
    assert {n: d for n, d in found.items() if not n.endswith(".json")} == pictures


@pytest.mark.parametrize("keys", [["a", "a"], ["a.b", "a_b"]])
def test_samples_that_a_tar_would_mix_are_told(tmp_path: Path, keys: list[str]) -> None:
    table = pa.table({"image": [jpeg(0), jpeg(1)], "key": keys})
    pq.write_table(table, tmp_path / "a.parquet")
    run = submitted(tmp_path, "a.parquet")
    run.select(tmp_path / "kept.jsonl")
    with pytest.raises(D2MError, match=r"several samples are 'a(_b)?' in a tar"):
        run.export("subset-tars", tmp_path / "kept", lists=tmp_path / "kept.jsonl")
    assert not [*(tmp_path / "kept").glob("*.tar")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no json", "cannot be read: Expecting value"),
        ('{"keys": []}', "cannot be read: 'shard'"),
        ('{"shard": "00007", "keys": []}', "found the shard '00007', which is none of"),
    ],
)
def test_mistakes_in_the_lists_are_told(run: d2m.Run, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "kept.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=told):
        run.export("subset-tars", tmp_path / "kept", lists=tmp_path / "kept.jsonl")
