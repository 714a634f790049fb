"""The GPU benchmark runs to its end with small nets and says all that it is to say."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import DATACOMP

from benchmarks import gpu, gpu_data
from benchmarks.gpu_parts import Bench
from benchmarks.gpu_roofline import Ceiling, Counting
from d2m_hpc.models.scrfd import ScrfdNet

ROOT = Path(__file__).parents[2]
IMAGE_MODELS = {
    "oai-clip-vit-b32",
    "oai-clip-vit-l14",
    "faces-scrfd10g",
    "dedup-isc-ft-v107",
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    parts = ["--parts", "models,graph,compiled,tar,conventional"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--seconds", "0.05", *parts]
    subprocess.run([*command, "--json", str(path)], cwd=ROOT, check=True, capture_output=True)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _rows(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["part"] == part]


def test_every_model_is_there_as_it_is_and_the_image_nets_compiled(result: dict[str, Any]) -> None:
    found = {(row["name"], row["mode"]) for row in _rows(result, "model")}
    expected = {(name, "recorded") for name in DATACOMP["models"]}
    assert found == expected | {(name, "compiled and recorded") for name in IMAGE_MODELS}
    assert [row["name"] for row in _rows(result, "graph")] == ["6 models"] * 3
    modes = {"kernel by kernel", "recorded", "compiled and recorded"}
    assert {row["mode"] for row in _rows(result, "graph")} == modes


def test_all_figures_are_positive_and_agree(result: dict[str, Any]) -> None:
    [device] = _rows(result, "device")
    assert device["bandwidth_tb"] > 0
    for row in result["rows"]:
        if row["part"] not in ("device", "tests"):
            assert row["samples_per_second"] > 0
            assert math.isfinite(row["samples_per_second"])
    for row in (*_rows(result, "model"), *_rows(result, "graph")):
        tflops = row["samples_per_second"] * row["gflop_per_sample"] / 1e3
        assert row["tflops"] == pytest.approx(tflops)
        assert row["share"] == pytest.approx(tflops / device["tflops"])
        assert row["of_roofline"] == pytest.approx(row["samples_per_second"] / row["roofline"])
        assert row["share"] > 0
        assert row["mb_per_sample"] > 0
    alone = [r["gflop_per_sample"] for r in _rows(result, "model") if r["mode"] == "recorded"]
    for row in _rows(result, "graph"):
        assert row["gflop_per_sample"] == pytest.approx(sum(alone))


def test_tars_become_files_at_every_number_of_threads(result: dict[str, Any]) -> None:
    found = _rows(result, "tar to files")
    assert [row["threads"] for row in found] == [16, 8, 4]
    assert len({row["rows"] for row in found}) == 1
    for row in found:
        assert row["rows"] > 0
        assert 0 <= row["idle"] <= 1
        assert row["waits"].keys() == {"loader", "device", "writer", "host"}
        assert row["limit"] == max(row["waits"], key=lambda who: row["waits"][who])
        assert sum(row["waits"].values()) == pytest.approx(row["seconds"])


def test_the_conventional_loop_stands_beside_it(result: dict[str, Any]) -> None:
    [row] = _rows(result, "conventional loop")
    assert row["rows"] > 0
    assert {"machine", "command", "date", "batch_size"} <= result.keys()


def test_the_tests_that_need_a_device_are_run_and_counted(tmp_path: Path) -> None:
    bench = Bench(torch.device("cpu"), True, 0.05, 4, tmp_path)
    [row] = gpu.PARTS["tests"][0](bench)
    assert row["failed"] == []
    assert row["passed"] + row["skipped"] > 5


def test_a_part_that_fails_or_hangs_is_told_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    report = gpu.Report(path)
    report.write({"rows": []})
    slow = gpu.PARTS["tests"][0], 0.001  # minutes
    monkeypatch.setitem(gpu.PARTS, "tests", slow)
    monkeypatch.setattr(sys, "argv", ["gpu"])  # no --tiny: without a device each part says so
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    given = argparse.Namespace(folder=tmp_path, json=path)
    assert not gpu.run_parts(["tests", "graph"], given, report)
    assert [row["name"] for row in report.rows] == ["over its 0.001 minutes", "exit code 1"]


def test_operations_are_counted_by_arithmetic_and_by_bytes() -> None:
    ceiling = Ceiling(flops=1e12, bandwidth=1e9)
    a, b = torch.rand(64, 32), torch.rand(32, 16)
    with Counting(ceiling, torch.device("cpu")) as cost:
        made = a @ b
        made.t()  # moves nothing
        made.add_(1)
        made.expand(3, 64, 16) + torch.zeros(())
    product = 4 * (64 * 32 + 32 * 16 + 64 * 16)
    added = 4 * (2 * 64 * 16)
    repeated = 4 * (64 * 16 + 1 + 3 * 64 * 16) + 4  # `zeros` writes 4 bytes
    assert cost.flops == 2 * 64 * 32 * 16
    assert cost.bytes == product + added + repeated
    assert cost.seconds == pytest.approx(cost.bytes / 1e9)


def test_full_size_faces_have_about_five_likely_anchors_an_image() -> None:
    net = ScrfdNet()
    net.load_state_dict(gpu_data._scrfd())
    torch.manual_seed(1)
    with torch.inference_mode():
        levels = net.eval()(torch.rand(8, 3, 224, 224) * 2 - 1)
    likely = sum(int((scores.sigmoid() > 0.3).sum()) for scores, _ in levels)
    assert 1 <= likely / 8 <= 20
