"""`d2m verify` finds whatever happened to the outputs of a real run."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import STATS, d2m, sample, submit, write_config, write_shards, write_tar

from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest, Outcome
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.records import Record, Recorder
from d2m_hpc.watch.verify import check_shard

ROWS = 5


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `c.yml` and its outputs of two shards in `out`; not to be changed."""
    folder = tmp_path_factory.mktemp("verify")
    write_shards(folder / "tars", 2, ROWS)
    ended = submit(_config(folder))
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    kept = folder / "out" / ".d2m" / "config.yml"
    kept.write_text(kept.read_text().replace(str(finished), str(folder)))
    _config(folder)
    return folder


def _config(folder: Path) -> Path:
    return write_config(
        folder / "c.yml",
        STATS,
        input_tars=str(folder / "tars" / "*.tar"),
        output_metadata_dir=str(folder / "out"),
    )


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def _rewrite_table(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = folder / "00000.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def _rewrite_array(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / "00000.npz"
    with np.load(path) as arrays:
        changed = {name: change(arrays[name]) for name in arrays.files}
    np.savez(path, **changed)


def _nan_in_column(table: pa.Table) -> pa.Table:
    values = table["image-brightness"].to_pylist()
    array = pa.array([float("nan"), *values[1:]], pa.float32())
    return table.set_column(1, "image-brightness", array)


def _nan_in_list(table: pa.Table) -> pa.Table:
    kind = pa.list_(pa.list_(pa.float32()))
    boxes = pa.array([[], [[0.0, float("inf")], []], [], [], []], kind)
    return table.append_column("face-boxes", boxes)


def _nan_in_array(array: Any) -> Any:
    array = array.copy()
    array[1, 1] = np.nan
    return array


def _believe(folder: Path) -> None:
    """Make the newest record of 00000 one that has its files' hashes."""
    run = RunDir(folder / ".d2m")
    known = Manifest.load(run).done["00000"]
    parquet, npz = (folder / f"00000{suffix}" for suffix in (".parquet", ".npz"))
    hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (parquet, npz)]
    newer = Record(
        "00000",
        "done",
        known.rows,
        parquet_sha256=hashes[0],
        npz_sha256=hashes[1],
        attempt=known.attempt + 1,
    )
    Recorder(run.records / "test.jsonl").append(newer)


def _faults(target: Path) -> list[tuple[str, str]]:
    ended = d2m("verify", target, "--json")
    report = json.loads(ended.stdout)
    assert report["checked"] == 2
    assert ended.returncode == (1 if report["faults"] else 0)
    return [(f["file"], f["what"]) for f in report["faults"]]


def test_a_sample_is_drawn_by_its_seed_and_says_what_it_is(run: Path) -> None:
    for path in (run / "out").glob("*.npz"):
        path.unlink()
    drawn = set()
    for seed in range(8):
        ended = d2m("verify", run / "c.yml", "--sample", 1, "--seed", seed, "--json")
        report = json.loads(ended.stdout)
        assert (ended.returncode, report["checked"], report["done"]) == (1, 1, 2)
        [fault] = report["faults"]
        drawn.add(fault["file"])
    assert drawn == {"00000.npz", "00001.npz"}
    twice = [d2m("verify", run / "c.yml", "--sample", 1).stdout for _ in range(2)]
    assert twice[0] == twice[1]
    assert "checked 1 of 2 shards, a random sample, 1 file wrong" in twice[0]


@pytest.mark.parametrize("more", [2, 3])
def test_a_sample_of_all_is_no_sample(more: int, finished: Path) -> None:
    ended = d2m("verify", finished / "c.yml", "--sample", more)
    assert (ended.returncode, ended.stdout) == (0, "2 shards checked, 0 files wrong\n")


def test_a_seed_of_no_sample_is_a_usage_error(finished: Path) -> None:
    ended = d2m("verify", finished / "c.yml", "--seed", 0)
    assert ended.returncode == 2
    assert "--seed: found no --sample, which it is of; valid are both" in ended.stderr


def test_a_sample_of_none_is_a_usage_error(finished: Path) -> None:
    assert d2m("verify", finished / "c.yml", "--sample", 0).returncode == 2


def test_a_clean_run_is_right_by_its_config_and_by_its_folder(finished: Path) -> None:
    for target in (finished / "c.yml", finished / "out" / ".d2m"):
        ended = d2m("verify", target)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout == "2 shards checked, 0 files wrong\n"
    assert _faults(finished / "c.yml") == []


