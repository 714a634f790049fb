"""What is no tar is called what it is."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import jpeg, sample, write_tar
from PIL import Image

from d2m_hpc.models.inputs import FORMATS, format_of
from d2m_hpc.worker.read.nature import HEAD, nature


def of(data: bytes) -> str:
    return nature(data[:HEAD], len(data))


def a_parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"]}), buffer)
    return buffer.getvalue()


def a_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.txt", b"x" * 600)
    return buffer.getvalue()


def an_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "it is empty"),
        (a_parquet(), "it is a parquet file"),
        (a_zip(), "it is a zip archive"),
        (an_array(), "it is a NumPy array"),
        (jpeg(), r"it is a picture \(JPEG\)"),
        (POINTER, "it is a git-lfs pointer; `git lfs pull`"),
        (b"\n <!DOCTYPE HTML>\n<html><body>sign in</body>", "it is an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey', "it is XML, .*NoSuchKey"),
        (json.dumps({"shards": [1]}).encode(), 'it is JSON: \'{"shards": '),
        (json.dumps([{"a": 1}], indent=1).encode(), "it is JSON: "),
        (b"no such object: b/x.tar\n", "it is text: 'no such object: b/x.tar'"),
        (b"\x1b[31mno access\x1b[0m\n", r"it is text: '\\\\x1b\[31mno access"),
        (bytes(20_000), "its first 20000 bytes are zeros"),
        (b"\x00\x01\x02\xff" * 500, "it begins with the bytes 00 01 02 ff"),
        (b"\x04\x22\x4d\x18" + bytes(99), "it is compressed with lz4, which is not read; gzip, xz"),
    ],
)
def test_what_is_no_tar_is_named(data: bytes, says: str) -> None:
    found = of(data)
    assert re.match(says, found), found
    assert len(found) < 200


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_of_pictures_is_named(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    data = buffer.getvalue()
    assert of(data) == f"it is a picture ({kind})"
    assert format_of(data) == kind
    assert Image.open(buffer, formats=[kind]).format == kind
    if kind == "TIFF":
        Image.fromarray(pixels).save(buffer := io.BytesIO(), kind, big_tiff=True)
        assert format_of(buffer.getvalue()) == kind


@pytest.mark.parametrize("text", [b"BMW, cars", b"P3 is a model", b"P6\nof many lines"])
def test_a_text_is_no_picture(text: bytes) -> None:
    assert of(text).startswith("it is text: ")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("before", [b"fetching a\n", b"{}", b"x" * 5000, b"ustar " * 100])
def test_what_stands_before_a_tar_is_quoted(tmp_path: Path, format: int, before: bytes) -> None:
    tar = write_tar(tmp_path / "a.tar", sample("a"), format=format).read_bytes()
    found = of(before + tar)
    assert found.startswith(f"{len(before)} bytes stand before the tar, '")
    assert before[:2].decode() in found
    assert "standard output" in found
    assert len(found) < 250


@pytest.mark.parametrize("size", [262, 512, 5000, None])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_however_damaged_is_none_of_these(
    tmp_path: Path, size: int | None, format: int
) -> None:
    tar = write_tar(tmp_path / "a.tar", sample("a"), format=format).read_bytes()[:size]
    assert of(tar) == ""
    assert of(b"?" + tar[1:]) == ""
    assert of(bytes(512) + tar) == ""


@pytest.mark.parametrize("size", [512, 1024, 10_240])
def test_an_archive_of_nothing_is_a_tar(size: int) -> None:
    assert of(bytes(size)) == ""


def test_an_old_tar_without_magic_is_a_tar(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "a.tar", {"a.txt": b"x"}, format=0).read_bytes())
    data[257:265] = bytes(8)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    assert of(bytes(data)) == ""


@pytest.mark.parametrize("at", [0, 130, 150])
def test_a_tar_whose_first_header_is_damaged_is_a_tar(tmp_path: Path, at: int) -> None:
    data = bytearray(write_tar(tmp_path / "a.tar", sample("a")).read_bytes())
    data[at] ^= 0x21
    assert of(bytes(data)) == ""
