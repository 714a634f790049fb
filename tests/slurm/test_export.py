"""Tars of kept samples, written by array tasks on the devcluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kit import STATS, d2m, write_config, write_shards
from slurm.cluster import Cluster, wait_until
from slurm.holding import write_holding

import d2m_hpc

PATCH = """
def patch(tars):
    whole = tars.TarWriter.add

    def add(self, name, data):
        whole(self, name, data)
        if name.endswith(".jpg"):  # one of each sample
            stem = Path(self._file.name).name.split(".")[1]
            with open(HERE / "added", "a") as file:
                file.write(f"{stem} {os.environ.get('SLURM_ARRAY_TASK_ID')}\\n")
            self._write()  # a part of the tar is on disk
            stand(stem)

    tars.TarWriter.add = add
"""
SHARDS, SAMPLES = 7, 5


def begun(cluster: Cluster, **slurm: Any) -> tuple[d2m_hpc.Run, list[object]]:
    """A finished run, and the command of an export by three tasks."""
    folder = cluster.folder
    write_shards(folder / "tars", SHARDS, SAMPLES)
    setup = write_holding(folder, "d2m_hpc.subsets.tars", PATCH)
    chosen = {"partition": "low", "setup": [setup], **slurm}
    places = {"input_tars": f"{folder}/tars/*.tar", "output_metadata_dir": str(folder / "out")}
    run = d2m_hpc.submit(write_config(folder / "c.yml", STATS, **places, slurm=chosen), local=True)
    lists = folder / "kept.jsonl"
    run.select(lists, "caption NOT LIKE '%0'")
    words = ("export", "subset-tars", folder / "c.yml", "-o", folder / "kept", "--lists", lists)
    return run, [*words, "--tasks", 3, "--cpus-per-task", 1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def element(said: str, index: int) -> str:
    [job] = re.findall(r"array (\d+):", said)
    return f"{job}_{index}"


def test_the_same_command_goes_on_after_a_task_is_killed(cluster: Cluster) -> None:
    folder, out = cluster.folder, cluster.folder / "kept"
    run, words = begun(cluster)
    run.export("subset-tars", folder / "at-once", lists=folder / "kept.jsonl")
    expected = contents(folder / "at-once")
    assert len(expected) == SHARDS

    (folder / "hold-00001").touch()
    first = d2m(*words)
    assert first.returncode == 0, first.stderr
    assert "3 tasks started" in first.stdout
    killed = element(first.stdout, 2)
    wait_until((folder / "held-00001").exists)
    wait_until(lambda: [*cluster.states()] == [killed])
    # What was done is done, and what is at work goes on.
    assert {"00001.tar"} == expected.keys() - contents(out).keys() - {"00004.tar"}
    same = d2m(*words)
    assert same.stdout == "1 task of an earlier command waits or runs\n"
    other = d2m(*words, "--tasks", 2)
    assert other.returncode == 1
    assert "wait or run; wait for their end, or cancel them" in other.stderr

    cluster.run("scancel", "-f", "-s", "KILL", killed)
    wait_until(lambda: killed not in cluster.states())
    (folder / "hold-00001").unlink()
    assert "00001.tar" not in contents(out)
    assert [*out.glob(".00001.tar.*.tmp")]
    again = d2m(*words, "--wait")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 task started" in again.stdout
    assert f"{SHARDS} were there" in again.stdout
    assert contents(out) == expected
    assert {p.name for p in out.iterdir()} == {*expected, ".d2m-export.jsonl"}
    added = (folder / "added").read_text().splitlines()
    for stem, share in (("00000", 1), ("00002", 3), ("00003", 1), ("00005", 3), ("00006", 1)):
        assert added.count(f"{stem} {share}") == SAMPLES - 1  # each once


def test_a_part_that_fails_is_told_with_its_log(cluster: Cluster) -> None:
    run, words = begun(cluster)
    lost = cluster.folder / "tars" / "00002.tar"
    content = lost.read_bytes()
    lost.unlink()
    failed = d2m(*words, "--wait")
    assert failed.returncode == 1
    [log] = re.findall(r"part 3 of 3 is not complete; see (.*)", failed.stdout)
    assert "part 1" not in failed.stdout
    assert "00002.tar" in Path(log).read_text()
    assert "Traceback" not in Path(log).read_text()
    assert "00002.tar" not in contents(cluster.folder / "kept")
    lost.write_bytes(content)
    mended = d2m(*words, "--wait")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    run.export("subset-tars", cluster.folder / "at-once", lists=cluster.folder / "kept.jsonl")
    assert contents(cluster.folder / "kept") == contents(cluster.folder / "at-once")
