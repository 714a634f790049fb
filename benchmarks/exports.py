"""Each export's rate against a plain copy's, by CPU seconds and as a user waits for it.

    python -m benchmarks.exports [--shards N] [--rows N] [--folder DIR] [--times N] [EXPORT ...]

The run is made up: CLIP L/14's features of images and texts (768 numbers each, random), columns and
captions; tars of random bytes in place of pictures. Each export is a command in a process of its
own, as a user types it, in turns with `cp -R` and `sync` of each file, as exports sync theirs.
Copied is what the export wrote; if that is a small part of what it reads, the files it reads. The
exports that do more than copy are also beside the few lines of Python that one would write with
`tarfile`, pyarrow and pylance: what these take is not ours to save.

The rate is megabytes of the copied files by second. What a command takes for starting is told by an
export of a run of one shard, and is taken off before the rates are compared; times are as they are.
The load is the kernel's of the last minute, which has this program's own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.captions import captions
from benchmarks.control import BIN, Row, measure
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import Record, Recorder, Shard
from d2m_hpc.run.shards import write_shards

WIDTH = 768
PICTURE = 20_000
"""Bytes of a picture in the tars."""
PICTURES = 1000
"""Samples of a shard that have a picture: the tars' size, apart from the vectors'."""
KEYS = {
    "models": ["oai-clip-vit-l14", "faces-scrfd10g"],
    "postprocess_columns": ["oai-clip-vit-l14-score", "face-boxes"],
    "postprocess_features": ["oai-clip-vit-l14-image", "oai-clip-vit-l14-text"],
    "additional_fields": ["uid", "url", "caption", "original_width", "original_height"],
}
COPY = 'PATH=/usr/bin:/bin; cp -R --reflink=never "$@" && find "${@: -1}" -type f -exec sync {} +'


BY_TARFILE = """
import json, os, pathlib, sys, tarfile
out = pathlib.Path(sys.argv[-1])
out.mkdir()
for line in map(json.loads, open("kept.jsonl")):
    keys, name = {*line["keys"]}, line["shard"] + ".tar"
    with tarfile.open(f"tars/{name}") as tar, (out / name).open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as kept:
            for member in tar:
                if member.name.partition(".")[0] in keys:
                    kept.addfile(member, tar.extractfile(member))
        file.flush()
        os.fsync(file.fileno())
"""
BY_PYARROW = """
import os, sys
import pyarrow.dataset as ds, pyarrow.parquet as pq
*paths, out = sys.argv[1:]
table = ds.dataset(paths).to_table(["uid", "url", "caption"])
with open(f"{out}/kept.parquet", "wb") as file:
    pq.write_table(table, file)
    file.flush()
    os.fsync(file.fileno())
