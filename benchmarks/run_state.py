"""The state of a large run on disk, as its submits and tasks leave it, for `control.py`.

    python benchmarks/run_state.py FOLDER SHARDS     inputs and configs
    python benchmarks/run_state.py FOLDER            what half of the tasks leave

In a process of its own: the kernel counts the memory of whoever starts a command as the command's.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from d2m_hpc.run.chunks import Chunks
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import Job, Record, Rejection, encode

TARS = [f"crawl-{i}/part-{j}" for i in range(2) for j in range(5)]
ROWS = 20
SHARD_SECONDS = 60.0
AGE = 7 * 86400
"""Seconds since the state's tasks ended."""
MAX_LINKS = 50_000
"""To one file; filesystems allow 65,000."""
CONFIG = {
    "models": ["image-stats"],
    "postprocess_columns": ["image-brightness"],
    "postprocess_features": ["image-histogram"],
}


def make_inputs(folder: Path, shards: int) -> None:
    """Sparse tars in ten folders, whose names collide, and two configs.

    `c.yml` finds them by a glob; `urls.yml` names as many URLs by braces. Their outputs go to the
    folders `c` and `urls`.
    """
    sizes = random.Random(0)
    for name in TARS:
        (folder / "tars" / name).mkdir(parents=True)
    for i in range(shards):
        name = f"{TARS[i % len(TARS)]}/{i // len(TARS):08d}.tar"
        with open(folder / "tars" / name, "wb") as file:
            file.truncate(sizes.randrange(200_000_000, 300_000_000))
    urls = f"https://tars.example/{{{0:08d}..{shards - 1:08d}}}.tar"
    for config, tars in (("c", str(folder / "tars" / "**" / "*.tar")), ("urls", urls)):
        values = {**CONFIG, "input_tars": tars, "output_metadata_dir": str(folder / config)}
        (folder / f"{config}.yml").write_text(yaml.safe_dump(values))


def end_half(run: RunDir, out: Path) -> None:
    """Leave what the first half of the tasks of submission 000 would have left."""
    submission = run.submission("000")
    fingerprint = json.loads(submission.intent.read_bytes())["fingerprint"]
    ended, pairs = time.time() - AGE, Pairs(out)
    chunks = Chunks(submission)
    for index, chunk in enumerate(chunks.read(range(len(chunks) // 2))):
        task = f"000-{index}-0"
        for job in chunk:
            pairs.link(job.stem)
        lines = b"".join(
            encode(record)
            for record in _records(chunk, task, index, ended, fingerprint, pairs.sha256)
        )
        _leave(run.records / f"{task}.jsonl", lines, ended)
        _leave(run.progress_of(task), _progress(chunk, task, ended), ended)


def _records(
    chunk: Sequence[Job],
    task: str,
    index: int,
    ended: float,
    fingerprint: str,
    sha256: dict[str, str],
) -> list[Record]:
    """Every third shard has two samples without a row."""
    rejections = [
        Rejection(f"{index:09d}", "jpg cannot be decoded: broken data stream"),
        Rejection(f"{index + 1:09d}", "no text (txt)"),
    ]
    return [
        Record(
            job.stem,
            "done",
            ROWS,
            [] if (index + number) % 3 else rejections,
            fingerprint=fingerprint,
            started=ended - SHARD_SECONDS * (len(chunk) - number),
            finished=ended - SHARD_SECONDS * (len(chunk) - number - 1),
            task=task,
            host=f"node{index % 64:03d}",
            **sha256,
        )
        for number, job in enumerate(chunk)
    ]


def _progress(chunk: Sequence[Job], task: str, ended: float) -> bytes:
    told = {
        "task": task,
        "host": "node000",
        "device": "cuda:0",
        "shards": len(chunk),
        "done": len(chunk),
        "failed": 0,
        "rows": ROWS * len(chunk),
        "rejected": 0,
        "shard": chunk[-1].stem,
        "started": ended - SHARD_SECONDS * len(chunk),
        "updated": ended,
        "state": "finished",
    }
    return json.dumps(told).encode()


def _leave(path: Path, data: bytes, when: float) -> None:
    path.write_bytes(data)
    os.utime(path, (when, when))


class Pairs:
    """Outputs of any number of shards, as hard links to a few real pairs.

    Attributes:
        sha256: of both files, by their names in a record.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._links, self._source = out, 0, ""
        values = np.linspace(0, 1, ROWS, dtype=np.float32)
        table, archive = io.BytesIO(), io.BytesIO()
        keys = [f"{i:09d}" for i in range(ROWS)]
        pq.write_table(pa.table({"key": keys, "image-brightness": values}), table)
        np.savez(archive, **{"image-histogram": np.outer(values, values)})
        self._data = {"parquet": table.getvalue(), "npz": archive.getvalue()}
        self.sha256 = {
            f"{suffix}_sha256": hashlib.sha256(data).hexdigest()
            for suffix, data in self._data.items()
        }

    def link(self, stem: str) -> None:
        """Make a shard's pair."""
        if self._links % MAX_LINKS == 0:
            self._source = stem
        self._links += 1
        for suffix, data in self._data.items():
            path = self._out / f"{stem}.{suffix}"
            if stem == self._source:
                path.write_bytes(data)
            else:
                path.hardlink_to(self._out / f"{self._source}.{suffix}")


if __name__ == "__main__":
    folder, *shards = sys.argv[1:]
    if shards:
        make_inputs(Path(folder), int(shards[0]))
    else:
        end_half(RunDir(Path(folder) / "c" / ".d2m"), Path(folder) / "c")
    os.sync()  # else the first fsync of what is measured would have to wait for all this
