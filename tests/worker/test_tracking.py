"""`logging: true` with the real wandb, offline; what it wrote is read back from its file."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit import STATS, submit, write_config, write_shards
from wandb.proto.wandb_internal_pb2 import Record

from d2m_hpc.config import load
from d2m_hpc.errors import ConfigError
from d2m_hpc.plan.workload import inspect, missing_extras

TRACK = """
import json, os, sys, time
from pathlib import Path
from d2m_hpc.config import load
from d2m_hpc.run.folder import RunDir
from d2m_hpc.worker import tracking
from d2m_hpc.run.tasks import Progress
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
tracking.EVERY_SECONDS, tracking.START_SECONDS = 0.1, 1.0
run, progress = RunDir(Path(sys.argv[1])), Progress("000-3-1")
run.create()
tracker = tracking.Tracker(run, load(Path(sys.argv[2])), progress)
with tracker:
    exec(sys.argv[3])
print("left", not tracker._thread.is_alive())
"""
WAIT = """
until = time.monotonic() + 20
while {} and time.monotonic() < until:
    time.sleep(0.05)
"""
RUNNING = WAIT.format("not list(run.root.glob('wandb/*/files')) and tracker._thread.is_alive()")
ENDED = WAIT.format("tracker._thread.is_alive()")
KILL = """
import signal
for children in Path("/proc/self/task").glob("*/children"):
    for child in children.read_text().split():
        os.kill(int(child), signal.SIGKILL)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_shards(tmp_path / "tars", 2)
    return write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=str(tmp_path / "tars" / "*.tar"),
        output_metadata_dir=str(tmp_path / "outputs of june"),
        logging=True,
    )


def _environment(folder: Path, **more: str) -> dict[str, str]:
    """A home without a login; of the user's own variables for wandb, none."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return {**mine, "HOME": str(folder), **more}


def _track(config: Path, code: str, **environment: str) -> str:
    """What a task logs whose work is this code."""
    folder = config.parent
    command = [sys.executable, "-c", TRACK, str(folder / "run"), str(config), code]
    done = subprocess.run(
        command,
        env=_environment(folder, **environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _records(run: Path) -> Iterator[Any]:
    """Of wandb's file: after 7 bytes LevelDB's log format, blocks of 32 KiB with parts in them."""
    [path] = run.glob("wandb/offline-run-*/run-*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def _items(items: Any) -> dict[str, Any]:
    return {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}


def _history(run: Path) -> list[dict[str, Any]]:
    return [_items(r.history.item) for r in _records(run) if r.HasField("history")]


def test_a_run_tells_wandb_how_far_it_is(config: Path) -> None:
    folder = config.parent
    ended = submit(config, env=_environment(folder, WANDB_MODE="offline"))
    assert ended.returncode == 0, ended.stderr
    run = folder / "outputs of june" / ".d2m"
    records = list(_records(run))
    [told] = [r.run for r in records if r.HasField("run")]
    assert (told.project, told.run_group, told.display_name) == (
        "d2m_hpc",
        "outputs of june",
        "000-0-0",
    )
    assert _items(told.config.update)["models"] == STATS["models"]
    last = _history(run)[-1]
    figures = ("rows", "rejected", "shards_done", "shards_failed")
    assert {key: last[key] for key in figures} == {
        "rows": 10,
        "rejected": 0,
        "shards_done": 2,
        "shards_failed": 0,
    }
    assert last["samples_per_second"] > 0
    summary: dict[str, Any] = {}
    for record in records:
        summary |= _items(record.summary.update)
    assert summary["state"] == "finished"
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]


def test_the_speed_is_that_since_the_last_figures(config: Path) -> None:
    """And a task that is stopped has failed; and the environment's project counts."""
    first = "progress.updated = progress.started + 10; progress.rows = 100"
    then = "progress.updated += 5; progress.rows = 120; progress.state = 'stopped'"
    code = first + WAIT.format("tracker._rows < 100") + then
    _track(config, code, WANDB_MODE="offline", WANDB_PROJECT="june")
    run = config.parent / "run"
    speeds = [h["samples_per_second"] for h in _history(run) if h["samples_per_second"]]
    assert speeds == [10, 4]
    records = list(_records(run))
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1]
    assert [r.run.project for r in records if r.HasField("run")] == ["june"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "No API key configured"),
        ({"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}, "refused"),
    ],
)
def test_without_login_or_network_the_task_goes_on(
    environment: dict[str, str], reason: str, config: Path
) -> None:
    said = _track(config, ENDED, **environment)
    assert re.findall(r"WARNING wandb failed; .*", said)[0].count(reason) == 1
    assert said.count("wandb failed") == 1
    assert said.endswith("left True\n")


def test_a_wandb_that_dies_on_the_way_costs_nothing(config: Path) -> None:
    said = _track(config, RUNNING + KILL + ENDED, WANDB_MODE="offline")
    assert said.count("WARNING wandb failed; nothing more of this task is shown there") == 1
    assert said.endswith("left True\n")


def test_without_wandb_a_submit_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(config)
    assert missing_extras(loaded) == []
    monkeypatch.setattr(sys, "path", [])  # nothing is installed any more
    monkeypatch.chdir(config.parent)
    message = r"logging: true needs wandb, .*pip install 'd2m_hpc\[wandb\]'"
    for thorough in (False, True):
        with pytest.raises(ConfigError, match=message):
            inspect(loaded, str(config), thorough)
    assert missing_extras(loaded.model_copy(update={"logging": False})) == []