"""
TABLES = """
import os, pathlib, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
def tables():
    for path in sorted(pathlib.Path("out").glob("*.parquet")):
        table = pq.read_table(path)
        with np.load(path.with_suffix(".npz")) as arrays:
            for name in arrays.files:
                values = pa.array(arrays[name].reshape(-1))
                lists = pa.FixedSizeListArray.from_arrays(values, len(values) // len(table))
                table = table.append_column(name, lists)
        yield table
schema = next(tables()).schema
"""
HF_BY_PYARROW = f"""{TABLES}
options = {{"use_dictionary": False, "write_statistics": False, "compression": "none"}}
with open(sys.argv[-1], "wb") as file:
    with pq.ParquetWriter(file, schema, **options) as writer:
        for table in tables():
            writer.write_table(table)
    file.flush()
    os.fsync(file.fileno())
"""
BY_PYLANCE = f"""{TABLES}
import lance
batches = (batch for table in tables() for batch in table.to_batches())
lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches), sys.argv[-1])
"""


@dataclass(frozen=True)
class Export:
    """An export's words, and what it is compared with.

    Attributes:
        reads: files beside its result that it reads, if these are copied.
        program: does the same, in place of a copy.
    """

    words: tuple[str, ...]
    kind: str = "float16"
    reads: str = ""
    program: str = ""


EXPORTS = {
    "npy": Export(("npy", "-o")),
    "npy, float32": Export(("npy", "-o"), "float32"),
    "clip-retrieval": Export(("clip-retrieval", "-o")),
    "hf": Export(("hf", "-o")),
    "hf, float32": Export(("hf", "-o"), "float32"),
    "hf, pyarrow": Export(("hf", "-o"), program=HF_BY_PYARROW),
    "lance": Export(("lance", "-o")),
    "lance, float32": Export(("lance", "-o"), "float32"),
    "lance, pylance": Export(("lance", "-o"), program=BY_PYLANCE),
    "datacomp": Export(("datacomp", "-o")),
    "subset-tars": Export(("subset-tars", "--lists", "kept.jsonl", "-o")),
    "subset-tars, tarfile": Export(
        ("subset-tars", "--lists", "kept.jsonl", "-o"), program=BY_TARFILE
    ),
    "img2dataset": Export(("img2dataset", "-o"), reads="*.parquet"),
    "img2dataset, pyarrow": Export(("img2dataset", "-o"), reads="*.parquet", program=BY_PYARROW),
}


def make_run(folder: Path, shards: int, rows: int, kind: str) -> None:
    """A finished run, `c.yml`, with its tars, and `kept.jsonl`, which names nearly all pictures."""
    run, out = RunDir(folder / "run"), folder / "out"
    run.create()
    run.new_submission().intent.write_text(json.dumps({"fingerprint": "now"}))
    out.mkdir()
    (folder / "tars").mkdir()
    rng, kept, planned = np.random.default_rng(0), [], []
    for number in range(shards):
        stem = f"{number:08d}"
        pq.write_table(_columns(number, rows), out / f"{stem}.parquet", compression="zstd")
        features = {
            name: rng.standard_normal((rows, WIDTH), np.float32).astype(kind)
            for name in KEYS["postprocess_features"]
        }
        np.savez(out / f"{stem}.npz", **features)
        record = Record(stem, "done", rows=rows, started=1.0, finished=2.0, task="000-0-0")
        record.fingerprint = "now"
        Recorder(run.record("000", 0, 0)).append(record)
        keys = [f"{i:09d}" for i in range(min(rows, PICTURES))]
        path = folder / "tars" / f"{stem}.tar"
        _write_tar(path, keys, random.Random(number))
        planned.append(Shard(stem, str(path), path.stat().st_size))
        kept.append({"shard": stem, "keys": keys[1:]})
    write_shards(run.shards, planned)
    (folder / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    where = {"input_tars": [shard.url for shard in planned], "output_metadata_dir": str(out)}
    config = {**KEYS, **where, "run_dir": str(run.root), "feature_dtype": kind}
    run.config.write_text(yaml.safe_dump(config))
    (folder / "c.yml").write_text(yaml.safe_dump(config))


def _columns(number: int, rows: int) -> pa.Table:
    bits = random.Random(number)
    texts = captions(rows)
    return pa.table(
        {
            "key": [f"{i:09d}" for i in range(rows)],
            "oai-clip-vit-l14-score": pa.array([bits.random() for _ in texts], pa.float32()),
            "face-boxes": pa.array([[]] * rows, pa.list_(pa.list_(pa.float32()))),
            "uid": [f"{bits.getrandbits(128):032x}" for _ in texts],
            "url": [f"https://site.example/{bits.getrandbits(60):x}.jpg" for _ in texts],
            "caption": texts,
            "original_width": [450] * rows,
            "original_height": [350] * rows,
        }
    )


def _write_tar(path: Path, keys: Sequence[str], bits: random.Random) -> None:
    with tarfile.open(path, "w") as tar:
        for key in keys:
            for name, data in ((f"{key}.jpg", bits.randbytes(PICTURE)), (f"{key}.txt", b"words")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))


def size(paths: Sequence[Path]) -> int:
    files = (f for path in paths for f in ([path] if path.is_file() else path.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())


def turn(export: Export, name: str, run: Path, place: Path) -> tuple[Row, Row, int]:
    """One export of a run and one copy, and the bytes of the copy."""
    made, copied = place / "made.parquet", place / "copied"
    words = [str(BIN / "d2m"), "export", export.words[0], "c.yml", *export.words[1:], str(made)]
    by_us = measure(name, 0, words, run)
    source = [*(run / "out").glob(export.reads)] if export.reads else [made]
    if export.reads:
        copied.mkdir()
    copy = ["/bin/bash", "-c", COPY, "copy"]
    if export.program:
        copy = [sys.executable, "-c", export.program]
    copy += [*map(str, source), str(copied)]
    by_copy = measure("copy", 0, copy, run)
    found = size(source)
    for path in (made, copied):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return by_us, by_copy, found


def table(names: Sequence[str], folder: Path, shards: int, rows: int, times: int) -> Iterator[str]:
    """Lines of a table."""
    yield (
        "| export | MB | s, ours | s, copy | CPU s, ours | CPU s, copy | CPU s, start "
        "| MB a CPU s, ours | MB a CPU s, copy | share of the copy's rate: CPU | wall | load |"
    )
    yield f"|{' --- |' * 12}"
    for name in names:
        export = EXPORTS[name]
        runs = {n: folder / f"{export.kind}-{n}" for n in (1, shards)}
        for number, run in runs.items():
            if not run.exists():
                run.mkdir()
                make_run(run, number, rows, export.kind)
        seen, starts = [], []
        for _ in range(times):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                starts.append(turn(export, name, runs[1], Path(place)))
                seen.append(turn(export, name, runs[shards], Path(place)))
        megabytes = seen[0][2] / 1e6
        # of what a run of one shard takes, one shard's part of the whole belongs to the work
        more = (seen[0][2] - starts[0][2]) / 1e6
        pairs = [(a[side], b[side]) for side in (0, 1) for a, b in zip(starts, seen, strict=True)]
        cpu = [b.cpu_seconds - a.cpu_seconds for a, b in pairs]
        wall = [b.seconds - a.seconds for a, b in pairs]
        ours, copy = median(cpu[:times]), median(cpu[times:])
        start = median(a.cpu_seconds for a, _ in pairs[:times]) - ours * (megabytes - more) / more
        told = [
            ", ".join(f"{getattr(s[side], field):.2f}" for s in seen)
            for field in ("seconds", "cpu_seconds")
            for side in (0, 1)
        ]
        shares = [median(s[times:]) / median(s[:times]) for s in (cpu, wall)]
        yield (
            f"| `{name}` | {megabytes:.0f} | {' | '.join(told)} | {start:.2f} "
            f"| {more / ours:.0f} | {more / copy:.0f} | {shares[0]:.2f} | {shares[1]:.2f} "
            f"| {os.getloadavg()[0]:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("exports", nargs="*", metavar="EXPORT", help=", ".join(EXPORTS))
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where the runs are made; they are removed")
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    if unknown := {*given.exports} - {*EXPORTS}:
        parser.error(f"found {min(unknown)}; valid: {', '.join(EXPORTS)}")
    with tempfile.TemporaryDirectory(prefix="d2m-exports-", dir=given.folder) as folder:
        of = (given.exports or [*EXPORTS], Path(folder), given.shards, given.rows, given.times)
        for line in table(*of):
            print(line, flush=True)


if __name__ == "__main__":
    main()
