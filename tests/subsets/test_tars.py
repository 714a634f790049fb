"""Lists of kept samples, and the tars of them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
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
from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage.lease import Lease
from d2m_hpc.subsets import exports
from d2m_hpc.subsets.tars import PARTS, SubsetTars, TarWriter, _header


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


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(
    "lengths", [[], [0, 1, 511, 512, 513], [3 << 20, 9, 2 << 20], [9] * 3 * PARTS]
)
def test_tars_are_to_the_byte_those_of_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int], short: bool
) -> None:
    """Also with names that take a header of their own, and where not all is written at once."""
    theirs, writev = io.BytesIO(), os.writev
    if short:
        monkeypatch.setattr(os, "writev", lambda fd, parts: writev(fd, [parts[0][:300]]))
    names = ["a.jpg", "b/c" * 32 + ".txt", "b/c" * 33 + ".txt", "ü.jpg"]
    with (
        tarfile.open(fileobj=theirs, mode="w", format=tarfile.PAX_FORMAT) as tar,
        (tmp_path / "a.tar").open("wb") as ours,
    ):
        writer = TarWriter(ours)
        for number, length in enumerate(lengths):
            name, data = names[number % 4], bytes([number % 256]) * length
            info = tarfile.TarInfo(name)
            info.size, info.mode = length, 0o644
            tar.addfile(info, io.BytesIO(data))
            writer.add(name, data)
        writer.close()
    assert (tmp_path / "a.tar").read_bytes() == theirs.getvalue()


def test_few_bytes_of_many_blocks_keep_no_block_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        writer = TarWriter(file)
        tracemalloc.start()
        for number in range(50):
            writer.add(f"{number}.txt", memoryview(bytes(1 << 20))[:9])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        writer.close()
    assert peak < 4 << 20
    assert len(members(tmp_path / "a.tar")) == 50


@pytest.mark.parametrize("size", [0, 7, 8, 0o1234567, (8 << 30) - 1, 8 << 30, 1 << 40])
def test_headers_tell_any_size(size: int) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size, info.mode = size, 0o644
    assert _header("a.jpg", size) == info.tobuf(tarfile.PAX_FORMAT)


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


def test_keys_lead_to_no_place_outside_of_the_tar(tmp_path: Path) -> None:
    """`tar` and `tarfile` of old wrote such members anywhere."""
    keys = ["../../x", "/etc/y", "..", "./z"]
    table = pa.table({"image": [jpeg(i) for i in range(4)], "key": keys})
    pq.write_table(table, tmp_path / "a.parquet")
    run = submitted(tmp_path, "a.parquet")
    run.select(tmp_path / "kept.jsonl")
    run.export("subset-tars", tmp_path / "kept", lists=tmp_path / "kept.jsonl")
    with tarfile.open(tmp_path / "kept" / "a.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")]
    assert names == ["__/__/x.jpg", "_/etc/y.jpg", "__.jpg", "./z.jpg"]


def test_a_key_that_a_list_has_twice_is_told(run: d2m.Run, tmp_path: Path) -> None:
    """It was told as a shard that has changed."""
    run.select(tmp_path / "kept.jsonl")
    stem, (key, *_) = json.loads((tmp_path / "kept.jsonl").read_text().splitlines()[0]).values()
    (tmp_path / "twice.jsonl").write_text(json.dumps({"shard": stem, "keys": [key, key]}))
    with pytest.raises(D2MError, match=rf"the lists have '{key}' 2 times, and the shard 1; name"):
        run.export("subset-tars", tmp_path / "kept", lists=tmp_path / "twice.jsonl")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no json", "cannot be read: Expecting value"),
        ('{"keys": []}', "cannot be read: 'shard'"),
        ('{"shard": "00007", "keys": []}', "found the shard '00007', which is none of"),
        ('{"shard": "00000", "keys": "abc"}', "the keys of '00000' are no list of texts"),
        ('{"shard": "00000", "keys": [1]}', "the keys of '00000' are no list of texts"),
        ('{"shard": "00000", "keys": []}\n' * 2, "read: the shard '00000' is on several lines"),
    ],
)
def test_mistakes_in_the_lists_are_told(run: d2m.Run, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "kept.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=told):
        run.export("subset-tars", tmp_path / "kept", lists=tmp_path / "kept.jsonl")


# --- by tasks ---

TASKS = 3
SELECTED = "caption LIKE '%1' OR caption LIKE '%3' AND key < '00001'"


@pytest.fixture
def lists(run: d2m.Run, tmp_path: Path) -> Path:
    """Kept keys of each of seven shards."""
    write_shards(tmp_path / "tars", 7, 4)
    d2m.submit(tmp_path / "c.yml", local=True)
    run.select(tmp_path / "kept.jsonl", SELECTED)
    return tmp_path / "kept.jsonl"


def divide(run: d2m.Run, folder: Path, lists: Path, tasks: int, *live: int) -> set[int]:
    """Begin an export by tasks; returns the parts that are left."""
    layout = SubsetTars(RunDir(run.path), run.config, folder, lists)
    with exports.divided(RunDir(run.path), layout, tasks, lambda: live) as (left, _):
        return left


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".tar"}


def test_tasks_write_what_one_process_writes(run: d2m.Run, tmp_path: Path, lists: Path) -> None:
    run.export("subset-tars", tmp_path / "at-once", lists=lists)
    out = tmp_path / "by-tasks"
    assert divide(run, out, lists, TASKS) == {1, 2, 3}
    found = [
        run.export("subset-tars", out, lists=lists, part=(i, TASKS)) for i in range(1, TASKS + 1)
    ]
    assert [f.written for f in found] == [3, 2, 2]
    assert sum(f.rows for f in found) == 8
    assert tars(out) == tars(tmp_path / "at-once")
    assert divide(run, out, lists, TASKS) == set()
    # Again, nothing is written, also by another number of tasks, or by none.
    assert run.export("subset-tars", out, lists=lists, part=(2, TASKS)).written == 0
    assert divide(run, out, lists, 5) == set()
    assert run.export("subset-tars", out, lists=lists).written == 0
    assert hidden(out) == {exports.LOG}
    assert divide(run, out, lists, TASKS) == set()


def test_a_task_leaves_the_files_of_others_alone(run: d2m.Run, tmp_path: Path, lists: Path) -> None:
    out = tmp_path / "kept"
    divide(run, out, lists, TASKS)
    run.export("subset-tars", out, lists=lists, part=(1, TASKS))
    before = tars(out)
    assert before.keys() == {"00000.tar", "00003.tar", "00006.tar"}
    for stem in ("00001", "00002"):  # as a kill leaves it
        (out / f".{stem}.tar.0123abcd.tmp").write_bytes(b"half")
    run.export("subset-tars", out, lists=lists, part=(2, TASKS))
    assert ".00002.tar.0123abcd.tmp" in hidden(out)
    assert ".00001.tar.0123abcd.tmp" not in hidden(out)
    assert {name: data for name, data in tars(out).items() if name in before} == before
    assert divide(run, out, lists, TASKS) == {3}
    # What is on a log and lost is written again; what is on none was not finished.
    (out / "00000.tar").unlink()
    (out / "00002.tar").write_bytes(b"of nobody")
    assert divide(run, out, lists, TASKS) == {1, 3}
    assert run.export("subset-tars", out, lists=lists, part=(1, TASKS)).written == 1
    assert run.export("subset-tars", out, lists=lists).written == 2
    assert hidden(out) == {exports.LOG}


def test_tasks_of_other_parts_are_refused(run: d2m.Run, tmp_path: Path, lists: Path) -> None:
    out, other = tmp_path / "kept", tmp_path / "other.jsonl"
    run.select(other, "key < '00002'")
    with pytest.raises(
        D2MError, match=r"is not, or no longer, of these lists and --tasks 3; the command"
    ):
        run.export("subset-tars", out, lists=lists, part=(1, TASKS))
    divide(run, out, lists, TASKS)
    run.export("subset-tars", out, lists=lists, part=(1, TASKS))
    for tasks, kept in ((4, lists), (TASKS, other)):
        with pytest.raises(D2MError, match="is not, or no longer, of these lists and --tasks"):
            run.export("subset-tars", out, lists=kept, part=(1, tasks))
        with pytest.raises(D2MError, match="wait or run; wait for their end, or"):
            divide(run, out, kept, tasks, 2)
    assert divide(run, out, lists, TASKS, 2) == {2, 3}
    # While a task writes, the folder is nobody else's.
    lease = Lease(out / ".d2m-export.2-3.lock")
    assert lease.claim()
    with pytest.raises(D2MError, match="1 task of an export is writing there"):
        run.export("subset-tars", out, lists=lists)
    with pytest.raises(D2MError, match="1 task of an export is writing there"):
        divide(run, out, other, TASKS)
    with pytest.raises(D2MError, match="another export is writing there"):
        run.export("subset-tars", out, lists=lists, part=(2, TASKS))
    lease.release()
    # Then it is; what an earlier selection's tasks noted down counts no more.
    assert divide(run, out, other, TASKS) == {1, 2}
    assert tars(out).keys() == {"00000.tar"}
    run.export("subset-tars", out, lists=other, part=(1, TASKS))
    run.export("subset-tars", out, lists=other, part=(2, TASKS))
    assert divide(run, out, lists, TASKS) == {1, 2, 3}
    with pytest.raises(D2MError, match="is not, or no longer, of these lists and --tasks 3"):
        run.export("subset-tars", out, lists=other, part=(1, TASKS))
    run.export("subset-tars", out, lists=lists)
    run.export("subset-tars", tmp_path / "at-once", lists=lists)
    assert tars(out) == tars(tmp_path / "at-once")


@pytest.mark.parametrize("stopped", ["before", "after"])
def test_a_kill_while_other_lists_begin_takes_no_tar_for_another(
    run: d2m.Run, tmp_path: Path, lists: Path, monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    """A kill before or after the log is written anew, with the logs of tasks still there."""
    out, other = tmp_path / "kept", tmp_path / "other.jsonl"
    run.select(other, "key < '00002'")
    divide(run, out, lists, 2)
    for number in (1, 2):
        run.export("subset-tars", out, lists=lists, part=(number, 2))
    write = exports.files.atomic_write

    def killed(path: Path, data: Any) -> None:
        if stopped == "after":
            write(path, data)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exports.files, "atomic_write", killed)
        with pytest.raises(KeyboardInterrupt):
            divide(run, out, other, 1)
    assert divide(run, out, other, 1) == {1}
    run.export("subset-tars", out, lists=other, part=(1, 1))
    assert divide(run, out, lists, 2) == {1, 2}
    for number in (1, 2):
        run.export("subset-tars", out, lists=lists, part=(number, 2))
    run.export("subset-tars", tmp_path / "at-once", lists=lists)
    assert tars(out) == tars(tmp_path / "at-once")


STUCK = """
import os, sys, time
import d2m_hpc
from d2m_hpc.subsets import tars
whole = tars.SubsetTars._copy
def copy(self, shard, reader, tar):
    whole(self, shard, reader, tar)
    if shard.stem == "00004":
        while "00001.tar" not in (self.root / ".d2m-export.2-3.jsonl").read_text():
            time.sleep(0.01)  # the other thread notes the first tar down
        os.kill(os.getpid(), 9)
