"""A node is left out after failures in a row, until it finishes a shard."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from d2m_hpc.run import nodes
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.run.records import Record, Recorder


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.create()
    return run


def fail(run: RunDir, node: str, when: float, why: str = "device 0 is not usable") -> None:
    text = json.dumps({"node": node, "why": why, "time": when})
    (run.node_failures / f"{node}-{when}.json").write_text(text)


def finish(run: RunDir, node: str, when: float) -> None:
    record = Record(f"{when}", "done", host=node, finished=when)
    Recorder(run.records / "000-0-0.jsonl").append(record)


def to_exclude(run: RunDir, most: int) -> list[str]:
    return nodes.to_exclude(run, nodes.last_finished(Manifest.load(run)), most)


def in_a_row(run: RunDir) -> dict[str, list[nodes.NodeFailure]]:
    return nodes.in_a_row(run, nodes.last_finished(Manifest.load(run)))


def test_nothing_is_left_out_of_a_new_run(run: RunDir, tmp_path: Path) -> None:
    assert to_exclude(run, 0) == []
    assert to_exclude(RunDir(tmp_path / "none"), 0) == []


@pytest.mark.parametrize(("most", "expected"), [(0, ["n1", "n2"]), (1, ["n1"]), (2, [])])
def test_a_node_may_fail_so_many_times(run: RunDir, most: int, expected: list[str]) -> None:
    for node, when in (("n1", 10.0), ("n1", 11.0), ("n2", 12.0)):
        fail(run, node, when)
    finish(run, "n3", 20)
    assert to_exclude(run, most) == expected


def test_a_finished_shard_clears_its_own_node(run: RunDir) -> None:
    fail(run, "n1", 10)
    fail(run, "n2", 10)
    finish(run, "n1", 20)
    assert to_exclude(run, 0) == ["n2"]
    fail(run, "n1", 30, "setup line 1 failed")
    finish(run, "n3", 40)
    assert to_exclude(run, 0) == ["n1", "n2"]
    assert [f.why for f in in_a_row(run)["n1"]] == ["setup line 1 failed"]


def test_where_no_other_node_works_the_fault_is_not_the_nodes(run: RunDir) -> None:
    """To leave out every node would be a run that no later submit could go on with."""
    finish(run, "n1", 10)
    finish(run, "n2", 11)
    fail(run, "n1", 20)
    fail(run, "n2", 20)
    assert sorted(in_a_row(run)) == ["n1", "n2"]
    assert to_exclude(run, 0) == []
    finish(run, "n2", 30)
    assert to_exclude(run, 0) == ["n1"]


def test_a_broken_node_whose_clock_is_ahead_is_left_out_all_the_same(run: RunDir) -> None:
    """Else it would swallow task after task for as long as its clock is ahead."""
    for seconds in range(3):
        fail(run, "n1", time.time() + 3600 + seconds)
    finish(run, "n2", time.time() + 60)
    assert to_exclude(run, 2) == ["n1"]


def test_a_failure_that_is_being_written_is_not_read(run: RunDir) -> None:
    fail(run, "n1", 10)
    (run.node_failures / "half.json").write_text('{"node": "n')
    assert [f.node for f in nodes.failures(run)] == ["n1"]


def test_what_is_no_failure_is_not_read(run: RunDir) -> None:
    fail(run, "n1", 10)
    for name, text in (("list", "[]"), ("words", '{"node": "n2", "why": "x", "time": "soon"}')):
        (run.node_failures / f"{name}.json").write_text(text)
    assert [f.node for f in nodes.failures(run)] == ["n1"]


def test_a_failure_of_long_ago_leaves_nobody_out(run: RunDir) -> None:
    """By the filesystem's clock: the node's own may have been wrong."""
    fail(run, "n1", 10)
    fail(run, "n2", 10)
    finish(run, "n3", 20)
    assert to_exclude(run, 0) == ["n1", "n2"]
    long_ago = time.time() - 1.1 * nodes.FORGOTTEN_SECONDS
    os.utime(run.node_failures / "n2-10.json", (long_ago, long_ago))
    assert to_exclude(run, 0) == ["n1"]
    assert sorted(in_a_row(run)) == ["n1"]


def test_a_node_that_is_gone_from_the_cluster_is_not_named_to_sbatch(run: RunDir) -> None:
    fail(run, "n1", 10)
    fail(run, "n2", 10)
    finish(run, "n3", 20)
    finished = nodes.last_finished(Manifest.load(run))
    assert nodes.to_exclude(run, finished, 0, {"n1", "n3"}) == ["n1"]
    assert nodes.to_exclude(run, finished, 0, ()) == ["n1", "n2"]  # nobody could be asked
