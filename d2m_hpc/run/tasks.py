"""What array tasks say of themselves, by their progress files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.merge import listed

ACTIVE_SECONDS = 60.0
"""A task that said nothing for so long does not count as running."""
TASK = re.compile(r"\d+-\d+-\d+")
"""`submission-index-attempt`."""
FAR = 1e11
"""Seconds since the epoch that no clock shows."""


def attempts(run: RunDir) -> list[dict[str, Any]]:
    """What every attempt of every task last said of itself; what is no progress is left out."""
    last: dict[str, dict[str, Any]] = {}
    for told in _all_told(run):
        if not _is_progress(told):
            continue
        known = last.setdefault(told["task"], told)
        if told["updated"] > known["updated"]:
            last[told["task"]] = told
    return list(last.values())


def _all_told(run: RunDir) -> Iterator[Any]:
    for path in listed(run.progress):
        with suppress(FileNotFoundError, IsADirectoryError):
            for line in path.read_bytes().split(b"\n"):
                with suppress(ValueError, RecursionError):  # it is being written, or damaged
                    yield json.loads(line)


def _is_progress(told: Any) -> bool:
    """Whether these are the values of a task's progress, as a whole file has them."""
    if not isinstance(told, dict) or not all(
        isinstance(told.get(name), str) for name in ("task", "host", "shard", "state")
    ):
        return False
    counts = (told.get(name) for name in ("rows", "done", "failed", "shards"))
    if not all(isinstance(n, int) and n >= 0 for n in counts):
        return False
    times = (told.get(name) for name in ("started", "updated"))
    if not all(isinstance(t, int | float) and 0 <= t < FAR for t in times):
        return False
    return bool(TASK.fullmatch(told["task"]))


def is_active(task: dict[str, Any]) -> bool:
    recent: bool = time.time() - task["updated"] < ACTIVE_SECONDS
    return recent and task["state"] == "running"


def has_gpu(task: dict[str, Any]) -> bool:
    return str(task.get("device")).startswith("cuda")


def log_file(run: RunDir, task: str) -> Path | None:
    """Where a task logs; None where that is not the name of one."""
    if not TASK.fullmatch(task):
        return None
    submission, index, _ = task.split("-")
    return run.log_of(submission, int(index))
