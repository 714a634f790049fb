"""A bounded number of what `python -m fuzz.tars`, `fuzz.images` and `fuzz.jsons` do by hand."""

from __future__ import annotations

from pathlib import Path

from fuzz import images, jsons, tars

SEED = 20261126


def test_tars_of_every_kind_have_one_outcome_and_lose_no_member(tmp_path: Path) -> None:
    found = tars.run(SEED, 250, tmp_path)
    assert found.faults == []
    assert len(found.kinds) == len(tars.MAKERS)
    assert sum(found.done.values()) > 60
    assert found.rows > 150


def test_whole_samples_of_tars_that_are_cut_are_taken_if_asked_for(tmp_path: Path) -> None:
    found = tars.run(SEED + 1, 120, tmp_path, "--set", "allow_truncated_shards=true")
    assert found.faults == []
    assert found.done["cut"] > 0


def test_pictures_are_decoded_or_rejected_in_bounded_time_and_memory() -> None:
    found = images.run(SEED, 300)
    assert found.faults == []
    assert len(found.figures) == 1


def test_json_values_come_back_as_they_were_and_all_shards_are_one_table(tmp_path: Path) -> None:
    found = jsons.run(SEED, 400, tmp_path)
    assert found.faults == []
    assert found.values > 1000
