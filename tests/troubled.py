"""A run to which everything happened: for what is told of runs."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from kit import STATS, jpeg, sample, write_config, write_tar

from d2m_hpc import config as configs
from d2m_hpc.launch.flow import commit, submitting
from d2m_hpc.plan.decide import decide
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.tasks import Progress
from d2m_hpc.worker.progress import Listener
from d2m_hpc.worker.task import run_task

CAPTIONS = (
    "<script>document.title = 'caught'</script>",
    "<img src=x onerror=\"document.title='caught'\"> \" ' & </p></style>",
    "كلب يجري في الحديقة \u202e drawkcab \u202c",
    "\U0001f415\u200d\U0001f9ba a guide dog \U0001f1e9\U0001f1ea",
    "no-spaces-" * 40,
    "",
)
"""What strangers write under their pictures."""
COLUMNS = [
    *("image-brightness", "image-contrast", "image-phash"),
    *("text-words", "text-uppercase-ratio"),
]


def tars(folder: Path, samples: int = 12) -> None:
    """Eight: five good, one with two rejected samples, one cut, one of no pictures."""
    for i in range(5):
        members: dict[str, bytes] = {}
        for j in range(samples):
            members |= _captioned(f"{i:05d}{j:04d}", i * 1000 + j)
        write_tar(folder / f"{i:05d}.tar", members)
    most = {n: d for j in range(28) for n, d in _captioned(f"m{j}", j).items()}
    odd = {"x\udcff.jpg": jpeg(), "y.jpg": b"no picture", "y.txt": b"y", "y.json": b"{}"}
    write_tar(folder / "odd.tar", {**most, **odd}, format=tarfile.GNU_FORMAT)
    (folder / "cut.tar").write_bytes((folder / "00000.tar").read_bytes()[:9000])
    none = {"a.jpg": b"<b>no picture</b>", "a.txt": b"a", "a.json": b"{}"}
    write_tar(folder / "bad.tar", none)


def _captioned(key: str, seed: int) -> Mapping[str, bytes]:
    members = sample(key, seed)
    caption = CAPTIONS[seed % 7] if seed % 7 < len(CAPTIONS) else f"A photograph of {seed} things"
    fields = {**json.loads(members[f"{key}.json"]), "caption": caption}
    return {**members, f"{key}.json": json.dumps(fields).encode(), f"{key}.txt": caption.encode()}


class Killed(BaseException):
    """What a signal raises in a task."""


def _killer(progress: Progress) -> None:
    """Ends a task in the midst of its first shard."""
    if progress.rows and progress.state == "running":
        raise Killed


def run(folder: Path, **values: Any) -> RunDir:
    """Three tasks of one submission over `tars(folder / "tars")`.

    000-0 is stopped before its first shard, and then finishes; 000-1 is killed, goes on, and one of
    its shards fails; 000-2 likewise finishes with a failed shard. Two planned shards are left.
    """
    common = {
        "input_tars": str(folder / "tars" / "*.tar"),
        "output_metadata_dir": str(folder / "out"),
        "postprocess_columns": COLUMNS,
        "steal": False,
    }
    path = write_config(folder / "c.yml", {**STATS, **common, **values})
    workload = inspect(configs.load(path), str(path))
    with submitting(workload):
        pending = decide(workload).pending
        commit(decide(workload), [list(pending[i::3]) for i in range(3)])
    for index, attempt in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0)):
        _attempt(workload.run, index, attempt, _killer if index < 2 and not attempt else None)
    return workload.run


def _attempt(run: RunDir, index: int, attempt: int, listener: Listener | None) -> None:
    with mock.patch.dict("os.environ", {"SLURM_RESTART_COUNT": str(attempt)}):
        try:
            run_task(run.root, "000", index, listener=listener)
        except Killed:
            if index == 1:  # a process that is killed says nothing any more
                _say_running(run.progress_of(f"000-{index}-{attempt}"))


def _say_running(path: Path) -> None:
    told = json.loads(path.read_bytes())
    path.write_text(json.dumps({**told, "state": "running"}))