tars.SubsetTars._copy = copy
tars.SubsetTars.threads = 1
d2m_hpc.open(sys.argv[1]).export("subset-tars", sys.argv[2], lists=sys.argv[3], part=(2, 3))
"""


def test_a_task_that_is_killed_while_it_writes_leaves_nothing_for_done(
    run: d2m.Run, tmp_path: Path, lists: Path
) -> None:
    out = tmp_path / "kept"
    divide(run, out, lists, TASKS)
    words = [sys.executable, "-c", STUCK, *map(str, (run.path, out, lists))]
    assert subprocess.run(words, check=False).returncode == -9
    assert tars(out).keys() == {"00001.tar"}
    assert [n for n in hidden(out) if n.endswith(".tmp")]
    assert divide(run, out, lists, TASKS) == {1, 2, 3}
    again = run.export("subset-tars", out, lists=lists, part=(2, TASKS))
    assert (again.parts, again.written) == (2, 1)
    assert hidden(out) == {exports.LOG, ".d2m-export.2-3.jsonl"}


@pytest.mark.parametrize("given", [(0, 3), (4, 3), (-1, 3), (1, 0), (1,)])
def test_parts_that_are_none_are_told(
    run: d2m.Run, tmp_path: Path, lists: Path, given: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match=r"--part: found -?\d of \d tasks; valid is 1 to"):
        run.export("subset-tars", tmp_path / "kept", lists=lists, part=given)
    assert not (tmp_path / "kept").exists()
    with pytest.raises(D2MError, match="is not, or no longer, of these lists"):
        run.export("npy", tmp_path / "kept", part=(1, 3))
