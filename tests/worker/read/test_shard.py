"""Tars to samples: webdataset's rule, and nothing lost silently from a damaged archive."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kit import write_tar
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from d2m_hpc.errors import ShardError
from d2m_hpc.run.records import Rejection
from d2m_hpc.worker.read.members import MERGED, is_foreign
from d2m_hpc.worker.read.names import split
from d2m_hpc.worker.read.shard import CUT_OFF, Archive, Index, Sample
from d2m_hpc.worker.read.tar import STRETCH, ReadAhead

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}
Members = list[tuple[str, bytes]]


def tar_bytes(members: Members, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@given(st.text("ab./\n", max_size=12))
def test_a_name_is_split_as_webdataset_splits_it(name: str) -> None:
    key, extension = base_plus_ext(name)
    assert split(name) == (key, extension or "")


class Read(NamedTuple):
    """What an index says once it has been iterated over."""

    samples: list[Sample]
    strays: list[Rejection]
    cut: str


NOTHING = Read([], [], "")


def read(index: Index) -> Read:
    samples = list(index)
    assert index.count == len(samples)
    return Read(samples, index.strays, index.cut)


def index_of(data: bytes) -> Read:
    return read(Index(ReadAhead(io.BytesIO(data)), len(data)))


def contents(data: bytes, index: Read | None = None) -> list[tuple[str, dict[str, bytes]]]:
    """Key, and data by extension, of each sample."""
    samples = (index or index_of(data)).samples
    return [(s.key, {e: data[o : o + n] for e, (o, n) in s.members.items()}) for s in samples]


def by_webdataset(data: bytes) -> list[tuple[str, dict[str, bytes]]]:
    files = tar_file_expander([{"url": "x", "stream": io.BytesIO(data)}])
    samples = group_by_keys(files)
    return [(s.pop("__key__"), {e: d for e, d in s.items() if e != "__url__"}) for s in samples]


def special(name: str, kind: bytes, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def triple(key: str, size: int = 5) -> Members:
    return [(f"{key}.{e}", f"{key}{e}".encode() * size) for e in ("jpg", "json", "txt")]


THREE = triple("a") + triple("b") + triple("c")


# --- whole archives ---


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_every_format_is_read(format: int) -> None:
    data = tar_bytes(THREE, format)
    index = index_of(data)
    assert (index.cut, index.strays) == ("", [])
    assert contents(data, index) == [
        (key, {e: f"{key}{e}".encode() * 5 for e in ("jpg", "json", "txt")}) for key in "abc"
    ]


@pytest.mark.parametrize("format", ["pax", "gnu"])
def test_long_and_foreign_names_are_read(format: str) -> None:
    keys = ["x" * 300, "f/" * 130 + "k", "döner/日本-☃" * 20]
    members = [m for key in keys for m in triple(key)]
    data = tar_bytes(members, FORMATS[format])
    assert [key for key, _ in contents(data)] == keys
    assert contents(data) == by_webdataset(data)
    assert index_of(data).cut == ""


TELL = """
import io, sys
from d2m_hpc.worker.read.shard import Index
from d2m_hpc.worker.read.tar import ReadAhead
data = sys.stdin.buffer.read()
for sample in Index(ReadAhead(io.BytesIO(data)), len(data)):
    print(ascii(sample.key))
"""


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("locale", ["C", "en_US.ISO-8859-1", "C.UTF-8"])
def test_names_are_utf8_whatever_the_locale(format: int, locale: str) -> None:
    """Without Python's own ways out of a locale of ASCII, which others do not have."""
    keys = ["caf\xe9", "\u6f22\u5b57", "\u0436" * 45, "\u0436" * 70]
    if format == tarfile.USTAR_FORMAT:
        keys.pop()
    data = tar_bytes([(f"{key}.txt", b"x") for key in keys], format)
    plain = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", TELL],
        input=data,
        stdout=-1,
        env={**os.environ, **plain},
        check=True,
    )
    assert ended.stdout.decode().split() == [ascii(key) for key in keys]


def test_a_prefix_of_ustar_is_part_of_the_name() -> None:
    key = "folder/" * 20 + "k"
    assert [k for k, _ in contents(tar_bytes(triple(key), tarfile.USTAR_FORMAT))] == [key]


