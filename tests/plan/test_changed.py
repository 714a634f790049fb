"""Tars that were replaced after they were computed, and folders of tars that were moved."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from kit import STATS, d2m, sample, submit, write_config, write_shards, write_tar

from d2m_hpc.plan import changed
from d2m_hpc.plan.changed import moved
from d2m_hpc.plan.remote import expand
from d2m_hpc.plan.standing import Standings, standings
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Outcome, all_values
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.records import Record, Shard
from d2m_hpc.run.shards import read_some


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A finished run of three tars, downloaded long before it."""
    for path in write_shards(tmp_path / "tars", 3, samples=2):
        os.utime(path, (1e9, 1e9))
    values: dict[str, Any] = {**STATS, "input_tars": "tars/*.tar", "output_metadata_dir": "out"}
    made = write_config(tmp_path / "c.yml", values)
    ended = submit(made, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    return made


def keys(config: Path, stem: str) -> list[str]:
    names: list[str] = pq.read_table(config.parent / "out" / f"{stem}.parquet")["key"].to_pylist()
    return names


def read_all(run: Path) -> list[Record]:
    return [Record.from_dict(values) for values in all_values(RunDir(run))]


def told(config: Path, *command: object) -> str:
    ended = d2m(*command, config, cwd=config.parent)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_nothing_is_told_of_tars_that_are_as_they_were(config: Path) -> None:
    os.utime(config.parent / "tars" / "00001.tar", (1e9, 1e9))  # touched, and the same as read
    for command in ("status", "plan"):
        assert "computed, by size or time" not in told(config, command)
    ended = submit(config, "--recompute-changed", cwd=config.parent)
    assert "no tar has changed since" in ended.stdout
    assert "3 done, 0 to do" in ended.stdout


@pytest.mark.parametrize("same_size", [True, False])
def test_a_tar_that_was_replaced_is_told_and_computed_again_on_request(
    config: Path, same_size: bool
) -> None:
    tar = config.parent / "tars" / "00001.tar"
    size = tar.stat().st_size
    write_tar(tar, {**sample("new", 5), **({} if same_size else sample("newer", 6))})
    if same_size:
        with open(tar, "ab") as file:
            file.truncate(size)
    before = keys(config, "00001")
    for command in ("status", "plan"):
        said = told(config, command)
        assert "1 tar is not the one that was computed, by size or time (00001)" in said
        assert "--recompute-changed" in said
    assert "computed, by size or time" in submit(config, cwd=config.parent).stdout
    assert "computed, by size or time" in told(
        config, "plan"
    )  # again, as nothing was done about it
    assert keys(config, "00001") == before
    ended = submit(config, "--recompute-changed", cwd=config.parent)
    assert ended.returncode == 0, ended.stderr
    assert "2 done, 1 to do" in ended.stdout
    assert keys(config, "00001")[0] == "new"
    assert "computed, by size or time" not in told(config, "plan")
    assert "computed, by size or time" not in told(config, "status")


def test_the_old_pair_stays_until_another_replaces_it(config: Path) -> None:
    tar, folder = config.parent / "tars" / "00002.tar", config.parent
    before = keys(config, "00002")
    tar.write_bytes(b"a download that broke off" * 99)
    ended = submit(config, "--recompute-changed", cwd=folder)
    assert ended.returncode == 1
    assert keys(config, "00002") == before
    assert "failed" in d2m("status", config, cwd=folder).stdout
    write_tar(tar, sample("whole", 5))
    assert submit(config, cwd=folder).returncode == 0  # as for all that failed
    assert keys(config, "00002") == ["whole"]


def test_programs_and_verify_are_told_too(config: Path) -> None:
    write_tar(config.parent / "tars" / "00001.tar", sample("new", 5))
    found = json.loads(told(config, "status", "--json"))["changed"]
    assert found == {"stems": ["00001"], "looked_at": 3, "all": True, "texts": []}
    assert "1 tar is not the one that was computed" in told(config, "verify")
    assert json.loads(told(config, "verify", "--json"))["changed"]["stems"] == ["00001"]


REPLACING = '''
import os
import time

import torch


def look(text):
    """Tell that the second tar is being read."""
    if text == "caption 1000":
        open("read", "w").close()
    return text


class Replacing(torch.nn.Module):
    """Put another tar in the second one's place while the first one is computed."""
    raw_inputs = ["text"]
    preprocessors = ["look"]
    dependencies = []
    to_device = False

    def __init__(self, device):
        super().__init__()

    def forward(self, texts):
        if "caption 0" in texts:
            while not os.path.exists("read"):
                time.sleep(0.01)
            os.replace("new", f"tars/{os.environ['SECOND']}")
        return torch.tensor([float(len(text)) for text in texts])


model_lookup = {"replacing": Replacing}
preprocessor_lookup = {"look": look}
postprocess_parquet_lookup = {"length": lambda cache: cache["replacing"]}
'''


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_is_replaced_while_the_one_before_is_computed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The second tar is open when the first one's batch is computed: the old file is read."""
    name = "b.tar" if mode == "w" else "b.tar.gz"
    monkeypatch.setenv("SECOND", name)
    write_tar(tmp_path / "tars" / "a.tar", sample("first", 0))
    write_tar(tmp_path / "tars" / name, sample("old", 1000), mode=mode)
    write_tar(tmp_path / "new", sample("new", 1001), mode=mode)
    (tmp_path / "replacing.py").write_text(REPLACING)
    values: dict[str, Any] = {
        **STATS,
        "models": ["replacing"],
        "postprocess_columns": ["length"],
        "postprocess_features": [],
        "custom_pypath": "replacing.py",
        "input_tars": "tars/*",
        "output_metadata_dir": "out",
    }
    config = write_config(tmp_path / "c.yml", values)
    ended = submit(config, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert keys(config, "b") == ["old"]
    for command in ("status", "verify"):
        assert "1 tar is not the one that was computed, by size or time (b)" in told(
            config, command
        )
    ended = submit(config, "--recompute-changed", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert keys(config, "b") == ["new"]


def test_extending_a_pair_of_another_tar_is_noted(config: Path) -> None:
    tar, folder = config.parent / "tars" / "00001.tar", config.parent
    had = tar.stat().st_size
    with tarfile.open(tar, "a") as file:
        info = tarfile.TarInfo("README")
        info.size = 4000
        file.addfile(info, io.BytesIO(bytes(4000)))
    os.utime(tar, (1e9, 1e9))
    columns = ", ".join([*STATS["postprocess_columns"], "text-characters"])
    more = ("--set", f"postprocess_columns=[{columns}]")
    assert submit(config, *more, cwd=folder).returncode == 0
    records = {r.shard: r for r in read_all(folder / "out" / ".d2m")}
    [note] = [n for n in records["00001"].notices if "was replaced or touched" in n]
    assert f"it had {had:,} bytes, and has {tar.stat().st_size:,}" in note
    assert not [n for n in records["00002"].notices if "replaced" in n]
    assert submit(config, *more, "--recompute-changed", cwd=folder).returncode == 0
    assert "computed, by size or time" not in told(config, "status")


def test_in_a_store_the_time_at_which_a_tar_was_put_tells() -> None:
    store = fsspec.filesystem("memory")
    for name in ("old", "new"):
        store.pipe(f"/changed/{name}.tar", bytes(1024))
    times: dict[str, float] = {}
    sizes = dict(expand(["memory://changed/*.tar"], times))
    assert times.keys() == sizes.keys()
    now = max(times.values())
    assert now == pytest.approx(time.time(), abs=600)
    shards = [Shard(url.rpartition("/")[2], url, 1024) for url in sizes]
    began = {"old.tar": now + 60, "new.tar": now - 3600}
    done = {
        stem: Outcome.of({"started": at, "finished": at, "fingerprint": "f"})
        for stem, at in began.items()
    }
    found = Standings(list(done), "f", done)
    other = changed.find(shards, found, OutputDir("memory://changed-out"), 10, sizes, times)
    assert (other.stems, other.looked_at) == (["new.tar"], 2)


def test_a_tar_that_was_mended_before_it_was_computed_is_none_that_changed(config: Path) -> None:
    tar = config.parent / "tars" / "00003.tar"
    tar.write_bytes(b"not yet a tar" * 100)
    assert submit(config, cwd=config.parent).returncode == 1
    write_tar(tar, sample("a", 1))
    assert submit(config, cwd=config.parent).returncode == 0
    assert "computed, by size or time" not in told(config, "plan")


def test_of_many_tars_some_are_looked_at(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2m_hpc.watch.status import find_run

    write_tar(config.parent / "tars" / "00000.tar", sample("new", 5))
    write_tar(config.parent / "tars" / "00001.tar", sample("new", 5))
    write_tar(config.parent / "tars" / "00002.tar", sample("new", 5))
    monkeypatch.chdir(config.parent)
    run, loaded = find_run(config)
    found = changed.among(read_some(run.shards, 2), loaded, standings(run, loaded))
    assert (len(found.stems), found.looked_at, found.all) == (2, 2, False)
    assert "2 tars of 2 that were looked at, at random" in next(found.notices())


# --- moved ---


def test_a_folder_that_was_moved_is_not_computed_again_in_silence(config: Path) -> None:
    folder = config.parent
    (folder / "tars").rename(folder / "elsewhere")
    there = ("--set", "input_tars=elsewhere/*.tar")
    for command in (("--dry-run",), ()):
        ended = submit(config, *there, *command, cwd=folder)
        assert ended.returncode == 2
        assert "3 new tars have the names and sizes of planned ones" in ended.stderr
        assert "--not-moved" in ended.stderr
    ended = submit(config, *there, "--moved", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    assert "3 shards: 3 done, 0 to do" in ended.stdout
    assert "match no pattern" not in ended.stdout
    write_tar(folder / "elsewhere" / "00003.tar", sample("x", 9))
    ended = submit(config, *there, cwd=folder)
    assert "4 shards: 3 done, 1 to do" in ended.stdout


def test_tars_elsewhere_that_are_others_have_names_of_their_own(config: Path) -> None:
    folder = config.parent
    (folder / "tars").rename(folder / "others")
    ended = submit(config, "--set", "input_tars=others/*.tar", "--not-moved", cwd=folder)
    assert ended.returncode in (0, 1), ended.stderr
    assert "6 shards: 3 done, 3 to do" in ended.stdout
    assert (folder / "out" / "others_00000.parquet").exists()


def test_copies_whose_originals_are_there_are_tars_of_their_own(config: Path) -> None:
    folder = config.parent
    shutil.copytree(folder / "tars", folder / "copies")
    ended = submit(config, "--set", "input_tars=copies/*.tar", "--dry-run", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    assert "6 shards: 3 done, 3 to do" in ended.stdout


def test_other_sizes_or_names_are_no_move() -> None:
    known = [
        Shard("0", "s3://old/0.tar", 5),
        Shard("1", "s3://old/1.tar", 6),
        Shard("2", "x", None),
    ]
    new = [Shard("new_0", "s3://new/0.tar", 7), Shard("9", "s3://new/9.tar", 6)]
    assert moved(known, new, {s.url: s.size for s in new}) == {}
    new.append(Shard("new_1", "s3://new/1.tar", 6))
    assert moved(known, new, {}) == {"s3://old/1.tar": new[2]}
    assert moved(known, new, {"s3://old/1.tar": 6}) == {}
