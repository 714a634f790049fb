"""Configs of the seed program (dataset2metadata) run as they are.

`seed/*.yml` are the two of its README; only the paths in them are replaced. Its custom file asks
for "Salesforce/blip2-opt-2.7b", which transformers takes for a folder where there is one.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_blip2
import yaml
from kit import SHARDS, submit

SEED = Path(__file__).parent / "seed"
TARS = "path/to/my/tars/000057{17..19}.tar"
OUTPUT = "path/to/my/ouput/metadata"
PYPATH = "path/to/my/custom.py"


def _run(
    name: str, folder: Path, checkpoints: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One of the configs over a golden shard, on a machine without a GPU."""
    text = (SEED / name).read_text(encoding="utf-8")
    assert TARS in text
    text = text.replace(TARS, str(SHARDS / "0000{0..0}.tar"))
    text = text.replace(OUTPUT, str(folder / "out")).replace(PYPATH, str(SEED / "custom.py"))
    (folder / name).write_text(text, encoding="utf-8")
    ended = submit(
        folder / name,
        "--set",
        "allow_unpublished_weights=true",
        "--set",
        "batch_size=16",
        env={**os.environ, "D2M_WEIGHTS": str(checkpoints), "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder / "out", ended


@pytest.mark.parametrize("name", ["default.yml", "custom.yml"])
def test_a_seed_config_runs_and_its_outputs_have_its_names(
    name: str, tmp_path: Path, checkpoints: Path
) -> None:
    tiny_blip2.save(tmp_path / "Salesforce" / "blip2-opt-2.7b")
    out, ended = _run(name, tmp_path, checkpoints)
    asked = yaml.safe_load((SEED / name).read_text())
    assert sorted(p.name for p in out.glob("[!.]*")) == ["00000.npz", "00000.parquet"]
    table = pq.read_table(out / "00000.parquet")
    columns, fields = asked["postprocess_columns"], asked["additional_fields"]
    assert table.column_names == ["key", *columns, *fields]
    assert table.num_rows == 35
    assert all(table[name].null_count == 0 for name in columns)
    for score in (c for c in columns if c.endswith("-score")):
        assert table.schema.field(score).type == pa.float32()
    with np.load(out / "00000.npz") as arrays:
        assert arrays.files == asked["postprocess_features"]
        assert {len(arrays[name]) for name in arrays.files} == {35}
    assert "no CUDA device here; running on the CPU" in ended.stdout
    if "blip2-cap" in columns:
        assert table["blip2-cap"].type == pa.string()
        assert len(set(table["blip2-cap"].to_pylist())) > 10
        assert "instantiated blip2 on cpu" in ended.stdout
