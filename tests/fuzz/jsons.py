"""Odd and hostile JSON beside the pictures, carried into columns.

By hand, from the tests folder: `python -m fuzz.jsons SEED COUNT FOLDER`. What must hold: every
sample is a row or a rejection; a value that is in a row is the value that the JSON held; and all
shards read as one table.
"""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import kit
import pyarrow.dataset as ds
from fuzz.tars import read_records

SAMPLES = 8
"""In each tar; not all of the same kind, so that most tars are done."""
FIELDS = ("caption", "original_width", "free", "tags", "key")


class Fuzzer:
    """Makes JSON texts from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self) -> bytes:
        """A sample's JSON: mostly an object of odd values, sometimes broken or no object at all."""
        made = json.dumps(self.object(), ensure_ascii=self.random.random() < 0.5)
        data = made.encode("utf-8", "surrogatepass")
        match self.random.randrange(30):
            case 0:
                return data[: self.random.randrange(len(data))]
            case 1:
                return b"\xef\xbb\xbf" + data
            case 2:
                return made.encode("utf-16", "surrogatepass")
            case 3:
                return self.random.choice(
                    (b"", b"[]", b"null", b"5", b'"x"', b"\0" * 9, b"{" * 3000)
                )
            case 4:
                depth = self.random.choice((40, 120, 990, 50_000))
                left, right = self.random.choice(((b"[", b"]"), (b'{"a":', b"}")))
                return b'{"free": ' + left * depth + b"1" + right * depth + b"}"
            case 5:
                return b'{"free": %b}' % self.random.choice((b"9" * 5000, b"1e999", b"-Infinity"))
            case 6:
                return b'{"free": 1, "free": "twice", "caption": "c"}'
        return data

    def object(self) -> dict[str, Any]:
        made = {name: self.value(3) for name in FIELDS if self.random.random() < 0.8}
        return made | {"uid": f"{self.random.getrandbits(128):032x}"}

    def value(self, depth: int) -> Any:
        """Of any kind, nested to a depth."""
        pick = self.random.randrange(12 if depth else 9)
        if pick >= 9:
            inner = [self.value(depth - 1) for _ in range(self.random.randrange(4))]
            return inner if pick < 11 else {self.string(): value for value in inner}
        if pick < 4:
            return self.string()
        numbers = (0, -1, 5, 5.5, 2**53 + 1, 2**63, -(2**63), 10**30, 1e308, 1e-320, math.nan)
        return self.random.choice((None, True, False, *numbers))

    def string(self) -> str:
        odd = ("", "a", "4", "n/a", "\u2028", "\x85", "\0", "\x1b[31m", "\ud800", "\udfff\ud800")
        more = ("<script>", "'\"\\", "\u202e", "é" * 300, "{}", "null", "\U0001f600", "\r\n")
        return self.random.choice((*odd, *more))


@dataclass
class Found:
    """What came of some samples."""

    samples: int = 0
    rows: int = 0
    rejected: int = 0
    values: int = 0
    faults: list[str] = field(default_factory=list)


def run(seed: int, count: int, folder: Path) -> Found:
    """Make so many samples, `SAMPLES` a tar, run the command on them, compare what came of them."""
    fuzz, found, texts = Fuzzer(seed), Found(samples=count), dict[str, bytes]()
    for start in range(0, count, SAMPLES):
        members: dict[str, bytes] = {}
        for number in range(start, min(start + SAMPLES, count)):
            key = f"{number:06d}"
            texts[key] = fuzz.text()
            picture, words = kit.jpeg(number % 5, (16, 16)), b"words"
            members |= {f"{key}.jpg": picture, f"{key}.json": texts[key], f"{key}.txt": words}
        kit.write_tar(folder / "tars" / f"{start:06d}.tar", members)
    values = {**kit.STATS, "additional_fields": list(FIELDS), "input_tars": f"{folder}/tars/*.tar"}
    values |= {"output_metadata_dir": f"{folder}/out", "max_rejected_fraction": 1.0}
    config = kit.write_config(folder / "c.yml", values, allow_missing_fields=True)
    ended = kit.submit(config, timeout=60 + count)
    if ended.returncode or "Traceback" in ended.stdout + ended.stderr:
        found.faults.append(f"exit code {ended.returncode}: {ended.stdout[-900:]}{ended.stderr}")
    records = read_records(folder / "out/.d2m/records")
    for stem, [record] in records.items():
        found.rows += record["rows"]
        found.rejected += len(record.get("rejections", []))
        if record["state"] != "done":
            found.faults.append(f"{stem}: {record['error'][:300]}")
    if found.rows + found.rejected != count:
        found.faults.append(f"{found.rows} rows and {found.rejected} rejections of {count} samples")
    _compare(folder / "out", texts, found)
    return found


def _compare(out: Path, texts: dict[str, bytes], found: Found) -> None:
    """Every value in every row with what its JSON holds."""
    try:
        table = ds.dataset(sorted(map(str, out.glob("*.parquet")))).to_table()
    except Exception as error:
        found.faults.append(f"the shards are not one table: {error}")
        return
    rows = zip(table["key"].to_pylist(), *(table[name].to_pylist() for name in FIELDS), strict=True)
    for key, *carried in rows:
        held = json.loads(texts[key], parse_float=number)
        for name, value in zip(FIELDS, carried, strict=True):
            found.values += 1
            if name != "key" and not same(held.get(name), value):
                found.faults.append(
                    f"{key}: {name} holds {held.get(name)!r:.99}, got {value!r:.99}"
                )


def number(text: str) -> float:
    """A float, or the integer that a number too large for floats is."""
    value = float(text)
    return value if math.isfinite(value) else int(Decimal(text))


def same(held: Any, value: Any) -> bool:
    """Whether a column's value is a JSON's: itself, or its JSON text."""
    if isinstance(held, float) and math.isnan(held):
        return value is None or value == "NaN" or value != value
    if held is None or value is None:
        return held is value
    if isinstance(held, bool) != isinstance(value, bool) and not isinstance(value, str):
        return False
    if held == value:
        return True
    try:
        return isinstance(value, str) and json.dumps(json.loads(value)) == json.dumps(held)
    except ValueError:
        return False


def main(seed: int, count: int, folder: Path) -> int:
    """Thousands at a time, by hand; prints what was found."""
    faults = 0
    for start in range(0, count, 4000):
        number = seed + start // 4000
        found = run(number, min(4000, count - start), folder / str(number))
        print(f"seed {number}: {found.rows} rows, {found.rejected} rejected of {found.samples},")
        print(f"  {found.values} values compared", *found.faults, sep="\n  ", flush=True)
        faults += len(found.faults)
    print(f"{count} samples, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
