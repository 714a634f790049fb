"""Two nodes that see one folder through caches of their own, as clients of an NFS export do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import STATS, custom_config, custom_file, submit, write_config, write_shards
from storage.test_lease import lost_holder
from test_resume import contents, leftovers, times_computed

SERVER, CLIENTS = (Path(__file__).with_name(name) for name in ("nfs_like.py", "clients.py"))
LEASED, FAULTS = 3.0, 8
short = pytest.mark.parametrize("nodes", [1.0], indirect=True)
long = pytest.mark.parametrize("nodes", [60.0], indirect=True)

TAKE = """
import sys, time
from pathlib import Path
from d2m_hpc.storage.lease import Lease

lease, began = Lease(Path(sys.argv[1]), 1.0), time.monotonic()
while not lease.claim():
    time.sleep(0.1)
print(time.monotonic() - began > 1, lease.lost)
lease.release()
"""
FENCE = """
import sys
from pathlib import Path
from d2m_hpc.run.staging import Staging

staging = Staging(Path(sys.argv[1]))
print(staging.stems(), flush=True)
sys.stdin.readline()
print(staging.stems(), staging.fence("a", 2))
"""
LOOK = """
import sys
from pathlib import Path
from d2m_hpc.config.load import load
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.worker.left import Left

out = Path(sys.argv[1])
run = RunDir(out / ".d2m")
left = Left(run, "000", load(run.submission("000").config, frozen=True))
print(left.nothing_for(0), flush=True)
sys.stdin.readline()
print(Pair(OutputDir(str(out)), "00000").record() is not None)
"""

VERIFY = """
import sys
from pathlib import Path
from d2m_hpc.plan.standing import standings
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.watch.status import find_run
from d2m_hpc.watch.verify import verify