def test_every_fault_is_named_at_once_for_people_too(run: Path) -> None:
    out = run / "out"
    _flip(out / "00000.npz", 300)
    (out / "00001.parquet").unlink()
    ended = d2m("verify", run / "c.yml")
    assert ended.returncode == 1
    assert "00000.npz array 'image-histogram.npy' fails its CRC" in ended.stdout
    assert "00001.parquet is missing" in ended.stdout
    assert "2 shards checked, 2 files wrong" in ended.stdout


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a byte flipped in an npz": (
        lambda out: _flip(out / "00000.npz", -200),
        "00000.npz",
        "has another sha256 than its record",
    ),
    "a byte flipped in a parquet": (
        lambda out: _flip(out / "00000.parquet", 100),
        "00000.parquet",
        "has another sha256 than its record",
    ),
    "a parquet cut short": (
        lambda out: (
            (out / "00000.parquet").write_bytes((out / "00000.parquet").read_bytes()[:-100])
            and None
        ),
        "00000.parquet",
        "cannot be read",
    ),
    "a missing npz": (lambda out: (out / "00000.npz").unlink(), "00000.npz", "is missing"),
    "a missing parquet": (
        lambda out: (out / "00000.parquet").unlink(),
        "00000.parquet",
        "is missing",
    ),
    "a row dropped from the parquet": (
        lambda out: _rewrite_table(out, lambda table: table.slice(1)),
        "00000.parquet",
        "has 4 rows, its record 5",
    ),
    "a row dropped from the npz": (
        lambda out: _rewrite_array(out, lambda array: array[1:]),
        "00000.npz",
        "array 'image-histogram' has 4 rows, its record 5",
    ),
    "an empty file": (
        lambda out: (out / "00000.npz").write_bytes(b"") and None,
        "00000.npz",
        "cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds(damage: str, run: Path) -> None:
    break_it, file, what = DAMAGES[damage]
    break_it(run / "out")
    faults = _faults(run / "out" / ".d2m")
    assert {name for name, _ in faults} == {file}
    assert any(what in said for _, said in faults), faults


VALUES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a NaN in a column": (
        lambda out: _rewrite_table(out, _nan_in_column),
        "00000.parquet",
        "column 'image-brightness' has 1 value that is not finite",
    ),
    "an infinity in a list": (
        lambda out: _rewrite_table(out, _nan_in_list),
        "00000.parquet",
        "column 'face-boxes' has 1 value that is not finite",
    ),
    "a NaN in an array": (
        lambda out: _rewrite_array(out, _nan_in_array),
        "00000.npz",
        "array 'image-histogram' has values that are not finite",
    ),
    "a dropped row": (
        lambda out: _rewrite_table(out, lambda table: table.slice(1)),
        "00000.parquet",
        "has 4 rows, its record 5",
    ),
    "a dropped feature": (
        lambda out: _rewrite_array(out, lambda array: array[1:]),
        "00000.npz",
        "array 'image-histogram' has 4 rows, its record 5",
    ),
}


@pytest.mark.parametrize("damage", VALUES)
def test_the_values_are_checked_even_where_the_hashes_agree(damage: str, run: Path) -> None:
    break_it, file, what = VALUES[damage]
    break_it(run / "out")
    _believe(run / "out")
    assert _check(run / "out") == [(file, what)]


