"""Only pictures of the documented formats are opened; no file runs a program or hides its size."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, UnidentifiedImageError

from d2m_hpc.errors import Rejected
from d2m_hpc.models import formats
from d2m_hpc.models.inputs import PICTURES
from d2m_hpc.models.preprocessors import Options
from d2m_hpc.watch.page import sheet
from d2m_hpc.worker.read import decode

LIMIT = 1_000_000
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 10\n%%EndComments\nshowpage\n%%EOF\n"


def _saved(kind: str, size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, kind)
    return buffer.getvalue()


def _iptc(inner: bytes, width: int = 20, height: int = 10) -> bytes:
    """A picture in IPTC's container, of the size that the container tells."""

    def field(record: int, number: int, value: bytes) -> bytes:
        return bytes([0x1C, record, number]) + struct.pack(">H", len(value)) + value

    size = [field(3, 20, width.to_bytes(2, "big")), field(3, 30, height.to_bytes(2, "big"))]
    head = [field(3, 60, b"\1\0"), *size, field(3, 120, b"\5")]
    parts = [inner[i : i + 30_000] for i in range(0, len(inner), 30_000)]
    return b"".join([*head, *(field(8, 10, part) for part in parts)]) + b"\x1c\7\0\0\0"


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `gs` that leaves a mark where it is run."""
    mark, program = tmp_path / "ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho \"$@\" >> '{mark}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return mark


REFUSED = {
    "EPS": EPS,
    "EPS in IPTC": _iptc(EPS),
    "a large PNG in IPTC": _iptc(_saved("PNG", (1500, 1500))),
    **{kind: _saved(kind) for kind in ("ICO", "ICNS", "PCX", "TGA", "SGI", "DDS", "PDF")},
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("read", [decode.image, sheet.thumbnail])
def test_what_is_not_documented_is_not_opened(
    kind: str, read: Callable[[bytes, int], object], ghostscript: Path
) -> None:
    with pytest.raises((Rejected, UnidentifiedImageError)):
        read(REFUSED[kind], LIMIT)
    assert not ghostscript.exists()


def test_pil_alone_would_run_ghostscript(ghostscript: Path) -> None:
    """The container is what the test above takes it for, and the mark works."""
    for data in (EPS, _iptc(EPS)):
        with Image.open(io.BytesIO(data)) as image, pytest.raises(Exception, match=r"."):
            image.load()
        assert "-sDEVICE" in ghostscript.read_text()
        ghostscript.unlink()


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_every_documented_format_is_read_by_whatever_name(kind: str) -> None:
    picture = decode.image(_saved(kind), LIMIT)
    assert picture.size == (64, 48)
    assert sheet.thumbnail(_saved(kind), LIMIT).startswith("data:image/jpeg")


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_every_format_tells_its_size_before_it_is_decoded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)  # a call would be another error
    with pytest.raises(Rejected, match=r"1200x900 pixels, over max_image_pixels \(1000000\)"):
        decode.image(_saved(kind, (1200, 900)), LIMIT)


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_what_takes_more_memory_than_the_limit_stands_for_is_not_decoded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason names the limit that would do, and that one does."""
    data, asked = _saved(kind, (300, 200)), list[int]()
    monkeypatch.setattr(formats, "GRANTED", 0)
    dear = kind in ("AVIF", "WEBP", "JPEG2000")
    if dear:
        with pytest.raises(Rejected, match=rf"the {kind} image of 300x200 pixels takes") as told:
            decode.image(data, 60_000, asked.append)
        assert asked == []
        [enough] = map(int, re.findall("max_image_pixels from ([0-9]+) allows", str(told.value)))
        with pytest.raises(Rejected):
            decode.image(data, enough - 1)
    assert decode.image(data, enough if dear else 60_000).size == (300, 200)


@pytest.mark.parametrize("kind", [*formats.FORMATS, None])
def test_no_picture_takes_more_than_two_gigabytes_at_the_default_limit(kind: str | None) -> None:
    limit, most = Options().max_pixels, 2 << 30
    assert formats.cost(kind, most // 20, 1, limit) <= most
    if kind in ("AVIF", "WEBP", "JPEG2000"):
        with pytest.raises(formats.TooLarge, match=r"takes [23]\.\d GB to decode, over 2\.1 GB"):
            formats.cost(kind, limit, 1, limit)
    else:
        assert formats.cost(kind, limit, 1, limit) <= most


def test_a_limit_of_fewer_pixels_is_one_of_pixels_alone() -> None:
    assert decode.image(_saved("WEBP", (300, 200)), 60_000).size == (300, 200)


def test_every_documented_extension_is_that_of_a_format() -> None:
    Image.init()
    kinds = {Image.EXTENSION[f".{extension}"] for extension in PICTURES}
    assert kinds == set(formats.FORMATS)
