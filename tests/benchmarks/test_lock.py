"""What of the loader's work holds the interpreter's lock."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks import data, lock, workload
from d2m_hpc.config import Config


def test_decoding_is_work_without_the_lock_and_texts_are_work_with_it(tmp_path: Path) -> None:
    tars, read = data.tars(tmp_path, 1, 12), os.pread
    config = Config(**workload.keys(tars, 1, workload.CLIP, output_metadata_dir=str(tmp_path)))
    unlocked, locked = lock.seconds(config, rounds=1)
    assert unlocked > 0
    assert locked > 0
    of_fields = config.model_copy(update={"models": [], "postprocess_columns": []})
    assert lock.seconds(of_fields.model_copy(update={"postprocess_features": []}), 1)[0] < unlocked
    assert os.pread is read
