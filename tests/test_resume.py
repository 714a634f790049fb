"""Killed runs end as undisturbed ones do, and nothing is computed twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import warm
from kit import STATS, custom_config, custom_file, d2m, submit, write_config, write_shards

from d2m_hpc.run.owner import OWNER

FORKER = Path(__file__).with_name("forker.py")

SLOW = custom_file("slow", before="import time; time.sleep(0.05)  # a batch, on any machine")


def slow_config(folder: Path, shards: int, samples: int) -> Path:
    write_shards(folder / "tars", shards, samples)
    return custom_config(
        folder,
        SLOW,
        "slow",
        postprocess_columns=[*STATS["postprocess_columns"], "slow-length"],
        output_metadata_dir=str(folder / "undisturbed"),
        batch_size=5,
        max_attempts=100,  # each kill of a whole run counts for the shard in hand
    )


def fork(*arguments: object) -> list[str]:
    command = [sys.executable, str(FORKER), *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def contents(out: Path) -> dict[str, Any]:
    """Every table and array, and nothing about when or by whom they were made."""
    found: dict[str, Any] = {}
    for path in sorted(out.iterdir()):
        if path.suffix == ".parquet":
            found[path.name] = pq.read_table(path).to_pydict()
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[path.name] = {k: arrays[k].tolist() for k in arrays.files}
    return found


def leftovers(out: Path) -> set[str]:
    """Files that belong neither to a finished shard nor to the run's memory."""
    memory = {"config.yml", "shards.parquet"}
    folders = {"fingerprints", "records", "submissions", "progress", "logs", "schema"}
    run = out / ".d2m"
    files = {p for p in out.rglob("*") if p.is_file()}
    known = {p for p in files if p.parent == out and p.suffix in (".npz", ".parquet")}
    known |= {run / name for name in memory} | {out / OWNER}
    known |= {p for p in files if any(run / name in p.parents for name in folders)}
    temporary = {p for p in files if p.name.endswith(".tmp")}
    return {str(p.relative_to(out)) for p in (files - known) | temporary}


def times_computed(out: Path) -> Counter[str]:
    """By shard. A task that dies between a commit and its record leaves that to those that follow,
    of which one behind a cache may not see that another has written it."""
    lines = [
        json.loads(line)
        for path in (out / ".d2m" / "records").iterdir()
        for line in path.read_bytes().splitlines()
        if line.endswith(b"}")
    ]
    done = {(r["shard"], r["task"], r["started"]) for r in lines if r["state"] == "done"}
    return Counter(shard for shard, *_ in done)


def assert_as_undisturbed(out: Path, undisturbed: Path) -> None:
    want = contents(undisturbed)
    assert contents(out) == want
    assert leftovers(out) == set()
    assert set(times_computed(out).values()) == {1}
    assert len(times_computed(out)) == len(want) // 2


def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    # A shard takes 0.4 s, which seven of the moments leave: the eighth is there for the last kill.
    config = slow_config(tmp_path, shards=8, samples=40)
    assert submit(config).returncode == 0
    ended = fork("random", config, tmp_path / "out", 20261122, 20, 0.7)
    assert ended == ["killed"] * 20 + ["0"]
    # A kill may fall between the two steps of a take-over; the next submit removes what that left.
    out = f"output_metadata_dir={tmp_path / 'out'}"
    assert d2m("submit", config, "--local", "--set", out).returncode == 0
    assert_as_undisturbed(tmp_path / "out", tmp_path / "undisturbed")
    assert d2m("verify", tmp_path / "out" / ".d2m").returncode == 0