def _check(out: Path, carried: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    record = Manifest.load(RunDir(out / ".d2m")).done["00000"]
    faults = check_shard(OutputDir(str(out)), "00000", record, carried)
    return [(f.file, f.what) for f in faults]


def test_the_users_own_fields_may_be_null_or_not_finite(run: Path) -> None:
    """img2dataset writes NaN into the JSON where its input table has none."""
    out = run / "out"
    values = pa.array([None, float("nan"), 1.5, None, 2.5])
    _rewrite_table(out, lambda table: table.append_column("similarity", values))
    _believe(out)
    assert _check(out, carried=("similarity",)) == []
    assert _check(out) == [("00000.parquet", "column 'similarity' has 1 value that is not finite")]


def test_stray_files_are_named(run: Path) -> None:
    out = run / "out"
    shutil.copy(out / "00000.parquet", out / "99999.parquet")
    shutil.copy(out / "00000.npz", out / "other.npz")
    (out / "notes.txt").write_text("of no concern")
    assert _faults(run / "c.yml") == [
        ("other.npz", "has no record; run d2m-submit again"),
        ("99999.parquet", "has no record; run d2m-submit again"),
    ]


def test_a_folder_in_a_files_place_is_a_fault_and_no_crash(run: Path) -> None:
    path = run / "out" / "00000.npz"
    path.unlink()
    path.mkdir()
    [(file, what)] = _check(run / "out")
    assert file == "00000.npz"
    assert what.startswith("cannot be read: ")


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_flip_of_any_byte_is_found(suffix: str, run: Path) -> None:
    """The libraries that read the files raise many kinds of errors at such."""
    path = run / "out" / f"00000{suffix}"
    whole = path.read_bytes()
    record = Manifest.load(RunDir(run / "out" / ".d2m")).done["00000"]
    output = OutputDir(str(run / "out"))
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
        assert {f.file for f in check_shard(output, "00000", record)} == {path.name}, at


def _submitted(finished: Path, run: Path) -> subprocess.CompletedProcess[str]:
    """A submit over the copy, whose plan names the tars of the run that it is copied from."""
    tars = str(finished / "tars" / "*.tar")
    return submit(
        write_config(run / "c.yml", STATS, input_tars=tars, output_metadata_dir=str(run / "out"))
    )


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_damage_from_before_a_record_was_rebuilt_is_found(
    suffix: str, finished: Path, run: Path
) -> None:
    """The rebuilt record has the hash of the damaged file, which the next submit has read."""
    path = run / "out" / f"00000{suffix}"
    metadata = pq.read_metadata(run / "out" / "00000.parquet")
    column = metadata.row_group(0).column(metadata.schema.names.index("image-phash"))
    end = column.data_page_offset + column.total_compressed_size
    _flip(path, end - 2 if suffix == ".parquet" else 200)
    for record in (run / "out" / ".d2m" / "records").iterdir():
        record.unlink()
    submitted = _submitted(finished, run)
    assert "Traceback" not in submitted.stdout + submitted.stderr
    assert "00000" in Manifest.load(RunDir(run / "out" / ".d2m")).done
    assert path.name in {file for file, _ in _faults(run / "c.yml")}


def test_two_swapped_pairs_are_both_named_with_advice_that_works(finished: Path, run: Path) -> None:
    out = run / "out"
    for suffix in (".npz", ".parquet"):
        one, other = (out / f"0000{i}{suffix}" for i in range(2))
        other.rename(out / "aside")
        one.rename(other)
        (out / "aside").rename(one)
    told = dict(_faults(run / "c.yml"))
    assert len(told) == 4
    names = {file: re.fullmatch(r"is (\S+), under another name; .*", told[file]) for file in told}
    for file in names:
        (out / file).rename(out / f"{file}.aside")
    for file, found in names.items():
        assert found
        (out / f"{file}.aside").rename(out / found[1])
    assert _faults(run / "c.yml") == []


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_cut_at_any_byte_is_found(suffix: str, run: Path) -> None:
    path = run / "out" / f"00000{suffix}"
    whole = path.read_bytes()
    record = Manifest.load(RunDir(run / "out" / ".d2m")).done["00000"]
    output = OutputDir(str(run / "out"))
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        assert {f.file for f in check_shard(output, "00000", record)} == {path.name}, length


def test_a_shard_without_rows_is_right(tmp_path: Path) -> None:
    members = {**sample("a"), "a.jpg": b"no image"}
    write_tar(tmp_path / "tars" / "00000.tar", members)
    config = _config(tmp_path)
    ended = submit(config, "--set", "max_rejected_fraction=1")
    assert ended.returncode == 0, ended.stderr
    assert pq.read_metadata(tmp_path / "out" / "00000.parquet").num_rows == 0
    ended = d2m("verify", config)
    assert (ended.returncode, ended.stdout) == (0, "1 shard checked, 0 files wrong\n")


def test_verify_without_a_run_is_a_usage_error(tmp_path: Path) -> None:
    ended = d2m("verify", tmp_path)
    assert ended.returncode == 2
    assert f"there is no run in {tmp_path}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_missing_file_of_a_record_is_named_without_the_run(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    record = Outcome.of(Record("00000", "done", rows=1).to_dict())
    faults = check_shard(OutputDir(str(tmp_path / "out")), "00000", record)
    assert [(f.file, f.what) for f in faults] == [
        ("00000.parquet", "is missing"),
        ("00000.npz", "is missing"),
    ]
