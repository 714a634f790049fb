"""CPU seconds of the loader for one set of samples in each form of shards, against the tar's.

    python -m benchmarks.inputs [--samples N] [--times N]

The forms: img2dataset's `files` and `parquet`, a parquet that `datasets` wrote, and a folder of
pictures with a file of captions. All are made of one tar, and loaded in turns, by one decode
thread. A form's share is the tar's CPU seconds a sample over its own.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from benchmarks import data, workload
from d2m_hpc.config import Config
from d2m_hpc.config.load import load
from d2m_hpc.plan.patterns import plan_shards
from d2m_hpc.plan.workload import expanded, run_dir
from d2m_hpc.run.records import Job
from d2m_hpc.worker.compute.resolve import Toolbox
from d2m_hpc.worker.read.loader import Loader
from d2m_hpc.worker.read.prepare import Recipe
from d2m_hpc.worker.read.scratch import Scratch
from d2m_hpc.worker.work import Work

Row = dict[str, Any]


def rows(tar: Path) -> Iterator[tuple[str, bytes, Row]]:
    """The key, the JPEG and the fields of each sample."""
    with tarfile.open(tar) as file:
        read = {m.name: file.extractfile(m).read() for m in file}  # type: ignore[union-attr]
    for name in (name for name in read if name.endswith(".jpg")):
        key = name.removesuffix(".jpg")
        yield key, read[name], json.loads(read[f"{key}.json"])


def _files(tar: Path, folder: Path) -> Row:
    for key, jpeg, fields in rows(tar):
        (folder / f"{key}.jpg").write_bytes(jpeg)
        (folder / f"{key}.txt").write_text(fields["caption"])
        (folder / f"{key}.json").write_text(json.dumps(fields))
    return {"inputs": str(folder)}


def _captions(tar: Path, folder: Path) -> Row:
    lines = []
    for key, jpeg, fields in rows(tar):
        (folder / f"{key}.jpg").write_bytes(jpeg)
        lines.append(json.dumps(fields | {"file_name": f"{key}.jpg"}) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines))
    return {"inputs": str(folder), "captions": str(folder / "captions.jsonl")}


def _img2dataset(tar: Path, folder: Path) -> Row:
    path = folder / "00000.parquet"
    found = [fields | {"key": key, "jpg": jpeg} for key, jpeg, fields in rows(tar)]
    pq.write_table(pa.Table.from_pylist(found), path)
    return {"inputs": str(path)}


def _datasets(tar: Path, folder: Path) -> Row:
    path = folder / "data.parquet"
    found = [f | {"key": k, "image": {"bytes": j, "path": f"{k}.jpg"}} for k, j, f in rows(tar)]
    made = datasets.Dataset.from_list(found).cast_column("image", datasets.Image())
    made.to_parquet(path)
    return {"inputs": str(path)}


FORMS: dict[str, Callable[[Path, Path], Row]] = {
    "tar": lambda tar, folder: {"input_tars": str(tar)},
    "img2dataset's files": _files,
    "img2dataset's parquet": _img2dataset,
    "a parquet of `datasets`": _datasets,
    "pictures and captions.jsonl": _captions,
}


def config_of(form: str, tar: Path, folder: Path, models: Sequence[str]) -> Config:
    place = folder / f"{form}-{len(models)}".replace("/", " ")
    place.mkdir()
    (shards := place / "in").mkdir()
    keys = workload.keys([tar], 1, models, output_metadata_dir=str(place / "out"))
    del keys["input_tars"]
    path = place / "c.yml"
    path.write_text(yaml.safe_dump(keys | FORMS[form](tar, shards)))
    return load(path)


def seconds(config: Config, samples: int) -> float:
    """CPU seconds of this process a sample.

    Raises:
        RuntimeError: the loader did not give all of them.
    """
    planned = plan_shards(expanded(config, run_dir(config), sized=True).sizes)
    recipe = Recipe.of(config, Toolbox.of(config).inputs)
    with tempfile.TemporaryDirectory() as folder:
        began, found = time.process_time(), 0
        works = (Work(Job(shard)) for shard in planned)
        with Loader(works, recipe, Scratch(Path(folder), 1 << 30)) as loader:
            for reading in loader:
                found += sum(len(batch.keys) for batch in reading)
        spent = time.process_time() - began
    if found != samples:
        raise RuntimeError(f"{found} of {samples} samples came out")
    return spent / samples


def table(samples: int, times: int) -> Iterator[str]:
    """Lines of a table."""
    yield "| models | form | ms of CPU a sample | share of the tar's rate |"
    yield f"|{' --- |' * 4}"
    for name, models in (("CLIP's", workload.CLIP), ("six", workload.MODELS)):
        with tempfile.TemporaryDirectory(prefix="d2m-bench-") as folder:
            [tar] = data.tars(Path(folder), 1, samples)
            configs = {form: config_of(form, tar, Path(folder), models) for form in FORMS}
            seen = defaultdict[str, list[float]](list)
            for turn in range(times + 1):  # the first one warms up
                for form, config in configs.items():
                    spent = seconds(config, samples)
                    if turn:
                        seen[form].append(spent)
        for form, spent in seen.items():
            told = ", ".join(f"{1000 * one:.2f}" for one in spent)
            share = median(t / own for t, own in zip(seen["tar"], spent, strict=True))
            yield f"| {name} | {form} | {told} | {share:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=data.CROPS, help="of different pictures")
    parser.add_argument("--times", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for line in table(given.samples, given.times):
        print(line, flush=True)


if __name__ == "__main__":
    main()
