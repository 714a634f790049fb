"""Broken, odd and hostile tars, through the command that users type.

By hand, from the tests folder: `python -m fuzz.tars SEED COUNT FOLDER`. A seed makes the same tars
each time. What must hold, whatever the bytes are:

- every tar has exactly one outcome on record, and none of them a traceback;
- a tar that the standard library reads to its end is done: each of its files is a member of a row,
  or named by a rejection or a notice (`independent`, which shares no code with the program);
- no tar takes longer than `LONGEST` seconds, and the process no more than `MEMORY` bytes;
- `d2m verify` finds nothing wrong.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kit
import pyarrow.parquet as pq

LONGEST = 20.0
MEMORY = 4 << 30
"""Bytes of a task with two decode threads: two GB each."""
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""Between the test and the command, as a child of a large process has its size as a peak."""
BLOCK = tarfile.BLOCKSIZE
Maker = Callable[["Fuzzer"], bytes]
MAKERS: list[Maker] = []


def maker(make: Maker) -> Maker:
    """Register a kind of tar."""
    MAKERS.append(make)
    return make


class Fuzzer:
    """Makes tars from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.samples = [list(kit.sample(f"{i:09d}", i).items()) for i in range(24)]

    def members(self) -> list[tuple[str, bytes]]:
        """The files of one to five good samples."""
        chosen = self.random.sample(self.samples, self.random.randint(1, 5))
        return [member for sample in chosen for member in sample]

    def good(self) -> bytearray:
        """A whole tar, in one of the three formats."""
        formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        return packed(self.members(), self.random.choice(formats))

    def next(self) -> tuple[str, bytes]:
        """A tar, and the name of its kind."""
        make = self.random.choice(MAKERS)
        return make.__name__, bytes(make(self))

    def noise(self, size: int) -> bytes:
        return self.random.randbytes(size)

    def place(self, tar: bytes | bytearray) -> int:
        """Where some header of a good tar begins."""
        return self.random.choice(header_offsets(tar))


def packed(members: list[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT) -> bytearray:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5 if kind == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(data))
    return bytearray(buffer.getvalue())


def header_offsets(tar: bytes | bytearray) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(bytes(tar))) as opened:
        return [member.offset for member in opened]


def signed(header: bytes | bytearray) -> bytearray:
    """A header with the checksum that its bytes have."""
    header = bytearray(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


def header(name: bytes, size: int | bytes, kind: bytes = b"0", link: bytes = b"") -> bytearray:
    """A ustar header with any bytes in its fields."""
    made = bytearray(BLOCK)
    digits = size if isinstance(size, bytes) else b"%011o\0" % size
    fields = {0: name[:100], 100: b"0000644\0", 124: digits[:12], 136: b"%011o\0" % 1}
    fields |= {156: kind, 157: link[:100], 257: b"ustar\x0000"}
    for offset, value in fields.items():
        made[offset : offset + len(value)] = value
    return signed(made)


def filled(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def entry(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return bytes(header(name, len(data), kind)) + filled(data)


def pax(key: bytes, value: bytes) -> bytes:
    """One record of a PAX header, with its own length in front."""
    rest = b" %b=%b\n" % (key, value)
    size = len(rest)
    while len(b"%d" % size) + len(rest) != size:
        size = len(b"%d" % size) + len(rest)
    return b"%d" % size + rest


# --- damage ---


@maker
def whole(fuzz: Fuzzer) -> bytes:
    return fuzz.good()


@maker
def flipped_bits(fuzz: Fuzzer) -> bytes:
    tar = fuzz.good()
    for _ in range(fuzz.random.choice((1, 1, 3, 40))):
        tar[fuzz.random.randrange(len(tar))] ^= 1 << fuzz.random.randrange(8)
    return tar


@maker
def flipped_header(fuzz: Fuzzer) -> bytes:
    """With a checksum that fits, most times."""
    tar = fuzz.good()
    at = fuzz.place(tar)
    for _ in range(fuzz.random.choice((1, 2, 5))):
        tar[at + fuzz.random.randrange(BLOCK)] ^= 1 << fuzz.random.randrange(8)
    if fuzz.random.random() < 0.7:
        tar[at : at + BLOCK] = signed(tar[at : at + BLOCK])
    return tar


@maker
def cut(fuzz: Fuzzer) -> bytes:
    tar = fuzz.good()
    at = fuzz.random.randrange(len(tar))
    return tar[: at // BLOCK * BLOCK if fuzz.random.random() < 0.5 else at]


@maker
def zeros_within(fuzz: Fuzzer) -> bytes:
    """As a filesystem leaves a file after a crash, or a download that was interrupted."""
    tar = fuzz.good()
    start = fuzz.random.randrange(len(tar)) // BLOCK * BLOCK
    rest = len(tar) - start
    size = fuzz.random.choice((BLOCK, 2 * BLOCK, 8 * BLOCK, rest))
    tar[start : start + size] = bytes(min(size, rest))
    return tar


@maker
def joined(fuzz: Fuzzer) -> bytes:
    first, second = fuzz.good(), fuzz.good()
    cuts = (0, BLOCK, fuzz.random.randrange(len(second)))
    return first[: fuzz.place(first)] + second[fuzz.random.choice(cuts) :]


@maker
def two_archives(fuzz: Fuzzer) -> bytes:
    return fuzz.good() + fuzz.good()


@maker
def odd_end(fuzz: Fuzzer) -> bytes:
    tar = fuzz.good()
    tail = fuzz.random.choice((bytes(BLOCK), bytes(10240), bytes(1 << 21), b"x" * 700))
    end = header_offsets(tar)[-1]
    return tar + tail if fuzz.random.random() < 0.5 else tar[:end] + tail


# --- headers that say odd things ---

SIZES = (
    *(b"77777777777\0", b"-0000000001\0", b"00000000001 ", b"           \0", bytes(12)),
    *(b"\x80" + bytes(10) + b"\x07", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"0x1000\0", b"9" * 12),
    *(b"abcdefghijk\0", b"1e5\0", b"\x80\0\0\0\x7f" + b"\xff" * 7),
)


@maker
def odd_size(fuzz: Fuzzer) -> bytes:
    tar = fuzz.good()
    at = fuzz.place(tar)
    tar[at + 124 : at + 136] = fuzz.random.choice(SIZES).ljust(12, b"\0")
    tar[at : at + BLOCK] = signed(tar[at : at + BLOCK])
    return tar


@maker
def odd_kind(fuzz: Fuzzer) -> bytes:
    tar = fuzz.good()
    at = fuzz.place(tar)
    tar[at + 156] = fuzz.random.choice(b"\x001234567LKxgSVXDNMA" + fuzz.noise(3))
    tar[at : at + BLOCK] = signed(tar[at : at + BLOCK])
    return tar


FIELDS = ((0, 100), (100, 8), (108, 16), (136, 12), (148, 8), (157, 100), (257, 8), (345, 155))


@maker
def odd_field(fuzz: Fuzzer) -> bytes:
    tar = fuzz.good()
    at = fuzz.place(tar)
    start, size = fuzz.random.choice(FIELDS)
    value = fuzz.random.choice((fuzz.noise(size), b"\xff" * size, bytes(size), b"A" * size))
    tar[at + start : at + start + size] = value
    if start != 148:
        tar[at : at + BLOCK] = signed(tar[at : at + BLOCK])
    return tar


PAX = (
    *((b"path", b"../../etc/x.jpg"), (b"path", b"/abs.jpg"), (b"path", b"d" * 4000 + b".jpg")),
    *((b"path", b"\xff\xfe.jpg"), (b"path", b""), (b"path", b"a\nb.jpg"), (b"path", b"a\0b.jpg")),
    *((b"path", b"\x1b[2J.jpg"), (b"size", b"-1"), (b"size", b"9" * 30), (b"size", b"1e9")),
    *((b"size", b"0"), (b"size", b""), (b"mtime", b"nan"), (b"mtime", b"1e999"), (b"uid", b"x")),
    *((b"hdrcharset", b"BINARY"), (b"linkpath", b"../x"), (b"comment", b"c" * 90_000)),
    *((b"GNU.sparse.major", b"1"), (b"GNU.sparse.map", b"0,1,5"), (b"GNU.sparse.size", b"x")),
    *((b"GNU.sparse.map", b"0,99999999999"), (b"GNU.sparse.realsize", b"-1"), (b"", b"x")),
)


@maker
def odd_pax(fuzz: Fuzzer) -> bytes:
    tar = fuzz.good()
    records = b"".join(pax(*fuzz.random.choice(PAX)) for _ in range(fuzz.random.randint(1, 3)))
    damage = fuzz.random.random()
    if damage < 0.1:
        records = records[1:]
    elif damage < 0.2:
        records = b"%d " % 10 ** fuzz.random.choice((0, 3, 18, 40)) + records
    elif damage < 0.3:
        records = b"7" * fuzz.random.choice((300, 30_000, 200_000))
    size = len(records) if fuzz.random.random() < 0.9 else fuzz.random.choice((0, 511, 8**11 - 1))
    at = fuzz.place(tar)
    kind = fuzz.random.choice((b"x", b"x", b"g", b"X"))
    return tar[:at] + header(b"PaxHeader", size, kind) + filled(records) + tar[at:]


@maker
def odd_long_name(fuzz: Fuzzer) -> bytes:
    tar = fuzz.good()
    name = fuzz.random.choice(
        (
            b"l" * 180 + b".jpg\0",
            b"\0",
            b"",
            b"../up.jpg\0",
            b"n" * 250_000 + b".txt\0",
            b"\xff" * 300,
        )
    )
    size = len(name) if fuzz.random.random() < 0.8 else fuzz.random.choice((1, 10**6, 8**11 - 1))
    made = bytes(header(b"././@LongLink", size, fuzz.random.choice((b"L", b"K")))) + filled(name)
    at = fuzz.place(tar)
    return tar[:at] + made * fuzz.random.choice((1, 1, 2, 25)) + tar[at:]


@maker
def special_files(fuzz: Fuzzer) -> bytes:
    tar = fuzz.good()
    at = fuzz.place(tar)
    names = (b"000000001.jpg", b"dev.png", b"none", b"../up.jpg", b"d/", b"__m__", b"a.b/c", b"..")
    made = b""
    for _ in range(fuzz.random.randint(1, 4)):
        kind = fuzz.random.choice((b"1", b"2", b"3", b"4", b"5", b"6", b"7"))
        made += bytes(header(fuzz.random.choice(names), 0, kind, b"000000000.jpg"))
    return tar[:at] + made + tar[at:]


# --- names ---

NAMES = (
    *(b"", b".", b"..", b"/", b"a", b".jpg", b"d/.jpg", b"..jpg", b"a..jpg", b"a.", b"A.JPG"),
    *(b"a.jpg.txt", b"__a__", b"__a__/b.jpg", b"a\nb.jpg", b"\x1b[31m.jpg", b"\xff.jpg", b"a .jpg"),
    *(
        b"\xe2\x80\xa8.jpg",
        b"\xed\xa0\x80.jpg",
        b"d/e/f.jpg",
        b"../u.jpg",
        b"[x]*?.jpg",
        b"'\".jpg",
    ),
    *(b"._a.jpg", b".DS_Store", b"__MACOSX/._a.jpg", b"Thumbs.db", b"README.md", b"a.md5"),
    *(b"f.0000.jpg", b"f.0001.jpg", b"f.0002.jpg", b"<b>.jpg", b"\xe2\x80\xae.jpg"),
)


@maker
def odd_names(fuzz: Fuzzer) -> bytes:
    made = b""
    for _ in range(fuzz.random.randint(1, 8)):
        name = fuzz.random.choice(NAMES)
        for extension in fuzz.random.sample((b"", b".jpg", b".txt", b".json"), 2):
            made += entry(name + extension, b"{}" if extension == b".json" else b"text")
    return made + bytes(10240)


@maker
def repeated_members(fuzz: Fuzzer) -> bytes:
    members = fuzz.members()
    return packed([fuzz.random.choice(members) for _ in range(fuzz.random.randint(2, 20))])


@maker
def shuffled(fuzz: Fuzzer) -> bytes:
    members = fuzz.members()
    fuzz.random.shuffle(members)
    return packed(members)


# --- compressed, or no tar at all ---


@maker
def compressed(fuzz: Fuzzer) -> bytes:
    compress = fuzz.random.choice((gzip.compress, bz2.compress, lzma.compress))
    tar = bytearray(compress(bytes(fuzz.good())))
    damage = fuzz.random.randrange(5)
    if damage == 1:
        tar[fuzz.random.randrange(len(tar))] ^= 1 << fuzz.random.randrange(8)
    elif damage == 2:
        tar = tar[: fuzz.random.randrange(len(tar))]
    elif damage == 3:
        tar += fuzz.random.choice((b"junk", bytes(700), bytes(tar)))
    elif damage == 4:
        tar = bytearray(compress(bytes(tar)))
    return tar


@maker
def no_tar(fuzz: Fuzzer) -> bytes:
    size = fuzz.random.choice((0, 1, 511, 512, 1024, 20_000))
    starts = (b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0", b"PK\3\4", b"PAR1", b"<html>", b"{", b"\xff\xd8")
    junk = (bytes(size), fuzz.noise(size), b"words " * size, fuzz.random.choice(starts) + b"x" * 99)
    return fuzz.random.choice((*junk, fuzz.noise(BLOCK) + fuzz.good(), fuzz.good()[BLOCK:]))


# --- what must be true ---


@dataclass
class Found:
    """What came of some tars.

    Attributes:
        kinds: how many of each kind were made, and how many of these are done.
        faults: what must not be; a line each.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    rows: int = 0
    megabytes: int = 0
    slowest: float = 0.0