found = find_run(Path(sys.argv[1]) / ".d2m")
output = OutputDir(sys.argv[1])
print(output.stems(), [output.has(f"00000.{end}") for end in ("npz", "parquet")], flush=True)
sys.stdin.readline()
print(len(standings(*found).done), flush=True)
report = verify(*found)
print(report.done, report.unfinished, [str(fault) for fault in report.faults])
"""


@pytest.fixture
def nodes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """Processes in the namespaces of two nodes, which both see `behind` as `seen`; with the seconds
    of their caches."""
    seconds = request.param
    for name in ("behind", "seen"):
        (tmp_path / name).mkdir()
    started = []
    try:
        for host in ("node-a", "node-b"):
            words = [sys.executable, SERVER, tmp_path / "behind", tmp_path / "seen", seconds, host]
            node = subprocess.Popen(
                [*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            started.append(node)
            assert node.stdout
            assert node.stderr
            if node.stdout.readline() != "ready\n":
                why = node.stderr.read().strip().rpartition("\n")[2]
                pytest.skip(f"no filesystem can be mounted here: {why}")
        yield [node.pid for node in started]
    finally:
        for node in started:
            node.kill()
            node.communicate()


def on(node: int, code: str, path: Path) -> subprocess.Popen[str]:
    """Python on a node; a line to its input lets it go on."""
    words = ["nsenter", f"--target={node}", "--mount", "--uts", sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*words, str(path)], text=True, **pipes)


@long
def test_a_lease_of_a_dead_node_is_taken_over_where_names_cannot_be_exchanged(
    nodes: list[int], tmp_path: Path
) -> None:
    lost_holder(tmp_path / "behind" / "00000.lock", 1.0)
    with on(nodes[0], TAKE, tmp_path / "seen" / "00000.lock") as taker:
        assert taker.communicate(timeout=60) == ("True False\n", "")
    assert list((tmp_path / "behind").iterdir()) == []


@long
def test_the_fence_finds_a_folder_that_the_cached_listing_lacks(
    nodes: list[int], tmp_path: Path
) -> None:
    (tmp_path / "behind" / "s").mkdir()
    with on(nodes[0], FENCE, tmp_path / "seen" / "s") as fencing:
        assert fencing.stdout
        assert fencing.stdout.readline() == "set()\n"
        (tmp_path / "behind" / "s" / "a.1-0").mkdir()
        assert fencing.communicate("\n", timeout=60) == ("set() True\n", "")
    assert list((tmp_path / "behind" / "s").iterdir()) == []


def one_pair(folder: Path) -> Path:
    """A finished run's outputs, without its pair, behind the nodes' mounts."""
    write_shards(folder / "tars", 1)
    tars, out = str(folder / "tars" / "*.tar"), folder / "behind" / "out"
    config = write_config(
        folder / "c.yml", STATS, input_tars=tars, output_metadata_dir=str(folder / "seen/out")
    )
    assert submit(config).returncode == 0
    (folder / "seen" / "out").rename(out)
    for suffix in ("parquet", "npz"):
        (out / f"00000.{suffix}").rename(folder / f"00000.{suffix}")
    return out


def put_back(folder: Path, out: Path) -> None:
    """The pair of `one_pair`, in the order of a commit."""
    for suffix in ("npz", "parquet"):
        (folder / f"00000.{suffix}").rename(out / f"00000.{suffix}")


@long
def test_a_task_that_looked_before_sees_what_another_finished(
    nodes: list[int], tmp_path: Path
) -> None:
    out = one_pair(tmp_path)
    with on(nodes[0], LOOK, tmp_path / "seen" / "out") as looking:
        assert looking.stdout
        assert looking.stdout.readline() == "False\n"
        put_back(tmp_path, out)
        assert looking.communicate("\n", timeout=60) == ("True\n", "")


@long
def test_verify_finds_a_pair_that_was_missing_a_moment_ago(
    nodes: list[int], tmp_path: Path
) -> None:
    """Neither the listing that is cached has it, nor the names that are known to be missing."""
    out = one_pair(tmp_path)
    with on(nodes[0], VERIFY, tmp_path / "seen" / "out") as verifying:
        assert verifying.stdout
        assert verifying.stdout.readline() == "set() [False, False]\n"
        put_back(tmp_path, out)
        assert verifying.communicate("\n", timeout=60) == ("1\n1 0 []\n", "")
    assert {path.name for path in out.iterdir()} >= {".d2m", "00000.npz", "00000.parquet"}


@short
def test_kills_and_frozen_tasks_behind_caches_change_nothing(
    nodes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task is requeued on the other node, whose caches are older than what it left."""
    # No Slurm: one that is here, and may be down, would be asked for the tasks of each submit.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    write_shards(tmp_path / "tars", 16, samples=20)
    out, undisturbed = tmp_path / "seen" / "out", tmp_path / "undisturbed"
    code = custom_file("slow", before="import time; time.sleep(0.1)")
    more = {"output_metadata_dir": str(out), "lease_seconds": LEASED, "shards_per_task": 4}
    config = custom_config(tmp_path, code, "slow", **more)
    assert submit(config, "--set", f"output_metadata_dir={undisturbed}").returncode == 0
    words = [sys.executable, CLIENTS, config, 20261126, FAULTS, *nodes]
    ended = subprocess.run([*map(str, words)], stdout=subprocess.PIPE, text=True, check=True)
    assert ended.stdout.count("is killed") + ended.stdout.count("is frozen") == FAULTS
    assert ended.stdout.count("submit: 0") == 2
    assert "verify: 0" in ended.stdout
    (tmp_path / "seen").rmdir()
    (tmp_path / "behind").rename(tmp_path / "seen")
    assert contents(out) == contents(undisturbed)
    assert leftovers(out) == set()
    records = out / ".d2m" / "records"
    for path in records.glob("001-*"):  # of a submit whose caches may be older than the last ends
        path.unlink()
    assert set(times_computed(out).values()) == {1}
