"""Members to raw inputs: PIL's pixels to the bit, and a reason for whatever cannot be used."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from itertools import product
from typing import Any

import numpy as np
import pytest
from kit import SHARDS, jpeg
from numpy.typing import NDArray
from PIL import Image

from d2m_hpc.errors import Rejected
from d2m_hpc.models.formats import TooLarge, opened
from d2m_hpc.run.values import column
from d2m_hpc.worker.read import decode, parse
from d2m_hpc.worker.read.names import EXTENSIONS

LIMIT = 10_000_000


def members(shard: str, *suffixes: str) -> dict[str, bytes]:
    found = {}
    with tarfile.open(SHARDS / shard) as tar:
        for member in tar:
            if member.name.endswith(suffixes):
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


ODD = members("odd.tar", *(f".{e}" for e in EXTENSIONS["image"]))
BAD = members("bad.tar", "")


def by_pil(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def assert_pils_pixels(data: bytes) -> None:
    """Both forms of a picture hold what PIL decodes."""
    picture, expected = decode.image(data, LIMIT), by_pil(data)
    assert picture.size == (expected.shape[1], expected.shape[0])
    np.testing.assert_array_equal(picture.array, expected)
    assert picture.pil.mode == "RGB"
    np.testing.assert_array_equal(np.array(decode.image(data, LIMIT).pil), expected)


def saved(mode: str, kind: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(7).integers(0, 256, (5, 9, 4), dtype=np.uint8)
    image = Image.fromarray(pixels) if mode == "RGBA" else Image.fromarray(pixels[..., :3])
    buffer = io.BytesIO()
    image.resize((67, 43), Image.Resampling.BICUBIC).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


# --- pixels ---


def test_the_odd_shard_has_all_its_images() -> None:
    assert len(ODD) == 20


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_pils(name: str) -> None:
    assert_pils_pixels(ODD[name])


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [5, 75, 100])
def test_jpegs_of_any_kind_are_pils(subsampling: str, progressive: bool, quality: int) -> None:
    options = {"subsampling": subsampling, "progressive": progressive, "quality": quality}
    assert_pils_pixels(saved("RGB", "JPEG", **options))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("L", {}),
        ("L", {"progressive": True}),
        ("CMYK", {}),
        ("CMYK", {"progressive": True}),
        ("RGB", {"keep_rgb": True}),
        ("RGB", {"restart_marker_rows": 1}),
        ("RGB", {"optimize": True, "comment": b"x" * 9000}),
    ],
)
def test_jpegs_of_other_colours_and_markers_are_pils(mode: str, options: dict[str, Any]) -> None:
    assert_pils_pixels(saved(mode, "JPEG", **options))


KINDS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
UNWRITABLE = {("1", "JPEG2000"), ("P", "JPEG2000"), ("P", "PPM")}


@pytest.mark.parametrize(
    ("mode", "kind"), sorted(set(product(("1", "L", "P", "RGB", "RGBA"), KINDS)) - UNWRITABLE)
)
def test_other_formats_are_pils(mode: str, kind: str) -> None:
    assert_pils_pixels(saved(mode, kind))


def test_deep_and_transparent_pngs_are_pils() -> None:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(3).integers(0, 2**16, (9, 7), dtype=np.uint16)
    Image.fromarray(pixels).save(buffer, "PNG")
    with Image.open(buffer) as deep:
        assert deep.mode == "I;16"
    assert_pils_pixels(buffer.getvalue())
    assert_pils_pixels(saved("LA", "PNG"))


def test_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved("RGB", "JPEG", exif=exif)
    assert decode.image(data, LIMIT).size == (67, 43)
    assert_pils_pixels(data)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_pils_or_rejected(progressive: bool) -> None:
    data = saved("RGB", "JPEG", progressive=progressive)
    decoded = 0
    for size in range(1, len(data), 7):
        try:
            decode.image(data[:size], LIMIT)
        except Rejected:
            with pytest.raises((OSError, SyntaxError, ValueError)):
                by_pil(data[:size])
            continue
        assert_pils_pixels(data[:size])
        decoded += 1
    assert decoded > 20


def test_a_jpeg_with_flipped_bytes_is_pils_or_rejected() -> None:
    data, random = saved("RGB", "JPEG", quality=60), np.random.default_rng(5)
    decoded = 0
    for _ in range(150):
        broken = bytearray(data)
        broken[random.integers(2, len(data))] ^= int(random.integers(1, 256))
        try:
            decode.image(bytes(broken), LIMIT)
        except Rejected:
            continue
        assert_pils_pixels(bytes(broken))
        decoded += 1
    assert decoded > 75


def test_bytes_after_an_image_do_not_matter() -> None:
    assert_pils_pixels(jpeg(1) + b"tail" * 100)
    assert_pils_pixels(saved("RGB", "PNG") + b"tail" * 100)


# --- rejections ---


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels should begin."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 10) + b"IDAT"


def jpeg_header(width: int, height: int) -> bytes:
    """A JPEG that claims another size than it has."""
    data = bytearray(jpeg(1))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("make", [png_header, jpeg_header])
def test_too_many_pixels_are_rejected_by_the_header_alone(make: Any) -> None:
    why = r"60000x50000 pixels, over max_image_pixels \(10000000\)"
    with pytest.raises(Rejected, match=why):
        decode.image(make(60000, 50000), LIMIT)


def test_the_bomb_is_rejected_by_its_header() -> None:
    with pytest.raises(Rejected, match="over max_image_pixels"):
        decode.image(BAD["bomb.png"], 178_956_970)
    with pytest.raises(Rejected, match="over max_image_pixels"):
        decode.image(BAD["bomb.png"][:200], 178_956_970)


@pytest.mark.parametrize("data", [saved("RGB", "JPEG"), saved("CMYK", "JPEG"), saved("P", "PNG")])
def test_the_limit_itself_is_allowed(data: bytes) -> None:
    assert decode.image(data, 67 * 43).size == (67, 43)
    with pytest.raises(Rejected, match="67x43"):
        decode.image(data, 67 * 43 - 1)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the image file is empty"),
        (BAD["zero.jpg"], "the image file is empty"),
        (BAD["garbage.jpg"], "cannot be decoded"),
        (BAD["header-only.jpg"], "cannot be decoded"),
        (b"\xff\xd8", "cannot be decoded"),
        (b"<html>not found</html>", "cannot be decoded: its format is not known"),
        (b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
    ],
)
def test_what_is_no_image_is_rejected_with_a_reason(data: bytes, why: str) -> None:
    with pytest.raises(Rejected, match=why) as raised:
        decode.image(data, LIMIT)
    assert "0x" not in str(raised.value)


def test_postscript_is_never_run() -> None:
    """PIL would hand it to Ghostscript: a program of a stranger's."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(eps)) as opened:
        assert opened.format == "EPS"
    with pytest.raises(Rejected, match="its format is not known"):
        decode.image(eps, LIMIT)


