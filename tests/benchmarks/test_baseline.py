"""Both sides do the same work, and the data is what it says."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from statistics import mean, median

import pytest
import torch

from benchmarks import baseline, data, workload
from benchmarks.captions import captions
from benchmarks.rows.faces import require_same
from d2m_hpc.config import Config
from d2m_hpc.models.preprocessors import PREPROCESSORS


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [path] = data.tars(tmp_path_factory.mktemp("tars"), 1, 5)
    return path


# webdataset leaves the tar to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_baseline_loads_what_we_load(tar: Path, tmp_path: Path) -> None:
    config = Config(**workload.keys([tar], 1, workload.MODELS), resize="exact")
    [ours] = workload.batches(config, tmp_path)
    inputs = list(ours.inputs)
    [theirs] = baseline.loader([tar], 0, 16, inputs, workload.FIELDS)
    assert list(zip(*theirs[-1], strict=True)) == [tuple(v) for v in ours.fields.values()]
    for wanted, value in zip(inputs, theirs, strict=False):
        finished = PREPROCESSORS[baseline.NAMES[wanted[1]]].finish(ours.inputs[wanted])
        if wanted == ("text", "identity"):
            assert value == finished
        else:
            torch.testing.assert_close(value, finished, rtol=0, atol=1e-6)


def test_different_boxes_are_told() -> None:
    box = [0.1, 0.1, 0.2, 0.2]
    assert require_same([[box], []], [[box], []]) == 1
    with pytest.raises(RuntimeError, match="different numbers"):
        require_same([[box], []], [[], [box]])
    with pytest.raises(RuntimeError, match="different boxes"):
        require_same([[box]], [[[0.1, 0.1, 0.2, 0.3]]])


def test_tars_are_made_once(tar: Path) -> None:
    before = os.stat(tar)
    assert data.tars(tar.parents[1], 1, 5) == [tar]
    assert os.stat(tar).st_mtime_ns == before.st_mtime_ns
    with tarfile.open(tar) as archive:
        names = archive.getnames()
    assert names[:3] == ["000000000.jpg", "000000000.json", "000000000.txt"]
    assert len(names) == 15


def test_captions_are_of_web_like_lengths() -> None:
    texts = captions(2000)
    words = [len(text.split()) for text in texts]
    assert texts == captions(2000)
    assert 4 <= median(words) <= 7 < mean(words) < 10
    assert max(words) > 60
    assert 0.1 < mean(not text.isascii() for text in texts) < 0.6
