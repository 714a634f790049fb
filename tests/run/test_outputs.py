"""The output folder, on a disk and on an object store."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2m_hpc.errors import D2MError
from d2m_hpc.run.manifest import Record, Rejection
from d2m_hpc.run.outputs import METADATA, OutputDir
from d2m_hpc.storage import stores

RECORD = Record("s", "done", 2, [Rejection("k\udce9", "nö")], fingerprint="f", finished=1.5)


@pytest.fixture(params=["local", "awkward", "chain", "file", "memory"])
def output(request: pytest.FixtureRequest, awkward_path: Path) -> OutputDir:
    """A folder that is not there yet."""
    urls = {
        "local": f"{awkward_path.parent}/out",
        "awkward": f"{awkward_path}/{{a,b}} [x]*?",
        "chain": f"{awkward_path}/a::b",
        "file": f"file://{awkward_path.parent}/out",
        "memory": f"memory://{awkward_path.parent.name}/out",
    }
    return OutputDir(urls[request.param])


def put(output: OutputDir, name: str, data: bytes) -> None:
    output.fs.makedirs(output.root, exist_ok=True)
    with output.fs.open(output.path(name), "wb") as file:
        file.write(data)


def parquet(note: bytes | None) -> bytes:
    table = pa.table({"key": ["a", "b"]})
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({METADATA: note} if note else None), sink)
    return bytes(sink.getvalue())


def test_a_folder_that_is_not_there_is_empty(output: OutputDir) -> None:
    assert output.stems() == set()
    assert output.record("s") is None


def test_stems_are_those_of_the_suffix_and_of_this_folder_only(output: OutputDir) -> None:
    for name in ("a.parquet", "ü b.parquet", "a.b.parquet", "a.npz", "c.npz", "parquet", "d.txt"):
        put(output, name, b"")
    output.fs.makedirs(output.path("sub"), exist_ok=True)
    put(output, "sub/e.parquet", b"")
    assert output.stems() == {"a", "ü b", "a.b"}
    assert output.stems(".npz") == {"a", "c"}


def test_a_listing_is_never_an_old_one(output: OutputDir) -> None:
    put(output, "a.parquet", b"")
    assert output.stems() == {"a"}
    put(output, "b.parquet", b"")
    output.fs.rm_file(output.path("a.parquet"))
    assert output.stems() == {"b"}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 7])
def test_the_hash_is_of_the_whole_file(output: OutputDir, size: int) -> None:
    data = os.urandom(size)
    put(output, "a.npz", data)
    assert output.sha256("a.npz") == hashlib.sha256(data).hexdigest()


def test_the_record_of_a_parquet_is_read_back(output: OutputDir) -> None:
    note = json.dumps({**RECORD.to_dict(), "versions": {"torch": "2"}}).encode()
    put(output, "s.parquet", parquet(note))
    assert output.record("s") == RECORD


OTHERS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "no parquet": lambda: b"x" * 1000,
    "cut": lambda: parquet(json.dumps(RECORD.to_dict()).encode())[:-20],
    "footer broken": lambda: parquet(b"{}")[:-60] + b"\xff" * 52 + parquet(b"{}")[-8:],
    "someone else's": lambda: parquet(None),
    "note is no JSON": lambda: parquet(b"{"),
    "note is a list": lambda: parquet(b"[1]"),
    "note is null": lambda: parquet(b"null"),
    "note lacks a state": lambda: parquet(b'{"shard": "s"}'),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_parquet_that_is_not_ours_has_no_record(output: OutputDir, kind: str) -> None:
    put(output, "s.parquet", OTHERS[kind]())
    assert output.record("s") is None


def test_a_parquet_that_cannot_be_read_is_no_missing_one(
    output: OutputDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shard would be computed again, or its folder taken for another program's."""

    def silent(path: str, start: int | None = None) -> bytes:
        raise TimeoutError("no answer from the store")

    monkeypatch.setattr(output.fs, "cat_file", silent)
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.0)
    with pytest.raises(D2MError, match=r"s\.parquet cannot be read: .*no answer .* run the same"):
        output.record("s")


def test_a_folder_in_a_parquets_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "s.parquet").mkdir()
    with pytest.raises(D2MError, match="Is a directory"):
        OutputDir(str(tmp_path)).record("s")


def test_a_record_longer_than_any_guess_is_read(output: OutputDir) -> None:
    """Thousands of rejections are megabytes of metadata."""
    record = Record("s", "done", 2, [Rejection(f"{i:09d}", "x" * 90) for i in range(20_000)])
    put(output, "s.parquet", parquet(json.dumps(record.to_dict()).encode()))
    assert output.record("s") == record


def test_paths_of_a_local_folder_are_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for url, root in (("out/", "out"), ("./out", "out"), ("~/out", "home/out")):
        assert OutputDir(url).is_local
        assert OutputDir(url).root == str(tmp_path / root)
        assert OutputDir(url).path("a") == str(tmp_path / root / "a")


def test_urls_are_not_local() -> None:
    fs = fsspec.filesystem("memory")
    output = OutputDir("memory://bucket/out")
    assert not output.is_local
    assert type(output.fs) is type(fs)
    assert output.path("a.npz") == "/bucket/out/a.npz"


def test_an_output_folder_is_known_by_its_url() -> None:
    seen: dict[OutputDir, Any] = {OutputDir("/a"): 1}
    assert OutputDir("/a") in seen
    assert OutputDir("/b") not in seen
