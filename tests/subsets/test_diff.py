"""`d2m diff`: rows, columns and values of two runs, compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from kit import STATS, d2m, jpeg, sample, submit, write_config, write_shards, write_tar

import d2m_hpc
from d2m_hpc.errors import ConfigError
from d2m_hpc.subsets import diff


def run(folder: Path, name: str, **more: Any) -> Path:
    values = {**STATS, "input_tars": str(folder / "tars" / "*.tar")}
    values |= {"output_metadata_dir": str(folder / name), **more}
    path = write_config(folder / f"{name}.yml", values)
    ended = submit(path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `one`, the same `again`, and `other` with another text, column and tar."""
    folder = tmp_path_factory.mktemp("diff")
    write_shards(folder / "tars", 2, samples=4)
    run(folder, "one")
    run(folder, "again", batch_size=2)
    members: dict[str, bytes] = {}
    for i in range(3):  # the fourth of the shard is gone, and there is a new one
        members |= sample(f"00000000{i}", seed=i)
    members |= {"000000000.txt": b"four words are here", "000000001.jpg": jpeg(77)}
    members |= sample("x", seed=9)
    write_tar(folder / "others" / "00000.tar", sorted(members.items()))
    write_tar(folder / "others" / "00002.tar", sample("y", seed=10))
    columns = ["image-brightness", "image-phash", "text-words", "text-characters"]
    tars = str(folder / "others" / "*.tar")
    run(folder, "other", postprocess_columns=columns, input_tars=tars, additional_fields=["uid"])
    return folder


def test_equal_runs_are_equal(folder: Path) -> None:
    ended = d2m("diff", folder / "one.yml", folder / "again" / ".d2m", "--features")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    # key is what rows are told by
    assert ended.stdout == "8 rows are in both\n6 of 6 columns are equal\n"
    ended = d2m("diff", folder / "one.yml", folder / "again.yml", "--by", "uid", "--json")
    assert json.loads(ended.stdout)["is_equal"] is True


def test_each_difference_is_told(folder: Path) -> None:
    ended = d2m("diff", folder / "one.yml", folder / "other.yml", "--json")
    assert ended.returncode == 1
    found = json.loads(ended.stdout)
    assert (found["rows"], found["only"]) == (3, [5, 2])
    assert found["some"] == [["00000/000000003", "00001/*"], ["00000/x", "00002/*"]]
    assert found["missing"] == [["caption"], ["text-characters"]]
    shifts = found["shifts"]
    assert {n: s["different"] for n, s in shifts.items()} == {
        "image-brightness": 1,
        "image-phash": 1,
        "text-words": 1,
        "uid": 0,
    }
    assert shifts["text-words"]["quantiles"]["1.0"] == 2
    assert shifts["text-words"]["quantiles"]["0.5"] == 0
    assert shifts["image-phash"]["quantiles"] == {}
    ended = d2m("diff", folder / "one.yml", folder / "other.yml")
    assert ended.returncode == 1
    assert f"5 rows are in {folder}/one.yml alone: 00000/000000003, 00001/*\n" in ended.stdout
    assert "text-words: 1 row differs (33.3%); shifts by quantile: 0% +0," in ended.stdout
    assert "100% +2\n" in ended.stdout
    assert f"columns of {folder}/other.yml alone: text-characters\n" in ended.stdout


def test_small_differences_may_be_equal(folder: Path) -> None:
    one, other = (d2m_hpc.open(folder / f"{name}.yml") for name in ("one", "other"))
    found = one.diff(other, tolerance=2.0, features=True)
    assert found.shifts["text-words"].different == 0
    assert found.shifts["image-brightness"].different == 0
    assert found.shifts["image-histogram"].different == 0
    found = one.diff(other, features=True)
    assert found.shifts["image-histogram"].different == 1
    assert found.shifts["image-histogram"].quantiles[1.0] > 0


def test_mistakes_are_told(folder: Path) -> None:
    ended = d2m("diff", folder / "one.yml", folder / "other.yml", "--by", "caption")
    assert ended.returncode == 2
    assert "--by: 00000.parquet has no column 'caption'" in ended.stderr
    ended = d2m("diff", folder / "one.yml", folder / "none.yml")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    with pytest.raises(ConfigError, match="by: found 5"):
        d2m_hpc.open(folder / "one.yml").diff(d2m_hpc.open(folder / "other.yml"), by=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second", "different", "shifts"),
    [
        (pa.array([1.0, None, float("nan")]), pa.array([1.0, None, float("nan")]), [], [0.0]),
        (pa.array([1.0, None, 2.0]), pa.array([None, 1.0, 2.5]), [0, 1, 2], [0.5]),
        (pa.array([2**60, 2]), pa.array([2**60 + 1, 2]), [0], [0.0, 0.0]),
        (pa.array([1, 2]), pa.array([1.0, 2.5]), [1], [0.0, 0.5]),
        (pa.array([[1.0], []]), pa.array([[1.0], None]), [1], None),
        (pa.array(["a", None]), pa.array(["a", "b"]), [1], None),
        (pa.array(["a"]), np.zeros((1, 2)), [0], None),
        (np.zeros((2, 3)), np.array([[0, 0, 0], [0, -2, 1]]), [1], [0.0, 2.0]),
        (np.zeros((2, 3)), np.zeros((2, 4)), [0, 1], None),
    ],
)
def test_values_are_compared_by_their_kind(
    first: Any, second: Any, different: list[int], shifts: list[float] | None
) -> None:
    differ, found = diff._differ(first, second, 0.0)
    assert np.flatnonzero(differ).tolist() == different
    assert (None if found is None else found.tolist()) == shifts


def test_quantiles_of_many_rows_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "KEPT", 5000)
    shifts, values = diff._Shifts(0), np.random.default_rng(1).normal(size=(40, 1000))
    for part in values:
        shifts.add(part)
        assert shifts._kept.shape[1] <= 5000
    found = shifts.quantiles()
    assert found[0.0] == values.min()
    assert found[1.0] == values.max()
    for share in (0.25, 0.5, 0.75):
        assert abs(found[share] - np.quantile(values, share)) < 0.05