def test_a_kill_before_any_file_operation_loses_nothing(tmp_path: Path) -> None:
    config = slow_config(tmp_path, shards=2, samples=3)
    assert submit(config).returncode == 0
    ended = fork("steps", config, tmp_path / "out")
    killed, last = ended[:-1], ended[-1]
    assert (killed, last) == (["killed", "0"] * (len(killed) // 2), "0")
    assert len(killed) > 60
    for out in (tmp_path / "out").iterdir():
        assert_as_undisturbed(out, tmp_path / "undisturbed")


def test_two_runs_at_once_do_each_shard_once(tmp_path: Path) -> None:
    config = slow_config(tmp_path, shards=4, samples=20)
    command = ["d2m", "submit", str(config), "--local"]
    with open(os.devnull, "w") as null:
        both = [warm.start(command, null, null) for _ in range(2)]
    assert [p and p.wait() for p in both] == [0, 0]
    assert times_computed(tmp_path / "undisturbed") == {f"{i:05d}": 1 for i in range(4)}


def test_an_interrupt_exits_130_and_lets_go_of_the_shard(tmp_path: Path) -> None:
    config = slow_config(tmp_path, shards=2, samples=200)
    command = [str(Path(sys.executable).with_name("d2m")), "submit", str(config), "--local"]
    leases = tmp_path / "undisturbed" / ".d2m" / "leases"
    # A shell's background jobs, and all that they start, ignore SIGINT.
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not (leases.is_dir() and list(leases.iterdir())):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "the same command goes on from here" in said
    assert list(leases.iterdir()) == []


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A config whose three shards are done."""
    write_shards(tmp_path / "tars", 3)
    config = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=str(tmp_path / "tars" / "*.tar"),
        output_metadata_dir=str(tmp_path / "out"),
    )
    assert submit(config).returncode == 0
    return config


def test_new_tars_are_added_and_old_shards_left_alone(finished: Path) -> None:
    folder = finished.parent
    before = {p: p.stat().st_mtime_ns for p in (folder / "out").glob("0*.*")}
    write_shards(folder / "tars", 5)
    ended = submit(finished)
    assert ended.returncode == 0
    assert "5 shards: 3 done, 2 to do" in ended.stdout
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert len(contents(folder / "out")) == 10


def test_another_config_is_refused_with_the_difference(finished: Path) -> None:
    ended = submit(finished, "--set", "resize=exact")
    assert ended.returncode == 2
    assert "resize: was 'fast', is 'exact'" in ended.stderr
    assert "reprocess: true" in ended.stderr


def test_reprocess_computes_again_what_another_config_made(finished: Path) -> None:
    again = ["--set", "postprocess_columns=[text-words]", "--set", "reprocess=true"]
    assert "3 to do" in submit(finished, *again).stdout
    out = finished.parent / "out"
    assert pq.read_schema(out / "00000.parquet").names == ["key", "text-words", "uid", "caption"]
    assert "3 done, 0 to do" in submit(finished, *again).stdout
    assert d2m("verify", out / ".d2m").returncode == 0


def test_a_deleted_output_is_computed_again(finished: Path) -> None:
    out = finished.parent / "out"
    before = contents(out)
    (out / "00001.parquet").unlink()
    assert "2 done, 1 to do" in submit(finished).stdout
    assert contents(out) == before


def test_parquets_of_another_program_are_not_overwritten(finished: Path) -> None:
    out = finished.parent / "other"
    out.mkdir()
    foreign = pq.read_table(finished.parent / "out" / "00000.parquet").replace_schema_metadata(None)
    pq.write_table(foreign, out / "00000.parquet")
    ended = submit(finished, "--set", f"output_metadata_dir={out}")
    assert ended.returncode == 2
    assert "holds 1 parquet that this program did not write (00000)" in ended.stderr


def test_a_shard_is_given_up_after_max_attempts(finished: Path) -> None:
    folder = finished.parent
    (folder / "tars" / "broken.tar").write_bytes(b"not a tar" * 100)
    for _ in range(3):
        ended = submit(finished)
        assert ended.returncode == 1
        assert "broken.tar is no tar: it is text" in ended.stdout
    ended = submit(finished)
    assert "0 to do, 1 given up after 3 attempts" in ended.stdout
    assert ended.returncode == 1
    assert submit(finished, "--set", "max_attempts=4").returncode == 1
    assert len(contents(folder / "out")) == 6


def test_the_folders_may_have_any_name(awkward_path: Path) -> None:
    write_shards(awkward_path / "tars", 2)
    config = write_config(
        awkward_path / "c.yml",
        STATS,
        input_tars=str(awkward_path / "tars" / "0000{0..1}.tar"),
        output_metadata_dir=str(awkward_path / "out"),
        run_dir=str(awkward_path / "run"),
    )
    ended = submit(config)
    assert ended.returncode == 0, ended.stderr
    assert d2m("verify", config).returncode == 0


def test_a_run_may_be_moved_with_its_outputs(finished: Path) -> None:
    moved = finished.parent / "moved"
    (finished.parent / "out").rename(moved)
    assert d2m("verify", moved / ".d2m").returncode == 0


def test_a_file_url_is_the_local_folder(finished: Path) -> None:
    out = finished.parent / "out"
    ended = submit(finished, "--set", f"output_metadata_dir=file://{out}")
    assert "3 shards: 3 done, 0 to do" in ended.stdout
