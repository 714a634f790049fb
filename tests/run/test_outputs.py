"""The output folder, on a disk and on an object store."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from kit import put

from d2m_hpc.run.outputs import OutputDir


def test_a_folder_that_is_not_there_is_empty(output: OutputDir) -> None:
    assert output.stems() == set()


def test_stems_are_those_of_the_suffix_and_of_this_folder_only(output: OutputDir) -> None:
    for name in ("a.parquet", "ü b.parquet", "a.b.parquet", "a.npz", "c.npz", "parquet", "d.txt"):
        put(output, name, b"")
    output.fs.makedirs(output.path("sub"), exist_ok=True)
    put(output, "sub/e.parquet", b"")
    assert output.stems() == {"a", "ü b", "a.b"}
    assert output.pairs()[".npz"] == {"a", "c"}


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
