"""The files for DataComp's tools, read as those read them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import DATACOMP
from pools import make_run, table, uid

from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.plan.forget import forget, remember
from d2m_hpc.run.records import Shard
from d2m_hpc.run.shards import write_shards
from d2m_hpc.subsets.datacomp import BLUR, Export, export, lacking, numbering

STEMS = ["00000000", "00000001"]


def _shards(stems: list[str] = STEMS, samples: int = 3) -> dict[str, Any]:
    return {
        stem: table([uid(10 * i + j) for j in range(samples)], [0.5] * samples)
        for i, stem in enumerate(stems)
    }


def _export(folder: Path, shards: dict[str, Any], missing: bool = False, **more: Any) -> Export:
    return export(*make_run(folder, shards, **more), folder / "files", missing)


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / "files" / name).read_bytes())


def test_sizes_are_of_all_samples_that_the_resharder_reads(tmp_path: Path) -> None:
    """Three rows a tar, and one sample that was rejected."""
    _export(tmp_path, _shards())
    assert _read(tmp_path, "sizes.json") == {"00000000.tar": 4, "00000001.tar": 4}


def test_the_blur_map_leads_from_each_tar_to_its_parquet(tmp_path: Path) -> None:
    _export(tmp_path, _shards())
    found = _read(tmp_path, "blur_metadata_map.json")
    by_tar = {shard: entry["parquet"] for entry in found.values() for shard in entry["shards"]}
    assert by_tar == {
        f"{tmp_path}/tars/{stem}.tar": f"{tmp_path}/out/{stem}.parquet" for stem in STEMS
    }


def test_on_a_store_parquets_are_named_by_url(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/out"
    try:
        _export(tmp_path, _shards(), url=url)
        for entry in _read(tmp_path, "blur_metadata_map.json").values():
            with fsspec.open(entry["parquet"], "rb") as file:
                assert pq.read_table(file).num_rows == 3
    finally:
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_the_command_names_the_tars_and_the_files(tmp_path: Path) -> None:
    found = _export(tmp_path, _shards(["00007", "00009"]))
    (command,) = found.commands
    words = shlex.split(command)
    options = dict(zip(words[2::2], words[3::2], strict=False))
    assert options["-i"] == f"{tmp_path}/tars"
    assert options["--shard-format"] == "{:05d}.tar"
    assert (options["--first-shard"], options["-n"]) == ("7", "3")
    assert options["--shard-table"] == f"{tmp_path}/files/sizes.json"
    assert options["--blur-metadata-map"] == f"{tmp_path}/files/blur_metadata_map.json"
    assert {Path(p) for p in (options["--shard-table"], options["--blur-metadata-map"])} == set(
        found.files
    )


@pytest.mark.parametrize(
    ("names", "numbered"),
    [
        (["00000000.tar"], ("{:08d}.tar", 0, 1)),
        (["00007.tar", "00012.tar"], ("{:05d}.tar", 7, 6)),
        (["9.tar", "10.tar"], ("{:01d}.tar", 9, 2)),
        (["99.tar", "100.tar"], ("{:02d}.tar", 99, 2)),
        (["part-3_01.tar", "part-3_02.tar"], ("part-3_{:02d}.tar", 1, 2)),
        (["{a}0.tar"], ("{{a}}{:01d}.tar", 0, 1)),
        (["1.tar", "01.tar"], None),
        (["a1.tar", "b2.tar"], None),
        (["photos.tar"], None),
        (["00000.tgz"], None),
    ],
)
def test_the_resharder_counts_through_the_names(names: list[str], numbered: Any) -> None:
    assert numbering(names) == numbered
    if numbered:
        form, first, count = numbered
        assert set(names) <= {form.format(i) for i in range(first, first + count)}


def test_tars_without_numbers_are_reported(tmp_path: Path) -> None:
    found = _export(tmp_path, _shards(["photos", "paintings"]))
    assert found.commands == []
    assert found.unnamed == [f"{tmp_path}/tars"]


def test_tars_of_a_store_have_their_table_beside_them(tmp_path: Path) -> None:
    run, config = make_run(tmp_path, _shards(["00000000"]))
    pipe = Shard("00000000", "pipe:aws s3 cp s3://bucket/tars/00000000.tar -")
    write_shards(run.shards, [pipe])
    (command,) = export(run, config, tmp_path / "files").commands
    assert "-i s3://bucket/tars " in command
    assert "--shard-table sizes.json " in command


def test_several_folders_of_tars_get_a_table_and_a_command_each(tmp_path: Path) -> None:
    run, config = make_run(tmp_path, _shards(["a_0", "b_0"]))
    write_shards(run.shards, [Shard("a_0", "/a/0.tar"), Shard("b_0", "/b/0.tar")])
    found = export(run, config, tmp_path / "files")
    assert [_read(tmp_path, f"sizes-{i}.json") for i in range(2)] == [{"0.tar": 4}] * 2
    assert [shlex.split(c)[3] for c in found.commands] == ["/a", "/b"]


def test_unfinished_shards_are_an_error_unless_they_are_allowed(tmp_path: Path) -> None:
    shards = {**_shards(), "00000002": None}
    with pytest.raises(D2MError, match=r"1 of 3 shards are not finished \(00000002\).*--allow"):
        _export(tmp_path, shards)
    assert not (tmp_path / "files").exists()
    (tmp_path / "again").mkdir()
    found = _export(tmp_path / "again", shards, missing=True)
    assert found.missing == ["00000002"]
    assert list(_read(tmp_path / "again", "sizes.json")) == ["00000000.tar", "00000001.tar"]


def test_repeated_uids_are_counted(tmp_path: Path) -> None:
    shards = {"0": table([uid(0), uid(1)], [0.5] * 2), "1": table([uid(1), uid(1)], [0.5] * 2)}
    assert _export(tmp_path, shards).repeated == 2


def test_rows_without_a_uid_are_no_repetition(tmp_path: Path) -> None:
    shards = {"0": table([None, uid(0), ""], [0.5] * 3), "1": table([None, "no uid"], [0.5] * 2)}
    assert _export(tmp_path, shards).repeated == 0


def test_the_full_workload_lacks_nothing() -> None:
    where = {"input_tars": ["unused"], "output_metadata_dir": "unused"}
    assert lacking(configs.Config(**DATACOMP, **where, use_datacomp_keys=True)) == {}


def test_each_tool_that_cannot_run_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    _, config = make_run(tmp_path, _shards(), additional_fields=["uid", "original_width"])
    assert lacking(config) == {
        "baselines.py --name basic_filter": ["original_height"],
        "image_based_clustering.py --embedding_key b32_img": ["b32_img"],
    }


def test_without_faces_there_is_no_blur_map(tmp_path: Path) -> None:
    columns = ["oai-clip-vit-b32-score"]
    found = _export(tmp_path, _shards(), postprocess_columns=columns)
    assert [f.name for f in found.files] == ["sizes.json"]
    assert found.lacking[BLUR] == ["face_bboxes"]
    assert "--blur-metadata-map" not in found.commands[0]


def test_without_captions_there_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no column 'caption', of which DataComp's `text`"):
        _export(tmp_path, _shards(), use_datacomp_keys=False, postprocess_features=[])


FEATURES = {"oai-clip-vit-l14-image": "l14_img", "oai-clip-vit-l14-text": "l14_txt"}


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("row", [1, 300], ids=["blocks of rows", "blocks of one row"])
def test_rows_that_datacomp_cannot_use_are_in_neither_copied_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, row: int
) -> None:
    """The outputs by DataComp's names, also those of shards without any such row."""
    monkeypatch.setattr("d2m_hpc.run.pair.BLOCK", 100)
    captions: list[list[str | None]] = [[f"of {i}" for i in range(20)], ["a", None, "b"], [None]]
    uids: list[list[str | None]] = [[uid(i) for i in range(20)], ["no uid", uid(1), "AB"], [uid(9)]]
    shards, arrays, rng = {}, {}, np.random.default_rng(0)
    for number, (texts, ids) in enumerate(zip(captions, uids, strict=True)):
        stem = f"{number:08d}"
        shards[stem] = table(ids, [0.5] * len(ids), caption=pa.array(texts, pa.string()))
        arrays[stem] = {n: rng.random((len(ids), 4, row)).astype(kind) for n in FEATURES}
    more = {"use_datacomp_keys": False, "postprocess_features": [*FEATURES]}
    more["additional_fields"] = ["uid", "original_width", "caption"]
    run, config = make_run(tmp_path, shards, **more)
    for stem, made in arrays.items():
        np.savez(tmp_path / "out" / f"{stem}.npz", **made)
    found = export(run, config, tmp_path / "files")
    assert (found.renamed, found.left_out) == (f"{tmp_path}/files/metadata", 3)
    keep = {"00000000": [*range(20)], "00000001": [2], "00000002": []}
    for stem, rows in keep.items():
        columns = pq.read_table(tmp_path / "files" / "metadata" / f"{stem}.parquet")
        assert columns["text"].to_pylist() == [captions[int(stem)][i] for i in rows]
        assert columns["uid"].to_pylist() == [
            str(uids[int(stem)][i]).lower().zfill(32) for i in rows
        ]
        with np.load(tmp_path / "files" / "metadata" / f"{stem}.npz") as npz:
            for old, new in FEATURES.items():
                whole = arrays[stem][old].astype(np.float16)
                assert npz[new].dtype == np.float16
                assert np.array_equal(npz[new], whole[rows])
    path = tmp_path / "out" / "00000000.npz"
    data = bytearray(path.read_bytes())
    data[data.rindex(arrays["00000000"]["oai-clip-vit-l14-text"].tobytes()[-8:])] ^= 1
    path.write_bytes(data)
    with pytest.raises(D2MError, match=r"00000000 cannot be read: BadZipFile: Bad CRC-32"):
        export(run, config, tmp_path / "damaged")
    assert not [*(tmp_path / "damaged" / "metadata").glob("*0.npz")]


