"""Finished runs made on the spot: parquets and records, without models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from d2m_hpc import config as configs
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import Record, Recorder, Rejection, Shard
from d2m_hpc.run.shards import write_shards

CLIP = "clip_l14_similarity_score"
CONFIG: dict[str, Any] = {
    "models": ["oai-clip-vit-b32", "oai-clip-vit-l14", "faces-scrfd10g"],
    "postprocess_columns": ["oai-clip-vit-b32-score", "oai-clip-vit-l14-score", "face-boxes"],
    "postprocess_features": ["oai-clip-vit-l14-image"],
    "additional_fields": ["uid", "original_width", "original_height"],
    "use_datacomp_keys": True,
}


def uid(number: int) -> str:
    """The hash of a sample: its halves do not rise together."""
    low = number * 0x9E3779B97F4A7C15 % 2**64
    return f"{low * 0xD1B54A32D192ED03 % 2**64:016x}{low:016x}"


def table(uids: Sequence[str | None], scores: Sequence[float | None], **more: Any) -> pa.Table:
    """A shard's parquet."""
    wide = {"original_width": [300] * len(uids), **more}
    return pa.table(
        {
            "key": [f"{i:09d}" for i in range(len(uids))],
            CLIP: pa.array(scores, pa.float32()),
            "uid": pa.array(uids, pa.string()),
            **wide,
        }
    )


def finish(
    run: RunDir, url: str, stem: str, rows: pa.Table, at: float = 1.0, of: str = "now"
) -> None:
    """Publish a shard and record it, with one rejection, as of the fingerprint `now`."""
    with fsspec.open(f"{url}/{stem}.parquet", "wb") as file:
        pq.write_table(rows, file)
    fs, npz = fsspec.url_to_fs(f"{url}/{stem}.npz")
    if not fs.exists(npz):
        with fs.open(npz, "wb") as file:
            np.savez(file)
    record = Record(stem, "done", rows=rows.num_rows, started=at - 1, finished=at, task="000-0-0")
    record.fingerprint = of
    record.rejections = [Rejection("bad", "the image file is empty")]
    Recorder(run.record("000", 0, 0)).append(record)


def make_run(
    folder: Path, shards: Mapping[str, pa.Table | None], url: str = "", **config: Any
) -> tuple[RunDir, configs.Config]:
    """A run whose shards are finished, but for those that are None.

    Args:
        url: where the outputs are, if not in `folder/out`.
    """
    run = RunDir(folder / "run")
    run.create()
    intent = run.new_submission().intent
    intent.write_text(json.dumps({"fingerprint": "now"}))
    (folder / "out").mkdir()
    output = url or str(folder / "out")
    for number, (stem, rows) in enumerate(shards.items()):
        if rows is not None:
            finish(run, output, stem, rows, at=number + 1.0)
    tars = [str(folder / "tars" / f"{stem}.tar") for stem in shards]
    write_shards(run.shards, [Shard(s, t, 1) for s, t in zip(shards, tars, strict=True)])
    where = {"input_tars": tars, "output_metadata_dir": output, "run_dir": str(run.root)}
    run.config.write_text(yaml.safe_dump({**CONFIG, **where, **config}))
    return run, configs.load(run.config)


def subset(uids: Sequence[str]) -> NDArray[Any]:
    """As DataComp's README makes one."""
    pairs = [(int(u[:16], 16), int(u[16:32], 16)) for u in uids]
    made = np.array(pairs, np.dtype("u8,u8"))
    made.sort()
    return made