def unpacked(data: bytes) -> bytes | None:
    """The bytes of a tar; None where its compression is broken."""
    openers = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\0": lzma.decompress}
    for magic, unpack in openers.items():
        if data.startswith(magic):
            try:
                return unpack(data)
            except (OSError, EOFError, lzma.LZMAError, ValueError, Exception):
                return None
    return data


def independent(data: bytes) -> list[str] | None:
    """The names of the files of a tar that is whole beyond doubt, by the standard library.

    Returns:
        None for any other: nothing is said of those but that they have an outcome.
    """
    plain = unpacked(data)
    if plain is None or len(plain) < 2 * BLOCK:
        return None
    try:
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:", errorlevel=2) as tar:
            members, shared = tar.getmembers(), tar.pax_headers
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, LookupError, TypeError):
        return None
    # A last header that means nothing to the standard library is an end to it, too.
    ends = [m.offset_data + (-(-m.size // BLOCK) * BLOCK if m.isreg() else 0) for m in members]
    rest = plain[max(ends, default=0) :]
    if shared or any(rest) or not BLOCK <= len(rest) <= tarfile.RECORDSIZE:
        return None
    if any(member.issparse() or member.size < 0 for member in members):
        return None
    starts = [0, *ends]  # a global PAX header is no member's own
    if not all(strict(plain[s : m.offset_data]) for s, m in zip(starts, members, strict=False)):
        return None
    # What is no regular file has a name of its own rules.
    return [m.name if m.isreg() else f"{m.name}//special" for m in members if not m.isdir()]


def strict(headers: bytes) -> bool:
    """Whether all PAX records in front of a member are well-formed, as the format has them."""
    at = 0
    while headers[at + 156 : at + 157] in PAX_KINDS:
        digits = headers[at + 124 : at + 135]
        if not re.fullmatch(b"[0-7]{11}", digits):
            return False
        size = int(digits, 8)
        records = headers[at + BLOCK : at + BLOCK + size]
        while records:
            length, _, _ = records.partition(b" ")
            if not re.fullmatch(rb"\d{1,9}", length) or not 0 < int(length) <= len(records):
                return False
            record, records = records[: int(length)], records[int(length) :]
            if not re.fullmatch(rb"\d+ [^=]+=[^\n]*\n", record):
                return False
        at += BLOCK + -(-size // BLOCK) * BLOCK
    return True


PAX_KINDS = (b"x", b"g", b"X")


def run(seed: int, count: int, folder: Path, *options: str) -> Found:
    """Make tars, run the command on them, check what came of it."""
    fuzz, found, tars = Fuzzer(seed), Found(), folder / "tars"
    tars.mkdir(parents=True)
    kinds = {}
    for number in range(count):
        kinds[f"{number:05d}"], data = fuzz.next()
        (tars / f"{number:05d}.tar").write_bytes(data)
    found.kinds.update(kinds.values())
    values = {**kit.STATS, "input_tars": f"{tars}/*.tar", "output_metadata_dir": f"{folder}/out"}
    config = kit.write_config(
        folder / "c.yml", values, max_rejected_fraction=1.0, allow_missing_fields=True
    )
    command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "d2m_hpc", "submit"]
    command += [str(config), "--local", *options]
    limit = 60 + LONGEST * count
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    found.megabytes = int(ended.stdout.split()[-1]) >> 10
    if ended.returncode not in (0, 1) or "Traceback" in ended.stdout + ended.stderr:
        found.faults.append(f"exit code {ended.returncode}: {ended.stderr[-600:]}")
    if found.megabytes << 20 > MEMORY:
        found.faults.append(f"{found.megabytes} MB of memory")
    records = read_records(folder / "out/.d2m/records")
    for stem, kind in kinds.items():
        judge(stem, kind, records.get(stem, []), tars / f"{stem}.tar", found)
    verified = kit.d2m("verify", config, "--partial")
    if verified.returncode:
        found.faults.append(f"verify: {verified.stdout[-300:]}{verified.stderr[-300:]}")
    return found


def read_records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By shard; a line that is no JSON in UTF-8 raises here."""
    records: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                record = json.loads(line)
                records.setdefault(record["shard"], []).append(record)
    return records


def judge(stem: str, kind: str, records: list[dict[str, Any]], path: Path, found: Found) -> None:
    where = f"{stem} ({kind})"
    if len(records) != 1:
        found.faults.append(f"{where}: {len(records)} records")
        return
    [record] = records
    seconds = record["finished"] - record["started"]
    found.slowest = max(found.slowest, seconds)
    if seconds > LONGEST:
        found.faults.append(f"{where}: {seconds:.0f} s")
    if record.get("traceback"):
        found.faults.append(f"{where}: {record['traceback'].splitlines()[-1]}")
    if len(record.get("error", "")) > 1000:
        found.faults.append(f"{where}: an error of {len(record['error'])} characters")
    names = independent(path.read_bytes())
    if record["state"] == "done":
        found.done[kind] += 1
        found.rows += record["rows"]
        parquet = path.parent.parent / "out" / f"{stem}.parquet"
        if names is not None and (lost := unaccounted(names, record, parquet)):
            found.faults.append(f"{where}: {lost}")
    elif names is not None:
        found.faults.append(f"{where}: failed though it is whole: {record['error'][:200]}")


def unaccounted(names: list[str], record: dict[str, Any], parquet: Path) -> str:
    """What is wrong with the accounts of a whole tar; empty where nothing is.

    A name that no rule makes special is in a sample, and samples are counted by webdataset's rule:
    consecutive members of one key, until an extension comes again. The key of any other name that
    can be printed must at least be found in a row, a rejection or a notice.
    """
    rejections = record.get("rejections", [])
    total = record["rows"] + len(rejections)
    if all(map(PLAIN.fullmatch, names)):
        samples = groups(names)
        return "" if total == samples else f"{total} accounted for of {samples} samples"
    known = set(pq.read_table(parquet, columns=["key"])["key"].to_pylist())
    known |= {key for key, _ in rejections}
    told = " ".join(record.get("notices", []))
    lost = [name for name in names if not (FOREIGN.search(name) or is_told(name, known, told))]
    return f"in no account: {lost[:3]}" if lost else ""


PLAIN = re.compile(r"(\w+/)*(?!__)\w+\.(jpg|txt|json)", re.ASCII)
FOREIGN = re.compile(r"(^|/)(\._|\.DS_Store|__MACOSX/|Thumbs\.db|README)|\.md5$|^__\w*__")


def groups(names: list[str]) -> int:
    """How many samples there are of names with one dot each."""
    count, last, seen = 0, "", set[str]()
    for name in names:
        key, _, extension = name.rpartition(".")
        if key != last or extension in seen:
            count, last, seen = count + 1, key, set()
        seen.add(extension)
    return count


def is_told(name: str, known: set[str], told: str) -> bool:
    """Whether a name, or its key, is in an account; true of one that has to be escaped there."""
    name = name.removesuffix("//special")
    folder, slash, file = name.rpartition("/")
    key = folder + slash + file.partition(".")[0]
    if not name.isprintable():
        return True
    if file.startswith(".") and name.rpartition(".")[0] in {k.rpartition(".")[0] for k in known}:
        return True  # members of what would be one sample are told by the first
    return bool({name, key} & known) or name[:30] in told or " more" in told


def main(seed: int, count: int, folder: Path) -> int:
    """Thousands at a time, by hand; prints what was found."""
    faults = 0
    for start in range(0, count, 1000):
        number = seed + start // 1000
        found = run(number, min(1000, count - start), folder / str(number))
        print(f"seed {number}: {sum(found.done.values())} of {sum(found.kinds.values())} done,")
        print(f"  {found.rows} rows, {found.megabytes} MB, slowest {found.slowest:.1f} s")
        for fault in found.faults:
            print(f"  {fault}", flush=True)
        faults += len(found.faults)
    print(f"{count} tars, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