@pytest.mark.parametrize("keys", [True, False], ids=["as they are", "renamed"])
def test_an_export_replaces_its_own_files_again(tmp_path: Path, keys: bool) -> None:
    """Also after shards were added or forgotten, and rows counted anew."""
    texts = pa.array(["a cat"] * 3)
    shards = {s: t.append_column("caption", texts) for s, t in _shards().items()}
    fields = ["uid", "original_width", "caption"]
    more = {"use_datacomp_keys": keys, "postprocess_features": [], "additional_fields": fields}
    run, config = make_run(tmp_path, shards, **more)
    whole = export(run, config, tmp_path / "files").files
    assert [path.name for path in whole] == ["sizes.json", "blur_metadata_map.json"]
    forget(run, ["00000001"], [])
    export(run, config, tmp_path / "files")
    assert _read(tmp_path, "sizes.json") == {"00000000.tar": 4}
    remember(run, ["00000001"])
    export(run, config, tmp_path / "files")
    assert [*_read(tmp_path, "sizes.json")] == ["00000000.tar", "00000001.tar"]


@pytest.mark.parametrize(
    "data",
    [
        json.dumps({"00000000.tar": 4, "00000001.tar": 4}),
        json.dumps({"00000002.tar": 4}, indent=0),
        json.dumps({"00000000.tar": "4"}, indent=0),
        json.dumps([4], indent=0),
        "no JSON",
        "",
        "[" * 20_000,
        " " * 100_000,
    ],
    ids=["other form", "other tars", "texts", "list", "text", "empty", "deep", "large"],
)
def test_a_file_of_something_else_is_not_replaced(tmp_path: Path, data: str) -> None:
    run, config = make_run(tmp_path, _shards())
    (tmp_path / "files").mkdir()
    for name in ("sizes.json", "blur_metadata_map.json"):
        path = tmp_path / "files" / name
        path.write_text(data)
        with pytest.raises(ConfigError, match=rf"{path} is of no export .*; name another folder"):
            export(run, config, tmp_path / "files")
        assert [*(tmp_path / "files").iterdir()] == [path]
        assert path.read_text() == data
        path.unlink()


def test_the_tables_of_several_folders_are_not_replaced(tmp_path: Path) -> None:
    run, config = make_run(tmp_path, _shards(["a_0", "b_0"]))
    write_shards(run.shards, [Shard("a_0", "/a/0.tar"), Shard("b_0", "/b/0.tar")])
    export(run, config, tmp_path / "files")
    export(run, config, tmp_path / "files")
    (tmp_path / "files" / "sizes-1.json").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"sizes-1\.json is of no export"):
        export(run, config, tmp_path / "files")