def test_a_size_that_only_the_pax_header_has_counts() -> None:
    info = tarfile.TarInfo("a.txt")
    info.size, info.pax_headers = 0, {"size": "3"}
    head = info.tobuf(tarfile.PAX_FORMAT)
    data = head + b"abc".ljust(512, b"\0") + tar_bytes([("b.txt", b"b")])
    assert contents(data) == [("a", {"txt": b"abc"}), ("b", {"txt": b"b"})]


def test_a_global_pax_header_is_no_member() -> None:
    buffer = io.BytesIO()
    headers = {"comment": "whole archive"}
    with tarfile.open(fileobj=buffer, mode="w", pax_headers=headers) as tar:
        tar.addfile(special("a.txt", tarfile.REGTYPE, size=1), io.BytesIO(b"a"))
    assert contents(buffer.getvalue()) == [("a", {"txt": b"a"})]
    assert index_of(buffer.getvalue()).cut == ""


NAMES = st.one_of(
    st.sampled_from(
        [
            "a.jpg",
            "a.txt",
            "a.JPG",
            "a.seg.png",
            "b.jpg",
            "b.txt",
            "d/a.jpg",
            "d/a.txt",
            "./a.jpg",
            "d.x/a.jpg",
            "/a.jpg",
            "noext",
            "d/noext",
            ".hidden",
            "d/.hidden",
            "a.",
            "a..jpg",
            "__meta__",
            "__meta__/x.jpg",
            "__meta__.jpg",
            "__/a.jpg",
            "___/a.txt",
            "d/__meta__/x.jpg",
            "__",
            "___",
            "____",
            "____/a.jpg",
            "__a",
            "a__",
            "é.jpg",
            "a b.txt",
        ]
    ),
    st.text("ab./_\né", min_size=1, max_size=6).filter(
        lambda name: not name.endswith("/") and not is_foreign(name)
    ),
)


def without_repeats(names: list[str]) -> list[str]:
    """Those that webdataset takes: it raises where an extension comes again in a sample."""
    for count in range(len(names), 0, -1):
        try:
            by_webdataset(tar_bytes([(n, b"") for n in names[:count]]))
            return names[:count]
        except ValueError:
            continue
    return []


@given(st.lists(NAMES, max_size=8), st.sampled_from(list(FORMATS.values())))
def test_samples_are_webdatasets(names: list[str], format: int) -> None:
    if format == tarfile.USTAR_FORMAT:
        names = [n for n in names if n.isascii()]
    members = [(n, f"{i}".encode()) for i, n in enumerate(without_repeats(names))]
    data = tar_bytes(members, format)
    index = index_of(data)
    assert contents(data, index) == by_webdataset(data)
    assert index.cut == ""


@given(st.lists(NAMES, max_size=8))
def test_every_member_is_in_a_sample_or_a_stray_or_meta(names: list[str]) -> None:
    data = tar_bytes([(n, b"") for n in names])
    index = index_of(data)
    strays = [s for s in index.strays if s.reason != MERGED]  # those are in samples, too
    held = sum(len(s.members) for s in index.samples) + len(strays)
    meta = sum(n.split("/")[0][:2] == n.split("/")[0][-2:] == "__" for n in names)
    assert held <= len(names) <= held + meta


def test_a_repeated_extension_starts_the_next_sample() -> None:
    data = tar_bytes([("a.jpg", b"1"), ("a.txt", b"1"), ("a.JPG", b"2"), ("a.txt", b"2")])
    assert contents(data) == [
        ("a", {"jpg": b"1", "txt": b"1"}),
        ("a", {"jpg": b"2", "txt": b"2"}),
    ]


