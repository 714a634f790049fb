"""A task that is frozen in a commit for longer than its lease changes nothing when it wakes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from kit import write_shards
from test_backfill import TEXT, assert_same, run, workload
from test_resume import fork, leftovers

from d2m_hpc.errors import D2MError
from d2m_hpc.plan.decide import decide
from d2m_hpc.run import staging
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import DIED, Record, read_records
from d2m_hpc.run.staging import Staging
from d2m_hpc.watch.verify import verify
from d2m_hpc.worker.write.writer import Committer, TakenOver

GROWN: dict[str, Any] = {**TEXT, "additional_fields": ["caption", "uid"]}


@pytest.mark.parametrize("taker", [TEXT, GROWN], ids=["same config", "grown config"])
def test_whichever_step_a_task_wakes_at_the_pair_of_who_took_over_stays(
    taker: dict[str, Any], tmp_path: Path
) -> None:
    write_shards(tmp_path / "tars", 1)
    run(workload(tmp_path, "full", taker))
    first = workload(tmp_path, "none", TEXT).where
    _every_step(tmp_path, first, taker, "")


def test_whichever_step_an_extending_task_wakes_at_the_pair_of_who_took_over_stays(
    tmp_path: Path,
) -> None:
    """Here an older pair is in place, which a commit takes away first."""
    write_shards(tmp_path / "tars", 1)
    run(workload(tmp_path, "before", TEXT))
    taker = {**GROWN, "additional_fields": ["caption", "uid", "original_width"]}
    run(workload(tmp_path, "full", taker))
    first = workload(tmp_path, "none", GROWN).where
    _every_step(tmp_path, first, taker, str(tmp_path / "before"))


def _every_step(folder: Path, first: str, taker: dict[str, Any], before: str) -> None:
    """Freeze a run of the first config at each step, and run the taker's meanwhile."""
    frozen = folder / "frozen.yml"
    Path(first).rename(frozen)
    config = workload(folder, "none", taker).where
    ended = fork("freeze", frozen, folder / "out", config, *[before] * bool(before))
    steps = len(ended) // 6
    assert ended[::2] == ["taker", "frozen", "again"] * steps
    assert set(ended[1::6]) == {"0"}  # also where the frozen task's pair is not yet on record
    assert set(ended[3::6]) <= {"0", "1"}  # 1: the pair is the larger config's now
    assert set(ended[5::6]) == {"0"}
    outs = sorted((folder / "out").iterdir(), key=lambda out: int(out.name))[:-1]
    assert len(outs) == steps > 15
    for out in outs:
        assert_same(out, folder / "full")
        assert leftovers(out) == set()
        asked = workload(folder, f"out/{out.name}", taker)
        assert verify(asked.run, asked.config).faults == [], out.name
        assert decide(asked).pending == []
        known = Manifest.load(asked.run)
        assert (known.done.keys(), known.failures) == ({"00000"}, {})
        records = [r for path in asked.run.records.iterdir() for r in read_records(path)]
        # All that was counted is that the frozen attempt had not ended when its shard was taken.
        assert {(r.kind, r.attempt < known.done["00000"].attempt) for r in records} <= {
            ("", True),
            ("", False),
            (DIED, True),
        }


class _Rows:
    """What a commit asks of a shard's values."""

    def __init__(self, *keys: str) -> None:
        self._keys = keys

    def features(self) -> dict[str, Any]:
        return {"number": np.array([float(sum(map(ord, key))) for key in self._keys])}

    def table(self) -> pa.Table:
        return pa.table({"key": list(self._keys)})


def _end_again_and_again(out: str, until: float) -> None:
    while time.time() < until:
        Committer(OutputDir(out), Path("/")).close()


def test_tasks_that_end_take_no_folder_from_those_that_commit(tmp_path: Path) -> None:
    out, until = str(tmp_path / "out"), time.time() + 2
    fresh = multiprocessing.get_context("spawn")
    enders = [fresh.Process(target=_end_again_and_again, args=(out, until)) for _ in range(2)]
    for ender in enders:
        ender.start()
    committer, number = Committer(OutputDir(out), tmp_path), 0
    while any(ender.is_alive() for ender in enders):
        committer.commit(_Rows("a"), Record(f"{number % 50}", "done", rows=1, task="000-0-0"))
        number += 1
    committer.close()
    assert len(OutputDir(out).stems()) == min(number, 50)
    assert sorted(Path(out).glob(".*")) == []


