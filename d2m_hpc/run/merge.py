"""Many small files to few: a cluster's filesystem takes about a millisecond to open each.

Tasks leave a file of records and one of progress each, tens of thousands in a large run, and every
submit and status reads them all. A submit, which holds the run's lock, merges those of tasks that
have been silent for long, as a log-structured merge does: into a new file each time, which is never
written again.

No line can be lost. A file is set aside by a rename before it is read, so that what its task still
writes goes to a new file; a task that had it open at that moment finds it moved after its write,
and writes again (`Recorder`). The merged file is on disk before the first one set aside is removed.
Killed in between, a submit leaves files that readers take for what they are, and lines that are
there twice, which count once.
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
"""Fewer files are not worth it."""
BATCH = 4096
"""Files that become one; a submit that is killed has at most so many to merge again."""
MERGED = "merged-"
SUFFIXES = (".json", ".jsonl")


def _names(folder: Path) -> list[str]:
    return [n for n in os.listdir(folder) if n.endswith(SUFFIXES) and not n.startswith(".")]


def listed(folder: Path) -> Iterator[Path]:
    """The files of a folder, each once, for a reader who skips those that are gone.

    What is in a file that was merged meanwhile is in one that the next listing shows, and there is
    no end before a listing shows nothing new. No listing is a snapshot: in the midst of renames it
    may miss one. Whoever decides on records does so under the lock.
    """
    seen: set[str] = set()
    while folder.is_dir() and (new := sorted(set(_names(folder)) - seen)):
        seen.update(new)
        yield from (folder / name for name in new)


def merge_silent(run: RunDir, seconds: float) -> int:
    """Merge the files of tasks that have written nothing for so long; the submit lock is held.

    Returns:
        how many files were merged.
    """
    folders = [run.records, run.progress]
    if max(len(_unmerged(folder)) for folder in folders) < MANY:
        return 0
    silent = _silent_tasks(folders, time.time() - seconds)
    return sum(_merge(folder, silent) for folder in folders)


def _unmerged(folder: Path) -> list[str]:
    return [name for name in _names(folder) if not name.startswith(MERGED)]


def _task(name: str) -> str:
    """Whose file it is."""
    return name.partition(".")[0]


def _silent_tasks(folders: Iterable[Path], since: float) -> set[str]:
    """Tasks that have written neither records nor progress since then, in epoch seconds.

    A task that works tells its progress every few seconds, whatever the length of its shards.
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
    """Under a new name, which no task writes to and all readers read."""
    aside = path.with_name(f"{_task(path.name)}.{secrets.token_hex(8)}{path.suffix}")
    with suppress(FileNotFoundError):
        path.rename(aside)
    return aside


def _lines(paths: Iterable[Path]) -> Iterator[bytes]:
    """What is in these files; the last line of each ends, though a kill may have torn it."""
    for path in paths:
        with suppress(FileNotFoundError):
            data = path.read_bytes()
            yield data if data.endswith(b"\n") else data + b"\n"
