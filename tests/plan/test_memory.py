"""How much memory a task is said to take, and a `slurm.mem` that is less."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from kit import DATACOMP, STATS, d2m, write_config, write_shards

from d2m_hpc.config import Config, load
from d2m_hpc.plan import memory
from d2m_hpc.run.frozen import Custom
from d2m_hpc.worker.read import loader, prepare

GIB = 1 << 30


def config(folder: Path, values: dict[str, Any], **more: Any) -> Config:
    more = {"input_tars": "a.tar", "output_metadata_dir": str(folder / "out"), **more}
    return load(write_config(folder / "c.yml", values, **more))


def needed(made: Config, *checkpoints: int) -> int:
    return memory.needed(made, made.registry(Custom().registry)[0], checkpoints)


def test_batches_and_decoding_are_those_of_the_loader() -> None:
    assert memory.BATCHES == loader.AHEAD + 4
    assert memory.DECODING == prepare.IN_FLIGHT


def test_pictures_of_one_size_count_once(tmp_path: Path) -> None:
    """CLIP's two models share theirs; faces' and dedup's are their own."""
    both = [needed(config(tmp_path, DATACOMP, device=0, batch_size=size)) for size in (1000, 2000)]
    assert both[1] - both[0] == 8 * 1000 * 3 * (2 * 224**2 + 512**2)


def test_a_net_lies_on_the_host_where_there_is_no_gpu(tmp_path: Path) -> None:
    gpu, cpu = (config(tmp_path, DATACOMP, device=device) for device in (0, "cpu"))
    assert needed(gpu, 10 * GIB, GIB) - needed(gpu) == 30 * GIB
    assert needed(cpu, 10 * GIB, GIB) - needed(cpu) == (30 + 22) * GIB


@pytest.mark.parametrize(
    ("mem", "expected"),
    [
        ("64G", 64 * GIB),
        ("64gb", 64 * GIB),
        (1024, GIB),
        ("2048", 2 * GIB),
        ("2T", 2048 * GIB),
        ("0", math.inf),
        (None, math.inf),
        ("odd", math.inf),
    ],
)
def test_what_sbatch_is_asked_for(mem: str | int | None, expected: float) -> None:
    assert memory.given(mem) == expected


def test_a_submit_says_where_it_is_less(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1, 1)
    path = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=str(tmp_path / "tars" / "*.tar"),
        output_metadata_dir=str(tmp_path / "out"),
        batch_size=1000,
        slurm={"mem": "1G", "tasks_per_node": 2},
    )
    said = " ".join(d2m("plan", path).stdout.split())
    assert "note: slurm.mem: 1.1 GB; 2 tasks take about 5.8 GB with batch_size 1000" in said
    path.write_text(path.read_text().replace("1G", "6G"))
    assert "slurm.mem" not in d2m("plan", path).stdout