def test_a_key_that_comes_back_later_is_another_sample() -> None:
    data = tar_bytes([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3")])
    assert [key for key, _ in contents(data)] == ["a", "b", "a"]


def test_upper_case_extensions_are_lowered() -> None:
    assert contents(tar_bytes([("A.JPG", b""), ("A.Txt", b"")])) == [
        ("A", {"jpg": b"", "txt": b""})
    ]


def test_members_without_an_extension_are_strays() -> None:
    index = index_of(tar_bytes([("a.jpg", b""), ("picture", b"x"), ("a.txt", b""), (".x", b"")]))
    assert [list(s.members) for s in index.samples] == [["jpg", "txt"]]
    why = "a member without an extension"
    assert index.strays == [Rejection("picture", why), Rejection(".x", why)]


def test_folders_are_nothing_and_links_and_devices_count_with_their_sample() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(special("d.x/", tarfile.DIRTYPE))
        tar.addfile(special("d.x/a.jpg", tarfile.REGTYPE, size=2), io.BytesIO(b"jp"))
        tar.addfile(special("d.x/a.txt", tarfile.SYMTYPE, linkname="a.jpg"))
        tar.addfile(special("d.x/a.json", tarfile.LNKTYPE, linkname="d.x/a.jpg", size=2))
        tar.addfile(special("d.x/a.pipe", tarfile.FIFOTYPE))
        tar.addfile(special("d.x/a.new", b"Q", size=3), io.BytesIO(b"odd"))
        tar.addfile(special("d.x/a.cls", tarfile.REGTYPE, size=1), io.BytesIO(b"7"))
    index = index_of(buffer.getvalue())
    assert contents(buffer.getvalue(), index) == [("d.x/a", {"jpg": b"jp", "cls": b"7"})]
    assert index.samples[0].links == ["txt", "json", "pipe", "new"]
    assert (index.strays, index.cut) == ([], "")


def test_an_old_folder_entry_with_a_slash_is_nothing() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(special("d.x/", tarfile.AREGTYPE))
    assert index_of(buffer.getvalue()) == NOTHING


def gnu_sparse(name: str, real: int) -> bytes:
    """A member with one piece of 512 bytes and a hole of the rest."""
    info = special(name, tarfile.GNUTYPE_SPARSE, size=512)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, 512)
    block[483:495] = b"%011o\0" % real
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + b"d" * 512


def pax_sparse(name: str, real: int) -> bytes:
    sparse_map = b"1\n0\n512\n".ljust(512, b"\0")
    info = special("GNUSparseFile.0/x", tarfile.REGTYPE, size=1024)
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(real),
    }
    return info.tobuf(tarfile.PAX_FORMAT) + sparse_map + b"d" * 512


@pytest.mark.parametrize("make", [gnu_sparse, pax_sparse])
@pytest.mark.parametrize("real", [1024, 10**9])
def test_sparse_members_are_strays_whatever_size_they_claim(make: Any, real: int) -> None:
    data = make("a.jpg", real) + tar_bytes([("b.txt", b"b")])
    index = index_of(data)
    assert index.cut == ""
    assert index.strays == [Rejection("a.jpg", "a link or a special file")]
    assert contents(data, index) == [("b", {"txt": b"b"})]


def test_an_empty_tar_is_whole_and_has_no_samples() -> None:
    assert index_of(tar_bytes([])) == NOTHING
    assert index_of(bytes(512)) == NOTHING


# --- damaged archives ---


