"""What the run folder says of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from d2m_hpc.config import Config, load
from d2m_hpc.errors import ConfigError
from d2m_hpc.launch import plan, submit
from d2m_hpc.state.lease import LEASE_SECONDS
from d2m_hpc.state.manifest import Manifest, Record
from d2m_hpc.state.rundir import RunDir


@dataclass
class Failure:
    """Shards that failed for the same kind of reason, with the message of the newest."""

    kind: str
    error: str
    shards: list[str]


@dataclass
class Summary:
    """A run in figures.

    `eta_seconds` is None where nothing runs or nothing is known of its speed.
    """

    run_dir: str
    output: str
    shards: int
    done: int
    failed: int
    pending: int
    running: int
    rows: int
    rejected: int
    recomputed: int
    samples_per_second: float
    eta_seconds: float | None
    failures: list[Failure] = field(default_factory=list)
    rejections: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.done == self.shards

    @property
    def state(self) -> str:
        """In a word: complete, running, failed (nothing else is left) or pending."""
        if self.complete:
            return "complete"
        if self.running:
            return "running"
        return "pending" if self.pending else "failed"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_run(path: Path) -> tuple[RunDir, Config]:
    """The run of a config file, or of a run folder.

    Raises:
        ConfigError: there is none.
    """
    run = RunDir(path.absolute()) if path.is_dir() else submit.run_dir(load(path))
    if not run.config.exists():
        raise ConfigError(
            str(path), [f"there is no run in {run.root}; start one with `d2m-submit CONFIG`"]
        )
    return run, load(run.config)


def summarise(run: RunDir, config: Config) -> Summary:
    """Read records, leases and progress files; asks nobody else."""
    manifest = Manifest.load(run)
    stems = [s.stem for s in plan.read_shards(run.shards)]
    done = [manifest.done[s] for s in stems if s in manifest.done]
    failed = {s: r for s in stems if (r := manifest.failures.get(s)) and s not in manifest.done}
    running = _held(run) - manifest.done.keys()
    pending = len(stems) - len(done) - len(failed) - len(running - failed.keys())
    rows = sum(r.rows for r in done)
    speed = _speed(run)
    left = len(stems) - len(done) - len(failed)
    mean = rows / len(done) if done else 0
    return Summary(
        run_dir=str(run.root),
        output=config.output_metadata_dir,
        shards=len(stems),
        done=len(done),
        failed=len(failed.keys() - running),
        pending=pending,
        running=len(running),
        rows=rows,
        rejected=sum(len(r.rejections) for r in done),
        recomputed=sum(r.recomputed for r in done),
        samples_per_second=round(speed or _past_speed(done), 2),
        eta_seconds=round(left * mean / speed, 1) if speed and mean else None,
        failures=_grouped(failed),
        rejections=_by_reason(done),
    )


def _held(run: RunDir) -> set[str]:
    """Shards whose lease has had a heartbeat lately."""
    oldest = time.time() - LEASE_SECONDS
    paths = run.leases.glob("*.lock") if run.leases.is_dir() else ()
    return {p.stem for p in paths if _mtime(p) > oldest}


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _speed(run: RunDir) -> float:
    """Samples a second of all tasks that run now."""
    total = 0.0
    for path in run.progress.glob("*.json") if run.progress.is_dir() else ():
        try:
            task = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        seconds = task["updated"] - task["started"]
        if task["state"] == "running" and time.time() - task["updated"] < 60 and seconds > 0:
            total += task["rows"] / seconds
    return total


def _past_speed(done: list[Record]) -> float:
    """Over all tasks, from the first start to the last end."""
    if not done:
        return 0.0
    seconds = max(r.finished for r in done) - min(r.started for r in done)
    return sum(r.rows for r in done) / seconds if seconds > 0 else 0.0


def _grouped(failed: dict[str, list[Record]]) -> list[Failure]:
    groups: dict[tuple[str, str], Failure] = {}
    for stem, records in failed.items():
        last = records[-1]
        # Messages of one kind differ in the shard's own path; without it they are the same.
        key = (last.kind, last.error.rpartition(".tar")[2][:80] or last.error)
        group = groups.setdefault(key, Failure(last.kind, last.error, []))
        group.shards.append(stem)
    return sorted(groups.values(), key=lambda g: -len(g.shards))


def _by_reason(done: Iterable[Record]) -> dict[str, int]:
    """Rejections counted by the start of their reason."""
    counts: dict[str, int] = {}
    for record in done:
        for _, reason in record.rejections:
            short = reason.split(":")[0].split(";")[0]
            counts[short] = counts.get(short, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
