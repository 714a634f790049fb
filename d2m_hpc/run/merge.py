"""Merge many small files: a cluster's filesystem takes about a millisecond to open each.

Each task leaves a file of records and a file of progress, tens of thousands in a large run, and
every submit and status reads all of them. A submit, which holds the run's lock, merges the files of
tasks that have been silent for long, as a log-structured merge does: each time into a new file,
which is never written again.

No line is lost. A file is renamed before the merge reads it, so a later line of its task goes to a
new file; a task that had the file open at that moment notices the rename after its write, and
writes again (`Recorder`). The merged file is on disk before the first renamed file is removed. A
submit that is killed in between leaves lines twice; readers count such lines once.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage.files import atomic_write

MANY = 256
"""Fewer files are not worth a merge."""
BATCH = 4096
"""The most files that become one; a submit that is killed has to merge so many again."""
MERGED = "merged-"
SUFFIXES = (".json", ".jsonl")


def _names(folder: Path) -> list[str]:
    return [n for n in os.listdir(folder) if n.endswith(SUFFIXES) and not n.startswith(".")]


def listed(folder: Path) -> Iterator[str]:
    """List the paths of a folder's files, each once; readers skip files that are gone by then.

    A file that was merged meanwhile is part of a file in the next listing, so the folder is listed
    until nothing new shows. A listing in the midst of renames may still miss a file: decisions by
    records are made under the lock.
    """
    seen: set[str] = set()
    while folder.is_dir() and (new := sorted(set(_names(folder)) - seen)):
        seen.update(new)
        yield from (f"{folder}/{name}" for name in new)  # a Path each takes as long as a read


def merge_silent(run: RunDir, seconds: float) -> int:
    """Merge the files of tasks that have been silent for `seconds`; the caller holds the lock.

    Returns:
        The number of files merged.
    """
    folders = [run.records, run.progress]
    if max(len(_unmerged(folder)) for folder in folders) < MANY:
        return 0
    silent = _silent_tasks(folders, time.time() - seconds)
    return sum(_merge(folder, silent) for folder in folders)


def _unmerged(folder: Path) -> list[str]:
    return [name for name in _names(folder) if not name.startswith(MERGED)]


def _task(name: str) -> str:
    """The task that wrote a file."""
    return name.partition(".")[0]


def _silent_tasks(folders: Iterable[Path], since: float) -> set[str]:
    """The tasks that have written neither records nor progress since a time, in epoch seconds.

    A working task writes its progress every few seconds, whatever the length of its shards.
    """
    written: dict[str, float] = {}
    for path in (folder / name for folder in folders for name in _unmerged(folder)):
        with suppress(FileNotFoundError):
            task = _task(path.name)
            written[task] = max(written.get(task, 0.0), path.stat().st_mtime)
    return {task for task, last in written.items() if last < since}


def _merge(folder: Path, silent: set[str]) -> int:
    names = sorted(name for name in _unmerged(folder) if _task(name) in silent)
    if len(names) < MANY:
        return 0
    for start in range(0, len(names), BATCH):
        _merge_batch(folder, names[start : start + BATCH])
    return len(names)


def _merge_batch(folder: Path, names: Sequence[str]) -> None:
    aside = [_set_aside(folder / name) for name in names]
    atomic_write(folder / f"{MERGED}{secrets.token_hex(8)}.jsonl", _lines(aside))
    for path in aside:
        path.unlink(missing_ok=True)


def _set_aside(path: Path) -> Path:
    """Rename a file to a name that no task writes to and all readers read."""
    aside = path.with_name(f"{_task(path.name)}.{secrets.token_hex(8)}{path.suffix}")
    with suppress(FileNotFoundError):
        path.rename(aside)
    return aside


def _lines(paths: Iterable[Path]) -> Iterator[bytes]:
    """Read files; each ends with a line end, though a kill may have torn its last line."""
    for path in paths:
        with suppress(FileNotFoundError):
            data = path.read_bytes()
            yield data if data.endswith(b"\n") else data + b"\n"