def member_ends(data: bytes) -> list[tuple[str, int, int]]:
    """Name, end of the header and end of the data of each member."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.name, m.offset_data, m.offset_data + m.size) for m in tar]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_cut_anywhere_a_tar_loses_no_sample_silently(format: int) -> None:
    long = "" if format == tarfile.USTAR_FORMAT else "n" * 120
    members = [("a.jpg", b"1"), ("a.txt", b"2"), ("f.x/b.jpg", b"3" * 600), (long + "c.jpg", b"")]
    data = tar_bytes(members, format)
    ends = member_ends(data)
    content = ends[-1][2] + -ends[-1][2] % 512
    whole = dict(contents(data))
    for size in range(content + 1024):
        index = index_of(data[:size])
        assert bool(index.cut) == (size < content + 512), size
        readable = {n.rpartition(".")[0] for n, header, _ in ends if header <= size}
        found = [s.key for s in index.samples] + [s.key for s in index.strays]
        assert sorted(found) == sorted(readable), size
        assert dict(contents(data, index)).items() <= whole.items(), size


def test_a_cut_names_the_byte_and_the_member() -> None:
    data = tar_bytes([("a.txt", b"x" * 600), ("b.txt", b"x" * 600)])
    assert index_of(data[:1000]).cut == "at byte 1000: a.txt should reach byte 1112"
    assert index_of(data[:1100]).strays == [Rejection("a", CUT_OFF)]
    assert index_of(data[:1600]).cut == "at byte 1536 of 1600: truncated header"


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_cut_in_any_header_is_called_one(format: int) -> None:
    """Also in those of a long name or a time, which describe the header that follows."""
    name = "a.txt" if format == tarfile.USTAR_FORMAT else "n" * 120 + ".txt"
    data = tar_bytes([(name, b"")], format)
    content = len(data.rstrip(b"\0")) // 512 * 512 + 512
    found = {index_of(data[:size]).cut for size in range(1, content)}
    assert found == {f"at byte 0 of {size}: truncated header" for size in range(1, content)}


def test_without_its_end_mark_a_tar_is_cut_though_all_samples_are_there() -> None:
    data = tar_bytes(THREE)[: 9 * 1024]
    index = index_of(data)
    assert index.cut == f"at byte {len(data)} of {len(data)}: the end-of-archive mark is missing"
    assert [s.key for s in index.samples] == ["a", "b", "c"]
    assert index.strays == []


def test_a_single_sample_before_a_cut_is_not_trusted() -> None:
    """Nothing tells whether it had more members."""
    index = index_of(tar_bytes(triple("a"))[: 3 * 1024])
    assert (index.samples, index.strays) == ([], [Rejection("a", CUT_OFF)])


def test_a_cut_in_a_repeated_member_costs_only_the_sample_it_starts() -> None:
    data = tar_bytes([("a.jpg", b"1"), ("a.txt", b"1"), ("a.JPG", b"2" * 600)])
    index = index_of(data[: 2 * 1024 + 700])
    assert [list(s.members) for s in index.samples] == [["jpg", "txt"]]
    assert index.strays == [Rejection("a", CUT_OFF)]


@pytest.mark.parametrize("at", [0, 50, 124, 148, 156, 257, 511])
def test_a_flipped_byte_in_a_header_is_a_cut_there(at: int) -> None:
    data = bytearray(tar_bytes(THREE, tarfile.USTAR_FORMAT))
    data[4 * 1024 + at] ^= 0x41  # the header of b.json
    index = index_of(bytes(data))
    says = f"damaged at byte 4096 of {len(data)}: (bad checksum|invalid header)"
    assert re.fullmatch(says, index.cut)
    assert [s.key for s in index.samples] == ["a"]
    assert index.strays == [Rejection("b", CUT_OFF)]


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_blocks_of_zeros_with_members_after_them_are_no_end(blocks: int) -> None:
    """A filesystem that lost a write leaves zeros; what stands behind them must not vanish."""
    data = bytearray(tar_bytes(THREE))
    data[6 * 1024 : 6 * 1024 + 512 * blocks] = bytes(512 * blocks)
    index = index_of(bytes(data))
    assert index.cut == f"damaged at byte 6144 of {len(data)}: zeros, and more data after them"
    assert [s.key for s in index.samples] == ["a", "b"]


@pytest.mark.parametrize("record", [512, 1024, 10_240, 1 << 14, 1 << 18, 1 << 20])
@pytest.mark.parametrize("spare", [0, 512, 1024])
def test_an_archive_padded_to_a_record_is_whole(record: int, spare: int) -> None:
    """By the records of tar's `-b`; the end mark may need another one."""
    members = tar_bytes(THREE, tarfile.GNU_FORMAT)[: 9 * 1024]
    filler = -(len(members) + 512 + spare) % record
    members += tar_bytes([("f.txt", bytes(filler))])[: 512 + filler]
    assert (len(members) + spare) % record == 0
    data = members + bytes(1024)
    index = index_of(data + bytes(-len(data) % record))
    assert (index.cut, len(index.samples)) == ("", 4)


@pytest.mark.parametrize("zeros", [10_753, 16_385, 100_001, 3_000_001, 1 << 22])
def test_zeros_beyond_any_padding_are_a_write_that_never_finished(zeros: int) -> None:
    """A file is made as long as it will be, and its download breaks off between two members."""
    data = tar_bytes(THREE)[: 9 * 1024]
    index = index_of(data + bytes(zeros))
    assert index.cut.startswith(
        f"at byte {len(data)} of {len(data) + zeros}: zeros to the end, far"
    )
    assert [s.key for s in index.samples] == ["a", "b", "c"]


