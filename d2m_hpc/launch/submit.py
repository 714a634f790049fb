"""Decide what is left to do, then do it: in this process, or as array tasks."""

from __future__ import annotations

import getpass
import hashlib
import json
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from d2m_hpc import __version__
from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.launch import plan
from d2m_hpc.models import weights
from d2m_hpc.outputs import OutputDir
from d2m_hpc.state.lease import Lease
from d2m_hpc.state.manifest import Manifest, Record, Recorder, Shard
from d2m_hpc.state.rundir import RunDir, Submission, atomic_write

if TYPE_CHECKING:
    from d2m_hpc.worker.task import Listener, Progress


def run_dir(config: Config) -> RunDir:
    """Where a config's run lives: `run_dir`, or beside the outputs, or here if those are remote."""
    if config.run_dir:
        return RunDir(Path(config.run_dir).expanduser().absolute())
    output = config.output_metadata_dir
    if "://" not in output:
        return RunDir(Path(output).expanduser().absolute() / ".d2m")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", output.split("://", 1)[1]).strip("-")
    return RunDir(Path(".d2m").absolute() / name)


@dataclass
class Decision:
    """What a submit would do.

    Attributes:
        shards: all of the run, done or not.
        done: stems of finished shards.
        exhausted: stems that failed `max_attempts` times.
        lost: records that are missing and were read back from finished parquets.
        fingerprint: the parts that decide what the output is; `fingerprint_id` is their hash.
        notices: what the user should know though it stops nothing.
    """

    config: Config
    run: RunDir
    shards: list[Shard]
    done: set[str]
    exhausted: set[str]
    lost: list[Record]
    fingerprint: dict[str, Any]
    notices: list[str] = field(default_factory=list)

    @property
    def pending(self) -> list[Shard]:
        settled = self.done | self.exhausted
        return [s for s in self.shards if s.stem not in settled]

    @property
    def fingerprint_id(self) -> str:
        return hashlib.sha256(_canonical(self.fingerprint).encode()).hexdigest()[:16]


def _canonical(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, indent=1, ensure_ascii=False)


def decide(config: Config, where: str) -> Decision:
    """Look at inputs, records and outputs; changes nothing on disk.

    Args:
        where: the config file, for messages.

    Raises:
        ConfigError: inputs that are not there, outputs of another config or another program.
        WeightsError: checkpoints that are missing or wrong.
    """
    config = _absolute(config)
    run = run_dir(config)
    expansion = plan.expand(config.input_tars)
    plan.check(expansion, where)
    fingerprint = config.fingerprint(_checkpoint_hashes(config, run, where))
    shards = plan.plan_shards(expansion.sizes, plan.read_shards(run.shards))
    decision = Decision(config, run, shards, set(), set(), [], fingerprint)
    decision.notices = _notices(expansion, shards)
    _compare_fingerprint(decision, where)
    _read_state(decision, where)
    return decision


def _absolute(config: Config) -> Config:
    """Paths as a task on another machine needs them."""
    paths = {
        key: str(Path(value).expanduser().absolute())
        for key in ("output_metadata_dir", "custom_pypath", "weights_dir", "run_dir")
        if (value := getattr(config, key)) and "://" not in value
    }
    folder = str(weights.weights_dir(config.weights_dir).absolute())
    return config.model_copy(update={"weights_dir": folder, **paths})


def _checkpoint_hashes(config: Config, run: RunDir, where: str) -> dict[str, str]:
    folder = weights.weights_dir(config.weights_dir)
    checked = weights.check(config.models, folder, weights.HashCache(run.hashes))
    return weights.require(checked, config.allow_unpublished_weights, where)


def _notices(expansion: plan.Expansion, shards: list[Shard]) -> list[str]:
    notices = []
    if expansion.duplicates:
        notices.append(f"{expansion.duplicates} tars are named more than once; each is done once")
    if expansion.missing:
        few = ", ".join(expansion.missing[:3])
        notices.append(f"{len(expansion.missing)} tars are not there and will fail: {few}")
    gone = sum(s.url not in expansion.sizes for s in shards)
    if gone:
        notices.append(f"{gone} shards of earlier submits match no pattern now; they are kept")
    return notices


