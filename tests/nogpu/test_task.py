"""A GPU that dies while a task runs: the node is at fault, and no shard."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from kit import d2m, write_config, write_shards

from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest

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


def work(gpu: Any, root: str, launches: int) -> None:
    """End this process as a task's ends."""
    from d2m_hpc.worker.__main__ import end, main

    os.environ |= {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node7", "SLURM_LOCALID": "0"}
    os.environ |= {"SLURM_JOB_END_TIME": "4102444800"}
    sys.argv = ["worker", root, "000", "0", "1"]
    gpu.die_after(launches)
    end(main(sys.argv[1:]))


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