def test_zeros_from_within_a_member_on_are_no_padding_either() -> None:
    data = tar_bytes([*triple("a"), ("b.jpg", b"x" * 50000)])
    assert "far more than padding" in index_of(data[:20_000] + bytes(200_000)).cut


@pytest.mark.parametrize(
    ("size", "whole"), [(512, 1), (1024, 1), (10_240, 1), (10_752, 0), (1 << 20, 0)]
)
def test_nothing_but_zeros_is_an_empty_tar_only_where_it_is_as_short_as_one(
    size: int, whole: int
) -> None:
    index = index_of(bytes(size))
    assert (index.cut == "") == bool(whole)
    assert (index.samples, index.strays) == ([], [])


@pytest.mark.parametrize("junk", [b"", b"x", b"<html>" * 200, b"\xff" * 1024, bytes(511)])
def test_what_is_no_tar_is_cut_at_its_first_byte(junk: bytes) -> None:
    index = index_of(junk)
    assert re.match(f"(damaged )?at byte 0 of {len(junk)}: ", index.cut)
    assert (index.samples, index.strays) == ([], [])


def with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def of_size(kind: bytes, size: int) -> bytes:
    """A header whose size is given as a base-256 number, which may be negative or huge."""
    block = bytearray(special("a.txt", kind).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 256**11).to_bytes(11, "big")
    return with_checksum(block)


