"""Broken, odd and hostile pictures, decoded and prepared for every built-in model.

By hand, from the tests folder: `python -m fuzz.images SEED COUNT`. A process of its own does the
work, so that a crash, a hang or a flood of memory is a finding and not the end. What must hold for
every picture: it is decoded, or rejected with a reason; within `LONGEST` seconds; and the process
never holds more than `MEMORY` bytes for its one decode thread.
"""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import threading
import traceback
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue

import kit
import numpy as np
from PIL import Image

TESTS = Path(__file__).parents[1]
LONGEST = 20.0
STARTING = 120.0
"""Seconds for a child to import torch."""
MEMORY = 2 << 30
"""Above what the process holds before the first picture."""
MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"),
    "AVIF": ("RGB", "RGBA"),
    "JPEG2000": ("L", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB"),
    "ICO": ("RGBA",),
    "ICNS": ("RGBA",),
    "DDS": ("RGB",),
    "TGA": ("RGB",),
    "PCX": ("RGB",),
    "EPS": ("RGB",),
    "IM": ("RGB",),
    "SGI": ("RGB",),
}
OPTIONS = ({}, {"progressive": True}, {"compression": "tiff_lzw"}, {"compression": "jpeg"})
SIZES = ((40, 30), (1, 1), (3, 170), (170, 2))


def originals() -> list[tuple[str, bytes]]:
    """Good files: every format and mode that PIL writes here, and some that are made by hand."""
    made = []
    for kind, modes in MODES.items():
        for mode in modes:
            for size in SIZES:
                for options in OPTIONS:
                    if (data := _saved(kind, mode, size, options)) is not None:
                        made.append((f"{kind} {mode}", data))
    made += [("huge by its header", _png(w, h)) for w, h in ((2**31 - 1, 1), (60_000, 60_000))]
    made += [("thin", _png(1, 2_000_000, whole=True)), ("wide", _png(2_000_000, 1, whole=True))]
    return [*made, ("text", b"<svg/>"), ("IPTC", b"\x1c\x03\x3c\0\1\1" * 9), ("nothing", b"\0")]


def _saved(kind: str, mode: str, size: tuple[int, int], options: dict[str, object]) -> bytes | None:
    pixels = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    try:
        grey = mode in ("I", "F", "I;16")
        picture = picture.convert("L").convert(mode) if grey else picture.convert(mode)
        picture.save(buffer, kind, **options)
    except (OSError, ValueError, KeyError, AttributeError, SystemError):
        return None  # a mode or an option that this format does not know
    return buffer.getvalue()


def _png(width: int, height: int, whole: bool = False) -> bytes:
    """A grey PNG of a few kB, whatever its size; with all of its rows, or none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    packer = zlib.compressobj(9)
    rows = packer.compress(bytes((width + 1) * height)) + packer.flush() if whole else b""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def mutated(source: random.Random, data: bytes) -> bytes:
    """A copy with damage of one kind, or without."""
    made, size = bytearray(data), len(data)
    at = source.randrange(size)
    match source.randrange(9):
        case 0 | 1 | 2:
            for _ in range(source.choice((1, 2, 6, 40))):
                made[source.randrange(size)] ^= 1 << source.randrange(8)
        case 3:
            made = made[:at]
        case 4:
            for _ in range(source.choice((1, 4, 12))):
                made[source.randrange(min(size, 64))] = source.choice((0, 1, 0x7F, 0x80, 0xFF))
        case 5:
            width = source.choice((2, 4, 8))
            made[at : at + width] = source.choice((b"\xff", b"\0", b"\x7f")) * width
        case 6:
            made[at:at] = source.randbytes(source.choice((1, 2, 64)))
        case 7:
            del made[at : at + source.choice((1, 2, 64))]
        case _:
            made[at:at] = made[source.randrange(size) :]
    return bytes(made)


def cases(seed: int, count: int) -> Iterator[tuple[int, str, bytes]]:
    source, files = random.Random(seed), originals()
    for number in range(count):
        kind, data = source.choice(files)
        yield number, kind, data if source.random() < 0.1 else mutated(source, data)


def work(seed: int, count: int, start: int) -> None:
    """In the child: a line before each picture, one for each fault, and figures at the end."""
    import torch

    from d2m_hpc.errors import Rejected
    from d2m_hpc.models.preprocessors import PREPROCESSORS, Options
    from d2m_hpc.worker.read import decode

    torch.set_num_threads(1)
    makers = {name: PREPROCESSORS[f"{name}-aug"] for name in ("clip", "faces", "dedup", "stats")}
    before, outcomes = kit.peak(), Counter[str]()
    for number, kind, data in cases(seed, count):
        if number < start:
            continue
        print(f"at {number} {kind}", flush=True)
        try:
            picture = decode.image(data, Options().max_pixels)
            for name, made in makers.items():
                exact = number % 5 == 0
                prepared = made.prepare(picture, Options(exact=exact))
                pixels = prepared[0] if isinstance(prepared, tuple) else prepared
                side = {"dedup": 512, "stats": 256}.get(name, 224)
                assert (pixels.shape, pixels.dtype) == ((side, side, 3), np.uint8)
            outcomes["prepared"] += 1
        except Rejected as reason:
            outcomes["rejected"] += 1
            if not 0 < len(str(reason)) < 1000:
                print(f"fault {number} {kind}: a reason of {len(str(reason))} characters")
        except Exception:
            last = " | ".join(traceback.format_exc().splitlines()[-3:])
            print(f"fault {number} {kind}: {last}")
    grown = kit.peak() - before
    if grown > MEMORY:
        print(f"fault memory: {grown >> 20} MB more than before the first picture")
    print(f"end {dict(outcomes)} {grown >> 20} MB", flush=True)


@dataclass
class Found:
    """What came of some pictures; `figures` is what each child said at its end."""

    faults: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)


def run(seed: int, count: int) -> Found:
    """Watch children until every picture had its turn; a new one goes on behind a fatal picture."""
    found, start = Found(), 0
    while start < count:
        start = _watch(seed, count, start, found)
    return found


def _watch(seed: int, count: int, start: int, found: Found) -> int:
    """Follow one child; returns the number of the picture that the next one begins with."""
    command = [sys.executable, "-m", "fuzz.images", "--child", str(seed), str(count), str(start)]
    at, lines = start, Queue[str]()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS) as child:
        threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True).start()
        said, patience = "", STARTING
        while not said.startswith("end "):
            try:
                said = lines.get(timeout=patience)
            except Empty:
                child.kill()
                found.faults.append(f"picture {at}: more than {LONGEST:.0f} s")
                return at + 1
            patience = LONGEST
            if said.startswith("at "):
                at = int(said.split()[1])
            elif said.startswith("fault "):
                found.faults.append(said)
            elif not said:
                found.faults.append(f"picture {at}: the process ended with {child.wait()}")
                return at + 1
    found.figures.append(said)
    return count


def _forward(pipe: Iterable[str], lines: Queue[str]) -> None:
    for line in pipe:
        lines.put(line.strip())
    lines.put("")


def main(seed: int, count: int) -> int:
    found = run(seed, count)
    print(*found.faults, *found.figures, f"{count} pictures, {len(found.faults)} faults", sep="\n")
    return 1 if found.faults else 0


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        work(*map(int, sys.argv[2:]))
    else:
        sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
