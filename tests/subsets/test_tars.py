"""Lists of kept samples, and the tars of them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from kit import STATS, write_config, write_shards
from kit import d2m as command
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