def test_text_is_utf8_as_it_stands() -> None:
    assert parse.text(" döner\r\n☃\0".encode()) == " döner\r\n☃\0"
    assert parse.text(b"") == ""


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"caf\xe9", "at byte 3"),
        (b"\xff", "at byte 0"),
        (b"\xed\xa0\x80", "at byte 0"),
        (BAD["latin1.txt"], "not UTF-8"),
    ],
)
def test_text_of_another_encoding_is_rejected(data: bytes, why: str) -> None:
    with pytest.raises(Rejected, match=why):
        parse.text(data)


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (b'{"a": [1, null]}', {"a": [1, None]}),
        (b"{}", {}),
        ('{"ü": "☃"}'.encode(), {"ü": "☃"}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
    ],
)
def test_objects_are_read(data: bytes, values: dict[str, Any]) -> None:
    assert parse.json_object(data) == values


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cannot be parsed"),
        (b"{", "cannot be parsed"),
        (BAD["bad-json.json"], "cannot be parsed"),
        (b'{"a": "\xe9"}', "the JSON is not UTF-8: invalid continuation byte at byte 7"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be parsed"),
        (b"[" * 100_000, "cannot be parsed"),
        (b'{"a":' * 100_000, "cannot be parsed"),
        (b"[]", "holds list, not an object"),
        (b"null", "holds NoneType, not an object"),
        (b'"text"', "holds str, not an object"),
    ],
)
def test_what_is_no_object_is_rejected_with_a_reason(data: bytes, why: str) -> None:
    with pytest.raises(Rejected, match=why):
        parse.json_object(data)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e400", 10**400),
        ("-2.5e310", -25 * 10**309),
        ("1" + "0" * 350 + ".0", 10**350),
        ("1e308", 1e308),
        ("1e-400", 0.0),
    ],
)
def test_a_number_beyond_all_floats_is_the_integer_that_it_says(text: str, value: float) -> None:
    found = parse.json_object(b'{"n": [%b], "e": "1e400"}' % text.encode())
    assert found == {"n": [value], "e": "1e400"}
    assert type(found["n"][0]) is type(value)
    assert column("n", "json", [found["n"]])[0].to_pylist() == [json.dumps([value])]