def test_a_folder_that_keeps_vanishing_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, mkdir, left = tmp_path / "out" / ".d2m-tmp", Path.mkdir, [3]
    root.parent.mkdir()

    def slow(path: Path, *args: Any, **options: Any) -> None:
        if path.parent == root and left[0]:
            left[0] -= 1
            root.rmdir()  # another task ended between the two
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", slow)
    assert Staging(root).make("x", 1).is_dir()
    assert left == [0]


def test_an_output_folder_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    """Where a disk was unmounted, its files would go to the one below."""
    with pytest.raises(FileNotFoundError):
        Staging(tmp_path / "out" / ".d2m-tmp").make("x", 1)
    assert list(tmp_path.iterdir()) == []


def test_two_attempts_at_a_shard_have_folders_of_their_own(tmp_path: Path) -> None:
    area = Staging(tmp_path / "s")
    assert area.make("a.b", 1) != area.make("a.b", 1)
    assert area.stems() == {"a.b"}


def test_an_attempt_fences_earlier_ones_alone(tmp_path: Path) -> None:
    """It may itself be the one that was frozen, before it got here."""
    area = Staging(tmp_path / "s")
    first, third, other = area.make("a", 1), area.make("a", 3), area.make("a.b", 1)
    (tmp_path / "s" / "a.000-1-0").mkdir()  # as an earlier version named them
    area.fence("a", 2)
    assert {p for p in (tmp_path / "s").iterdir()} == {third, other}
    assert not first.exists()


def test_what_a_kill_left_of_a_removal_goes_with_the_next(tmp_path: Path) -> None:
    area = Staging(tmp_path / "s")
    (tmp_path / "s" / f"{staging.DOOMED}0123").mkdir(parents=True)
    area.fence("another")
    assert list((tmp_path / "s").iterdir()) == []
    (tmp_path / "s" / f"{staging.DOOMED}4567").mkdir()
    area.close()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("asked", [1, 2])
def test_who_has_lost_the_lease_writes_nothing(asked: int, tmp_path: Path) -> None:
    """Also where it finds that out by an error."""
    committer = Committer(OutputDir(str(tmp_path / "out")), tmp_path)
    committer.commit(_Rows("a", "b"), Record("s", "done", rows=2, task="000-0-0"))
    answers = iter([True] * (asked - 1) + [False] * 2)
    other = Record("s", "done", rows=1, task="000-1-0")
    rows: Callable[[], Any] = lambda: _Fenced(tmp_path / "out") if asked > 1 else _Rows("c")  # noqa: E731
    with pytest.raises(TakenOver):
        committer.commit(rows(), other, lambda: next(answers))
    committer.close()
    found = Pair(OutputDir(str(tmp_path / "out")), "s").record()
    assert found is not None
    assert found.rows == 2
    assert sorted(os.listdir(tmp_path / "out")) == ["s.npz", "s.parquet"]


class _Fenced(_Rows):
    """Another task takes the shard over while its values are asked for."""

    def __init__(self, out: Path) -> None:
        super().__init__("c")
        self._out = out

    def table(self) -> pa.Table:
        Staging(self._out / staging.STAGING).fence("s")
        return super().table()


def test_a_folder_that_vanishes_under_a_held_lease_is_a_failure(tmp_path: Path) -> None:
    committer = Committer(OutputDir(str(tmp_path / "out")), tmp_path)
    with pytest.raises(D2MError, match=r"s cannot be written.*No such file"):
        committer.commit(_Fenced(tmp_path / "out"), Record("s", "done", rows=1, task="000-0-0"))


@pytest.mark.parametrize("scheme", ["memory", "s3"])
@pytest.mark.parametrize("frozen_after", range(1, 7))
def test_on_a_store_no_pair_is_ever_mixed(
    frozen_after: int, scheme: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The task is frozen after it has asked for its lease, before what it does next."""
    if scheme == "s3":
        request.getfixturevalue("bucket")
    output, asked = OutputDir(f"{scheme}://bucket/{tmp_path.name}"), 0
    first, second = (Committer(output, tmp_path / name) for name in "ab")
    for name in "ab":
        (tmp_path / name).mkdir()
    first.commit(_Rows("old"), Record("s", "done", rows=1, task="000-0-0"))

    def held() -> bool:
        nonlocal asked
        asked += 1
        if asked == frozen_after:
            second.commit(_Rows("b", "c"), Record("s", "done", rows=2, task="000-2-0"))
        return asked <= frozen_after

    with pytest.raises(TakenOver):
        first.commit(_Rows("a"), Record("s", "done", rows=1, task="000-1-0"), held)
    found = Pair(output, "s").record()
    if frozen_after in (2, 4):  # what it did next was to remove the older parquet, and npz
        assert found is None
    else:
        assert found is not None
        assert found.task == "000-2-0"
        assert found.npz_sha256 == output.sha256("s.npz")
