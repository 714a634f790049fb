"""A pair of files: its record, its values, and what is wrong with it."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import put

from d2m_hpc.errors import D2MError, ShardError
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import BLOCK, METADATA, Pair
from d2m_hpc.run.records import Record, Rejection
from d2m_hpc.storage import stores

RECORD = Record("s", "done", 2, [Rejection("k\udce9", "nö")], fingerprint="f", finished=1.5)


def parquet(note: bytes | None) -> bytes:
    table = pa.table({"key": ["a", "b"]})
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({METADATA: note} if note else None), sink)
    return bytes(sink.getvalue())


def npz(rows: int) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, **{name: np.ones((rows, 3), np.float16) for name in "fg"})
    return sink.getvalue()


def whole(output: OutputDir) -> Record:
    """A pair of two rows; returns its record."""
    archive = npz(2)
    record = replace(RECORD, npz_sha256=hashlib.sha256(archive).hexdigest())
    table = parquet(json.dumps(record.to_dict()).encode())
    put(output, "s.npz", archive)
    put(output, "s.parquet", table)
    return replace(record, parquet_sha256=hashlib.sha256(table).hexdigest())


def test_no_parquet_has_no_record(output: OutputDir) -> None:
    assert Pair(output, "s").record() is None


def test_the_record_of_a_parquet_is_read_back(output: OutputDir) -> None:
    note = json.dumps({**RECORD.to_dict(), "versions": {"torch": "2"}}).encode()
    put(output, "s.parquet", parquet(note))
    assert Pair(output, "s").record() == RECORD


OTHERS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "no parquet": lambda: b"x" * 1000,
    "cut": lambda: parquet(json.dumps(RECORD.to_dict()).encode())[:-20],
    "footer broken": lambda: parquet(b"{}")[:-60] + b"\xff" * 52 + parquet(b"{}")[-8:],
    "someone else's": lambda: parquet(None),
    "note is no JSON": lambda: parquet(b"{"),
    "note is a list": lambda: parquet(b"[1]"),
    "note is null": lambda: parquet(b"null"),
    "note lacks a state": lambda: parquet(b'{"shard": "s"}'),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_parquet_that_is_not_ours_has_no_record(output: OutputDir, kind: str) -> None:
    put(output, "s.parquet", OTHERS[kind]())
    assert Pair(output, "s").record() is None


def test_a_parquet_that_cannot_be_read_is_no_missing_one(
    output: OutputDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shard would be computed again, or its folder taken for another program's."""

    def silent(*_: object, **options: object) -> bytes:
        raise TimeoutError("no answer from the store")

    monkeypatch.setattr(output.fs, "cat_file", silent)
    monkeypatch.setattr(OutputDir, "open", silent)  # as one on a disk is read
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.0)
    with pytest.raises(D2MError, match=r"s\.parquet cannot be read: .*no answer .* run the same"):
        Pair(output, "s").record()


def test_a_folder_in_a_parquets_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "s.parquet").mkdir()
    with pytest.raises(D2MError, match="Is a directory"):
        Pair(OutputDir(str(tmp_path)), "s").record()


def test_a_record_longer_than_any_guess_is_read(output: OutputDir) -> None:
    """Thousands of rejections are megabytes of metadata."""
    record = Record("s", "done", 2, [Rejection(f"{i:09d}", "x" * 90) for i in range(20_000)])
    put(output, "s.parquet", parquet(json.dumps(record.to_dict()).encode()))
    assert Pair(output, "s").record() == record


def test_a_whole_pair_is_read_wherever_it_lies(output: OutputDir) -> None:
    record, pair = whole(output), Pair(output, "s")
    assert pair.problems(".npz", record) == pair.problems(".parquet", record) == []
    assert pair.lengths() == {2}
    assert pair.restored(RECORD) == replace(
        RECORD, parquet_sha256=record.parquet_sha256, rebuilt=True
    )
    assert pair.table(["key", "of a later config"]).to_pydict() == {"key": ["a", "b"]}
    assert [*pair.features()] == ["f", "g"]
    held = pair.contents()
    assert (held.record.npz_sha256, held.table.num_rows) == (record.npz_sha256, 2)
    assert held.features["g"].shape == (2, 3)


