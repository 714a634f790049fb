from __future__ import annotations

import numpy as np
import pdqhash
import pytest
from bench import run
from kit import photographs
from PIL import Image

from d2m_hpc.errors import ConfigError
from d2m_hpc.models.families import perceptual_hash


def test_hashes_are_those_of_image_stats_and_of_pdqhash() -> None:
    pictures = [*photographs(6), Image.new("RGB", (300, 200), "teal"), Image.new("RGB", (1, 1))]
    columns = ["own-phash", "own-pdq", "own-pdq-quality", "image-phash"]
    models = ["image-stats", {"own": {"kind": "perceptual-hash"}}]
    ours = run({"models": models, "postprocess_columns": columns}, pictures).columns
    assert list(ours["own-phash"]) == list(ours["image-phash"])
    assert len(set(ours["own-phash"][:6])) == 6
    for i, picture in enumerate(pictures):
        bits, quality = pdqhash.compute(np.asarray(picture))
        expected = f"{int(''.join(map(str, bits)), 2):064x}"
        assert (ours["own-pdq"][i], int(ours["own-pdq-quality"][i])) == (expected, quality)


def test_phash_alone_needs_no_pdqhash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual_hash, "find_spec", lambda name: None)
    models = [{"own": {"kind": "perceptual-hash"}}]
    keys = {"models": models, "postprocess_columns": ["own-phash"]}
    assert len(run(keys, photographs(2)).columns["own-phash"]) == 2
    with pytest.raises(ConfigError, match=r"PDQ needs pdqhash, which is not installed; `pip"):
        run({**keys, "postprocess_columns": ["own-pdq"]}, photographs(1))