def _compare_fingerprint(decision: Decision, where: str) -> None:
    """Refuse to mix outputs of two configs.

    Raises:
        ConfigError: naming what differs from the earlier submits.
    """
    path = decision.run.fingerprint
    if not path.exists() or decision.config.reprocess:
        return
    old, new = json.loads(path.read_bytes()), decision.fingerprint
    differing = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if differing:
        mistakes = [f"{k}: was {old.get(k)!r}, is {new.get(k)!r}" for k in differing]
        advice = (
            f"the run in {decision.run.root} was made with other values; restore them, take "
            "another output_metadata_dir, or set `reprocess: true` to compute its shards again"
        )
        raise ConfigError(where, [*mistakes, advice])


def _read_state(decision: Decision, where: str) -> None:
    """Fill in what is done, exhausted and lost, by the records and by what lies in the output."""
    manifest = Manifest.load(decision.run)
    output = OutputDir(decision.config.output_metadata_dir)
    present = output.stems()
    ours = decision.fingerprint_id
    foreign = []
    for shard in decision.shards:
        if shard.stem not in present:
            continue
        record = manifest.done.get(shard.stem)
        if record is None and (record := _rebuild(output, shard.stem)) is not None:
            decision.lost.append(record)
        if record is None:
            foreign.append(shard.stem)
        elif record.fingerprint == ours:
            decision.done.add(shard.stem)
    if foreign and not decision.config.reprocess:
        mistake = (
            f"output_metadata_dir: {output.url} holds {len(foreign)} parquets that this program "
            f"did not write ({', '.join(foreign[:3])}); move them, or set `reprocess: true` to "
            "replace them"
        )
        raise ConfigError(where, [mistake])
    most = decision.config.max_attempts
    decision.exhausted = {
        stem
        for stem, failed in manifest.failures.items()
        if stem not in decision.done and sum(r.fingerprint == ours for r in failed) >= most
    }


def _rebuild(output: OutputDir, stem: str) -> Record | None:
    """A task was killed between the parquet's rename and its record."""
    record = output.record(stem)
    if record is not None:
        record.parquet_sha256, record.rebuilt = output.sha256(f"{stem}.parquet"), True
    return record


def commit(decision: Decision, chunks: Iterable[list[Shard]]) -> Submission:
    """Write a submission to the run folder; nothing has been started yet when it returns."""
    run, config = decision.run, decision.config
    run.create()
    submission = run.new_submission()
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    intent = {
        "fingerprint": decision.fingerprint_id,
        "created": time.time(),
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "version": __version__,
    }
    lines = "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in chunks)
    plan.write_shards(run.shards, decision.shards)
    atomic_write(submission.chunks, lines.encode("utf-8", "surrogatepass"))
    for path in (submission.config, run.config):
        atomic_write(path, text.encode("utf-8", "surrogatepass"))
    atomic_write(run.fingerprint, _canonical(decision.fingerprint).encode())
    atomic_write(submission.intent, json.dumps(intent).encode())
    _repair(decision, submission)
    return submission


def _repair(decision: Decision, submission: Submission) -> None:
    """Put lost records back, and drop the leases that killed tasks left on finished shards."""
    run = decision.run
    recorder = Recorder(run.records / f"{submission.name}-rebuilt.jsonl")
    for record in decision.lost:
        recorder.append(record)
    for path in run.leases.glob("*.lock"):
        if path.stem in decision.done and (lease := Lease(path)).claim():
            lease.release()


def run_local(decision: Decision, listener: Listener | None = None) -> Progress | None:
    """Do all pending shards in this process, as one task; None when there are none."""
    if not decision.pending:
        _repair_only(decision)
        return None
    from d2m_hpc.worker.task import run_task

    submission = commit(decision, [decision.pending])
    return run_task(decision.run.root, submission.name, 0, local=True, listener=listener)


def _repair_only(decision: Decision) -> None:
    if decision.lost or any(decision.run.leases.glob("*.lock")):
        commit(decision, [])