@pytest.mark.parametrize("text", ["1e5000", "1e99999999999999999999999", "9" * 310 + ".5"])
def test_a_number_that_no_column_holds_is_told(text: str) -> None:
    with pytest.raises(Rejected, match=f"the number {text[:4]}.* is beyond what a column can hold"):
        parse.json_object(b'{"n": %b}' % text.encode())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_json_is_read_in_the_encodings_of_json(encoding: str) -> None:
    assert parse.json_object('{"é": "漢"}'.encode(encoding)) == json.loads('{"é": "漢"}')


def test_a_texts_byte_order_mark_is_none_of_its_characters() -> None:
    assert parse.text("\ufeffa\ufeff b".encode()) == "a\ufeff b"
    assert parse.text_in({"t": "\ufeffa\ufeff b"}, "t") == "a\ufeff b"
    with pytest.raises(Rejected, match="UTF-8: invalid start byte at byte 4"):
        parse.text(b"\xef\xbb\xbfa\xff")


def scans(count: int, size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    """A progressive JPEG with so many scans, by its header of a given size."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(3, (64, 48)))).save(buffer, "JPEG", progressive=True, **options)
    data = buffer.getvalue()
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    data = data[:end] + data[start:end] * (count - data.count(b"\xff\xda")) + data[end:]
    frame = data.index(b"\xff\xc2") + 5
    return data[:frame] + struct.pack(">HH", size[1], size[0]) + data[frame + 4 :]


@pytest.mark.parametrize(
    ("count", "size"), [(501, (64, 48)), (2000, (64, 48)), (33, (8000, 9000)), (101, (3000, 3400))]
)
@pytest.mark.parametrize("tail", [b"", b"\xff\xd9", b"trailing"])
def test_a_jpeg_of_very_many_scans_is_rejected_before_it_is_decoded(
    count: int, size: tuple[int, int], tail: bytes
) -> None:
    with pytest.raises(Rejected, match=r"has over \d+ scans, the most for \d+x\d+ pixels"):
        decode.image(scans(count, size) + tail, 10**8)
    with pytest.raises(TooLarge, match="scans"):  # the report's pictures
        opened(scans(count, size) + tail, 10**8)


@pytest.mark.parametrize("count", [10, 32, 400])
def test_a_small_jpeg_may_have_many_scans(count: int) -> None:
    assert_pils_pixels(scans(count))


def test_a_jpeg_is_judged_by_its_own_scans_alone() -> None:
    """Not by a thumbnail in its header, a note, or what an application puts behind the end."""
    marks = b"\xff\xda\x00\x08" * 600
    note = b"\xff\xfe" + struct.pack(">H", len(marks) + 2) + marks
    for whole in (scans(10), jpeg(5)):
        assert_pils_pixels(whole[:2] + note + whole[2:] + marks)


def test_scans_of_one_colour_each_are_counted_too() -> None:
    """Without SOF2: a sequential JPEG whose first scan lacks a colour has several, too."""
    data = jpeg(4)
    start = data.index(b"\xff\xda")
    one = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + data[start + 14 : -2]
    with pytest.raises(Rejected, match="has over 500 scans"):
        decode.image(data[:start] + one * 501 + b"\xff\xd9", LIMIT)
    assert decode.image(data[:start] + data[start:-2] * 501 + b"\xff\xd9", LIMIT).size == (40, 30)


def tiff(strip: bytes, size: tuple[int, int], strips: int = 1, counted: bool = True) -> bytes:
    """A TIFF of one column of strips, each the same bytes of a JPEG."""
    width, height = size
    offset = 8 + 2 + 9 * 12 + 4
    lists = struct.pack(f"<{strips}I", *[offset + 8 * strips] * strips)
    lists += struct.pack(f"<{strips}I", *[len(strip) if counted else 0] * strips)
    places = (offset, offset + 4 * strips)
    if strips == 1:
        places = struct.unpack("<2I", lists)
    tags = {256: width, 257: height * strips, 258: 8, 259: 7, 262: 6, 277: 3, 278: height}
    many = {273: (strips, places[0]), 279: (strips, places[1])}
    entries = sorted({**{t: (1, v) for t, v in tags.items()}, **many}.items())
    listed = b"".join(struct.pack("<HHII", tag, 4, *value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + listed + bytes(4) + lists + strip


@pytest.mark.parametrize(("strips", "counted"), [(1, True), (1, False), (5, True)])
def test_a_tiff_of_jpegs_with_very_many_scans_is_rejected_too(strips: int, counted: bool) -> None:
    """One of each 32 scans is decoded; libtiff itself takes 100 in each strip, at any size."""
    size = (64, 48)
    few, many = (tiff(scans(n), size, strips, counted) for n in (32, 33))
    assert decode.image(few, LIMIT).size == (64, 48 * strips)
    with pytest.raises(Rejected, match="has over 32 scans, the most for 64x48 pixels"):
        decode.image(many, LIMIT)
    with pytest.raises(TooLarge, match="scans"):
        opened(many, LIMIT)


def test_a_tiff_may_have_more_strips_than_a_jpeg_has_scans() -> None:
    assert decode.image(tiff(scans(3), (64, 48), 40), LIMIT).size == (64, 1920)


@pytest.mark.parametrize(
    ("size", "part"),
    [((2047, 3000), 1), ((2049, 3001), 2), ((4096, 4100), 4), ((900, 9000), 1)],
)
def test_scaled_decoding_leaves_a_thousand_pixels_and_what_pil_shows_small(
    size: tuple[int, int], part: int
) -> None:
    """Wide pictures keep their short side; other formats are decoded whole."""
    small = Image.open(io.BytesIO(ODD["progressive.jpg"])).convert("RGB")
    image, data = small.resize(size, Image.Resampling.BILINEAR), io.BytesIO()
    image.save(data, "JPEG", quality=95)
    found = decode.image(data.getvalue(), 1 << 27, scaled=True)
    assert found.size == tuple(-(-side // part) for side in size)
    assert decode.image(data.getvalue(), 1 << 27).size == size
    whole = decode.image(data.getvalue(), 1 << 27).pil.resize((64, 64), Image.Resampling.BOX)
    seen = found.pil.resize((64, 64), Image.Resampling.BOX)
    assert np.abs(np.asarray(whole, int) - np.asarray(seen, int)).mean() < 1
    if part == 2:
        image.save(data := io.BytesIO(), "WEBP", quality=50, method=0)
        assert decode.image(data.getvalue(), 1 << 27, scaled=True).size == size