HOSTILE = {
    "backwards": of_size(tarfile.REGTYPE, -1024),
    "standing still": of_size(tarfile.REGTYPE, -512),
    "far back": of_size(tarfile.REGTYPE, -(10**15)),
    "huge": of_size(tarfile.REGTYPE, 2**80),
    "huge long name": of_size(tarfile.GNUTYPE_LONGNAME, 2**62),
    "huger long name": of_size(tarfile.GNUTYPE_LONGNAME, 2**80),
    "huge pax": of_size(tarfile.XHDTYPE, 2**62),
    "negative pax": of_size(tarfile.XHDTYPE, -512),
    "unknown kind backwards": of_size(b"Q", -2048),
    "long names without end": of_size(tarfile.GNUTYPE_LONGNAME, 0) * 3000,
    "pax size below zero": special("a.txt", tarfile.REGTYPE, pax_headers={"size": "-2048"}).tobuf(
        tarfile.PAX_FORMAT
    ),
    "sparse map cut": gnu_sparse("a.jpg", 9)[:482],
    "pax sparse map of no numbers": pax_sparse("a.jpg", 9)[:-1024] + b"x" * 1024,
}
DIGITS = b"1" * 200_000


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A PAX header of these bytes."""
    block = bytearray(special("p", kind, size=len(records)).tobuf(tarfile.USTAR_FORMAT))
    return with_checksum(block) + records.ljust(-(-len(records) // 512) * 512, b"\0")


HOSTILE |= {
    "digits without end": pax(DIGITS),
    "digits in a global header": pax(DIGITS, tarfile.XGLTYPE),
    "digits in a value": pax(b"%d comment=%b\n" % (200_016, DIGITS)),
    "a record that reaches too far": pax(b"40 path=a\n"),
    "a record without a line's end": pax(b"9 path=ab"),
    "a record without a keyword": pax(b"6 =ab\n"),
    "a header over the bound": pax(b"2000020 comment=%b\n" % (b"x" * 2_000_003)),
    "a long name over the bound": pax(b"x" * 2_000_000, tarfile.GNUTYPE_LONGNAME),
    "headers without end": pax(b"13 comment=a\n") * 200,
}
_endless = bytearray(gnu_sparse("a.jpg", 9)[:512])
_endless[482] = 1
HOSTILE["sparse map that goes on"] = with_checksum(_endless)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("rest", [b"", tar_bytes([("z.txt", b"z")])])
def test_headers_made_to_trip_the_reader_are_cuts(tmp_path: Path, name: str, rest: bytes) -> None:
    if "sparse map" in name:  # what follows would be taken for the map
        rest = rest[:0]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(triple("a") + triple("b"))[: 6 * 1024] + HOSTILE[name] + rest)
    with closing(Archive(path)) as archive:
        index = read(archive.index())
    assert index.cut
    assert [s.key for s in index.samples] == ["a", "b"]


@given(
    st.lists(st.tuples(st.integers(0, 9 * 1024 + 511), st.integers(1, 255)), min_size=1, max_size=6)
)
@example([(0, 8), (5, 253), (6, 251)])
@example([(5, 40), (100, 56)])
def test_whatever_bytes_flip_nothing_raises(flips: list[tuple[int, int]]) -> None:
    data = bytearray(_three())
    for offset, mask in flips:
        data[offset] ^= mask
    assume(not _unnoticed(data))
    index = index_of(bytes(data))
    in_headers = [o for o, _ in flips if o % 1024 < 512 or o >= 9 * 1024]
    assert bool(index.cut) == (bytes(data[o] for o in in_headers) != _original(in_headers))


def _unnoticed(data: bytearray) -> bool:
    """Flips in some header cancel out in its checksum, which may be of signed bytes, too."""
    starts = range(0, 9 * 1024, 1024)
    return any(
        _is_header(h) and h != _three()[s : s + 512] for s in starts if (h := data[s : s + 512])
    )


def _is_header(block: bytearray) -> bool:
    """Whether the checksum is right; fields that no reader needs, such as the mode, may be odd."""
    with contextlib.suppress(tarfile.HeaderError):
        return tarfile.nti(bytes(block[148:156])) in tarfile.calc_chksums(bytes(block))
    return False


@functools.cache
def _three() -> bytes:
    return tar_bytes(THREE, tarfile.GNU_FORMAT)


def _original(offsets: list[int]) -> bytes:
    return bytes(_three()[o] for o in offsets)


# --- archives ---


def test_many_threads_read_one_archive(tmp_path: Path) -> None:
    members = [(f"{i}.txt", f"{i}".encode() * 1000) for i in range(50)]
    path = write_tar(tmp_path / "a.tar", members)
    wrong: Counter[str] = Counter()
    with closing(Archive(path)) as archive:
        samples = list(archive.index())

        def check() -> None:
            for (name, data), sample in zip(members, samples, strict=True):
                wrong[name] += archive.read(*sample.members["txt"]) != data

        threads = [threading.Thread(target=check) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(wrong) == 50
    assert not wrong.total()


@given(
    st.lists(st.sampled_from([0, 1, 5, 511, 512, 3000, 700_000, STRETCH + 1]), max_size=12),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.integers(0, 5),
)
@example([STRETCH + 1, 5, STRETCH - 512, 9, 700_000, 700_000, 1], tarfile.PAX_FORMAT, 0)
@example([STRETCH - 1024, 512, 5], tarfile.PAX_FORMAT, 0)
def test_members_are_the_same_whether_they_came_with_the_headers_or_not(
    sizes: list[int], form: int, cut: int
) -> None:
    """Of samples of up to three members, also with long names, and of a tar that is cut off."""
    members = [
        (f"{'long/' * (number % 3 * 30)}{number // 3}.{number % 3}", os.urandom(size))
        for number, size in enumerate(sizes)
    ]
    data = tar_bytes(members, form)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(data[: len(data) - cut * 7000])
        with closing(Archive(path)) as archive:
            for sample in archive.index():
                for offset, size in sample.members.values():
                    expected = data[offset : offset + size]
                    assert archive.latest(offset, size) == archive.read(offset, size) == expected


def test_members_that_came_with_the_headers_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.x", bytes(10_000)) for i in range(500)])
    read: list[int] = []
    pread = os.pread

    def counted(fd: int, size: int, offset: int) -> bytes:
        read.append(size)
        return pread(fd, size, offset)

    with closing(Archive(path)) as archive:
        monkeypatch.setattr(os, "pread", counted)
        for sample in archive.index():
            archive.latest(*sample.members["x"])
    assert set(read) == {10_000}
    assert len(read) <= path.stat().st_size // STRETCH  # those that lie in two blocks


def test_a_file_that_shrinks_is_an_error_not_a_shorter_member(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    with closing(Archive(tmp_path / "f")) as archive:
        assert archive.read(2, 3) == b"234"
        assert archive.read(10, 0) == b""
        with pytest.raises(ShardError, match="changed while it was read"):
            archive.read(8, 3)
