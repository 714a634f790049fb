"""A GPU that dies while a task runs: the node is at fault, and no shard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kit import custom_config, custom_file, d2m, write_config, write_shards

from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURMD_NODENAME": "node7",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_END_TIME": "4102444800",
}
MODELS = ["oai-clip-vit-b32", "dedup-isc-ft-v107"]


@pytest.fixture
def planned(tmp_path: Path, checkpoints: Path) -> RunDir:
    """A run of three shards whose submission no task has begun."""
    write_shards(tmp_path / "tars", 3, 6)
    config = write_config(
        tmp_path / "c.yml",
        {"models": MODELS, "device": 0, "nworkers": 2, "batch_size": 4},
        postprocess_features=["oai-clip-vit-b32-image", "dedup-isc-ft-v107-image"],
        input_tars=str(tmp_path / "tars" / "*.tar"),
        output_metadata_dir=str(tmp_path / "out"),
        weights_dir=str(checkpoints),
        allow_unpublished_weights=True,
    )
    assert d2m("submit", config, "--no-sbatch", "--no-preflight").returncode == 0
    return RunDir(tmp_path / "out" / ".d2m")


def work(gpu: Any, root: str, launches: int) -> int:
    """The exit code of a task; where it is not 0, this process ends as a task's ends."""
    from d2m_hpc.worker.__main__ import end, main

    os.environ |= SLURM
    gpu.die_after(launches)
    if code := main([root, "000", "0", "1"]):
        end(code)
    return code


@pytest.mark.parametrize("launches", [3, 250, 600])
def test_a_gpu_that_dies_is_the_nodes_fault(nogpu: Any, planned: RunDir, launches: int) -> None:
    """While models are built; in the first batches; and later, when a shard may be done."""
    ended = nogpu(work, str(planned.root), launches)
    assert ended.code == 4
    [failure] = [json.loads(path.read_bytes()) for path in planned.node_failures.iterdir()]
    assert failure["node"] == "node7"
    assert failure["why"] == (
        "CUDA failed on node7: CUDA error: an illegal memory access was encountered"
    )
    assert Manifest.load(planned).failures == {}
    assert list(planned.leases.iterdir()) == []


def work_ahead(gpu: Any, root: str, folder: str, launches: int | None) -> int:
    """As `work`; what the task launched and read is in a file then.

    Args:
        launches: how long the device lives while the third shard's first batch is launched.
    """
    from early import launch_ahead

    from d2m_hpc.worker.compute.graph import Graph
    from d2m_hpc.worker.compute.in_flight import InFlight

    launch, outputs = Graph.launch, InFlight.outputs
    told = open(Path(folder, "told"), "a", buffering=1)  # noqa: SIM115

    def launching(graph: Graph, batch: Any) -> InFlight:
        print("launch", batch.keys[0], file=told)
        if launches is not None and batch.keys[0] == "000020000":
            gpu.die_after(launches)
        return launch(graph, batch)

    def reading(flight: InFlight) -> Any:
        print("read", flight._batch.keys[0], file=told)
        return outputs(flight)

    launch_ahead(setattr)
    Graph.launch, InFlight.outputs = launching, reading  # type: ignore[method-assign]
    return work(gpu, root, -1)


def test_a_task_launches_each_shard_while_the_one_before_is_computed(
    nogpu: Any, planned: RunDir, tmp_path: Path
) -> None:
    assert nogpu(work_ahead, str(planned.root), str(tmp_path), None) == 0
    first, second, third = ([f"{n:05d}0000", f"{n:05d}0004"] for n in range(3))
    assert (tmp_path / "told").read_text().split("\n") == [
        *(f"launch {first[0]}", f"launch {first[1]}", f"read {first[0]}"),
        *(f"launch {second[0]}", f"read {first[1]}", f"launch {second[1]}", f"read {second[0]}"),
        *(f"launch {third[0]}", f"read {second[1]}", f"launch {third[1]}", f"read {third[0]}"),
        *(f"read {third[1]}", ""),
    ]
    assert [done.rows for done in Manifest.load(planned).done.values()] == [6] * 3
    assert list(planned.leases.iterdir()) == []


@pytest.mark.parametrize("launches", [0, 3])
def test_a_gpu_that_dies_when_the_next_shard_is_launched_is_the_nodes_fault(
    nogpu: Any, planned: RunDir, tmp_path: Path, launches: int
) -> None:
    assert nogpu(work_ahead, str(planned.root), str(tmp_path), launches).code == 4
    assert (tmp_path / "told").read_text().split("\n")[-2] == "read 000010004"
    [failure] = [json.loads(path.read_bytes()) for path in planned.node_failures.iterdir()]
    assert failure["why"] == (
        "CUDA failed on node7: CUDA error: an illegal memory access was encountered"
    )
    assert Manifest.load(planned).failures == {}
    assert list(planned.leases.iterdir()) == []


ABORT = """
import ctypes
shared = torch.empty(1000, device=0)
shared.record_stream(torch.cuda.Stream())
ctypes.CDLL(None).nogpu_die_after(ctypes.c_long(0))
try:
    shared + 1
except RuntimeError:
    del shared
"""


def test_an_abort_by_a_gpu_that_dies_is_the_nodes_fault(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Of memory that is a model's own."""
    write_shards(tmp_path / "tars", 2, 2)
    config = custom_config(tmp_path, custom_file("own", before=ABORT), "own", device=0)
    assert d2m("submit", config, "--no-sbatch", "--no-preflight").returncode == 0
    run = RunDir(tmp_path / "out" / ".d2m")
    command = [sys.executable, "-m", "d2m_hpc.worker", str(run.root), "000", "0", "1"]
    ended = subprocess.run(command, env=environment | SLURM, capture_output=True, text=True)
    assert ended.returncode == 4, ended.stderr
    [failure] = [json.loads(path.read_bytes()) for path in run.node_failures.iterdir()]
    assert failure["why"].endswith("aborted: CUDA error: an illegal memory access was encountered")
    assert Manifest.load(run).failures == {}