def test_a_pair_of_two_attempts_is_not_taken_for_one(output: OutputDir) -> None:
    record, pair = whole(output), Pair(output, "s")
    put(output, "s.npz", npz(3))
    with pytest.raises(ShardError, match=r"the npz has the sha256 .*delete s\.parquet"):
        pair.contents()
    assert pair.lengths() == {2, 3}
    first, *others, last = pair.problems(".npz", record)
    assert first == "array 'f' has 3 rows, its record 2"
    assert (len(others), last[:34]) == (1, "has another sha256 than its record")
    [told] = pair.problems(".npz", record, owner=lambda sha256: "t.npz")
    assert told == "is t.npz, under another name; rename it back"


def test_arrays_of_all_forms_are_read_with_their_crc(tmp_path: Path) -> None:
    arrays = {
        "flat": np.arange(3, dtype=np.float32),
        "deep": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "structured": np.ones(2, np.dtype("u8,u8")),
        "none": np.zeros((0, 5), np.float16),
        "one": np.array(2.5),
    }
    for save, mapped in product((np.savez, np.savez_compressed), (False, True)):
        save(tmp_path / "s.npz", **arrays)
        found = Pair(OutputDir(str(tmp_path)), "s").features(mapped=mapped)
        assert found.keys() == arrays.keys()
        maps = {name for name, array in found.items() if isinstance(array, np.memmap)}
        is_stored = save is np.savez
        assert maps == ({"flat", "deep", "structured", "one"} if mapped and is_stored else set())
        for name, array in arrays.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert (found[name] == array).all()
        by_blocks = Pair(OutputDir(str(tmp_path)), "s").values(arrays)
        for array, values in zip(arrays.values(), by_blocks, strict=True):
            assert (values.dtype, values.shape) == (array.dtype, array.shape)
            assert b"".join(map(bytes, values.blocks)) == array.tobytes()
    np.savez(tmp_path / "s.npz", deep=arrays["deep"])
    data = bytearray((tmp_path / "s.npz").read_bytes())
    data[data.index(arrays["deep"].tobytes()) + 7] ^= 1
    (tmp_path / "s.npz").write_bytes(data)
    with pytest.raises(zipfile.BadZipFile, match=r"Bad CRC-32 for file 'deep.npy'"):
        Pair(OutputDir(str(tmp_path)), "s").features(["deep"])
    assert Pair(OutputDir(str(tmp_path)), "s").features(["deep"], mapped=True)  # nothing is read
    with pytest.raises(KeyError, match="wide is not a file in the archive"):
        Pair(OutputDir(str(tmp_path)), "s").features(["wide"])


def test_the_crc_of_blocks_is_that_of_all_of_them(tmp_path: Path) -> None:
    array = np.arange(BLOCK // 2, dtype=np.uint32)
    np.savez(tmp_path / "s.npz", f=array, g=array)
    whole, pair = (tmp_path / "s.npz").read_bytes(), Pair(OutputDir(str(tmp_path)), "s")
    place = whole.index(array.tobytes())
    assert [len(b) for v in pair.values(["f"]) for b in v.blocks] == [BLOCK] * 2
    for at in (0, BLOCK - 1, BLOCK, array.nbytes - 1):
        data = bytearray(whole)
        data[place + at] ^= 1
        (tmp_path / "s.npz").write_bytes(data)
        first, second = pair.values(["f"]), pair.values(["g"])
        with pytest.raises(zipfile.BadZipFile, match=r"Bad CRC-32 for file 'f.npy'"):
            [*next(first).blocks]
        assert len([*next(second).blocks]) == 2
    with pytest.raises(KeyError, match="wide is not a file in the archive"):
        next(pair.values(["wide"]))


def test_a_map_reads_no_bytes_beyond_its_file(tmp_path: Path) -> None:
    """The archive's directory and the array's header may promise more than the file has."""
    np.savez(tmp_path / "s.npz", f=np.zeros((4, 2), np.float16))
    whole = (tmp_path / "s.npz").read_bytes()
    pair = Pair(OutputDir(str(tmp_path)), "s")
    longer, other = whole.replace(b"(4, 2)", b"(9, 9)"), whole.replace(b"PK\3\4", b"PK77")
    for data in (whole[:-30], longer, other):
        (tmp_path / "s.npz").write_bytes(data)
        with pytest.raises((zipfile.BadZipFile, ValueError)):
            pair.features(["f"], mapped=True)
