"""Columns added later: what comes out is what a run with all of them would have made."""

from __future__ import annotations

import json
import logging
import os
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import (
    DATACOMP,
    EXPECTED,
    SHARDS,
    STATS,
    custom_file,
    jpeg,
    sample,
    write_config,
    write_shards,
    write_tar,
)
from test_resume import fork, leftovers

from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError
from d2m_hpc.launch.flow import commit, repair, submit, submitting
from d2m_hpc.launch.local import ThisProcess
from d2m_hpc.plan import balance as chunking
from d2m_hpc.plan.decide import Decision, decide
from d2m_hpc.plan.workload import Workload, inspect
from d2m_hpc.run.attempts import Attempt, Attempts
from d2m_hpc.run.manifest import Manifest, all_values
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import Record
from d2m_hpc.run.tasks import Progress
from d2m_hpc.watch.status import summarise
from d2m_hpc.watch.verify import verify
from d2m_hpc.worker.compute.graph import Graph
from d2m_hpc.worker.read import decode
from d2m_hpc.worker.task import run_task

TEXT: dict[str, Any] = {
    **STATS,
    "models": ["text-stats"],
    "postprocess_columns": ["text-words"],
    "postprocess_features": [],
    "additional_fields": ["uid"],
    "max_rejected_fraction": 1.0,
}
MORE: dict[str, Any] = {
    "models": ["image-stats", "text-stats"],
    "postprocess_columns": ["image-brightness", "text-words", "image-phash", "text-characters"],
    "postprocess_features": ["image-histogram"],
    "additional_fields": ["caption", "uid", "original_width"],
}


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a task changes of its process, which usually is its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    package = logging.getLogger("d2m_hpc")
    level = package.level
    yield
    package.setLevel(level)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many images were decoded, and on how many rows each model ran, since the last look."""
    counts: dict[str, int] = {}
    image, run = decode.image, Graph._run

    def counted_image(*arguments: Any) -> Any:
        counts["images"] = counts.get("images", 0) + 1
        return image(*arguments)

    def counted_run(graph: Graph, name: str, arguments: list[Any], dtype: Any) -> Any:
        counts[name] = counts.get(name, 0) + len(arguments[0])
        return run(graph, name, arguments, dtype)

    monkeypatch.setattr(decode, "image", counted_image)
    monkeypatch.setattr(Graph, "_run", counted_run)
    return counts


def workload(folder: Path, out: str, values: dict[str, Any], **more: Any) -> Workload:
    """Of the tars in `folder/tars`, with its outputs in `folder/out`."""
    common = {
        "input_tars": str(folder / "tars" / "*.tar"),
        "output_metadata_dir": str(folder / out),
    }
    path = write_config(folder / "c.yml", {**values, **common, **more})
    return inspect(configs.load(path), str(path))


def run(asked: Workload) -> Decision:
    """Do all that is left of it, in this process; what was decided."""
    return submit(asked, ThisProcess())


def output(asked: Workload) -> Path:
    return Path(asked.config.output_metadata_dir)


def record_of(out: Path, stem: str) -> Record:
    record = Pair(OutputDir(str(out)), stem).record()
    assert record is not None
    return record


def assert_same(out: Path, want: Path) -> None:
    """Names, order, types and values of all columns and arrays, and who was rejected."""
    stems = sorted(p.stem for p in want.glob("*.parquet"))
    assert stems == sorted(p.stem for p in out.glob("*.parquet"))
    assert stems
    for stem in stems:
        tables = [pq.read_table(folder / f"{stem}.parquet") for folder in (out, want)]
        assert tables[0].schema.equals(tables[1].schema)
        assert tables[0].equals(tables[1])
        with np.load(out / f"{stem}.npz") as got, np.load(want / f"{stem}.npz") as wanted:
            assert got.files == wanted.files
            for name in got.files:
                assert got[name].dtype == wanted[name].dtype
                assert got[name].tobytes() == wanted[name].tobytes()
        records = [record_of(folder, stem) for folder in (out, want)]
        assert records[0].rows == records[1].rows == tables[0].num_rows
        assert records[0].fingerprint == records[1].fingerprint
        assert sorted(records[0].rejections) == sorted(records[1].rejections)


def odd_tars(folder: Path) -> None:
    """Good shards; samples that only one of the models can read; repeated keys; nothing at all."""
    write_shards(folder / "tars", 2, samples=40)
    no_image = {**sample("b", 1), "b.jpg": b"no image"}
    no_text = {**sample("c", 2), "c.txt": b"\xff"}
    no_json = {k: v for k, v in sample("d", 3).items() if k != "d.json"}
    odd = {**sample("a"), **no_image, **no_text, **no_json, **sample("e", 4), "f.jpg": jpeg()}
    odd["no extension"] = b""
    write_tar(folder / "tars" / "odd.tar", odd)
    twice = [*sample("x", 5).items(), *sample("y", 6).items(), *sample("x", 7).items()]
    write_tar(folder / "tars" / "twice.tar", twice)
    write_tar(folder / "tars" / "empty.tar", {})


@pytest.mark.parametrize("datacomp", [False, True], ids=["plain", "datacomp"])
def test_an_extended_pair_is_what_a_full_run_makes(datacomp: bool, tmp_path: Path) -> None:
    odd_tars(tmp_path)
    keys = {"use_datacomp_keys": datacomp, "batch_size": 7}
    run(workload(tmp_path, "out", TEXT, **keys))
    before = {p.stem: record_of(tmp_path / "out", p.stem) for p in (tmp_path / "out").glob("*.npz")}
    decided = run(workload(tmp_path, "out", {**TEXT, **MORE}, **keys))
    assert (len(decided.done), len(decided.pending), len(decided.extends)) == (0, 5, 5)
    run(full := workload(tmp_path, "full", {**TEXT, **MORE}, **keys))
    assert_same(tmp_path / "out", tmp_path / "full")
    rows = {"00000": 40, "00001": 40, "empty": 0, "twice": 3, "odd": 3}
    assert {stem: record.rows for stem, record in before.items()} == rows
    assert record_of(tmp_path / "out", "odd").rows == 2
    assert verify(full.run, full.config).faults == []
    asked = workload(tmp_path, "out", {**TEXT, **MORE}, **keys)
    assert verify(asked.run, asked.config).faults == []
    assert len(decide(asked).done) == 5
    summary = summarise(asked.run, asked.config)
    assert (summary.done, summary.outdated, summary.rows) == (5, 0, 85)


def test_old_columns_of_the_six_models_stay_to_the_bit(
    tmp_path: Path, checkpoints: Path, computed: dict[str, int]
) -> None:
    with tarfile.open(SHARDS / "odd.tar") as tar:
        members = {member.name: tar.extractfile(member) for member in tar.getmembers()[:24]}
        read = {name: file.read() for name, file in members.items() if file}
    write_tar(tmp_path / "tars" / "odd.tar", read)
    common = {"weights_dir": str(checkpoints), "allow_unpublished_weights": True}
    common |= {"resize": "exact", "batch_size": 32}
    some = {
        **DATACOMP,
        "models": ["oai-clip-vit-b32", "oai-clip-vit-l14"],
        "postprocess_columns": ["oai-clip-vit-b32-score"],
        "postprocess_features": ["oai-clip-vit-l14-text", "oai-clip-vit-b32-image"],
        "additional_fields": ["uid"],
    }
    run(workload(tmp_path, "out", some, **common))
    old = pq.read_table(tmp_path / "out" / "odd.parquet")
    with np.load(tmp_path / "out" / "odd.npz") as arrays:
        old_arrays = {name: arrays[name].tobytes() for name in arrays.files}
    computed.clear()
    run(workload(tmp_path, "out", DATACOMP, **common))
    # L/14 again, for the NSFW model takes its float32 output; B/32 for its text's embedding.
    assert computed.keys() - {"images"} == set(DATACOMP["models"])
    table = pq.read_table(tmp_path / "out" / "odd.parquet")
    assert table.column_names == [
        "key",
        *DATACOMP["postprocess_columns"],
        *DATACOMP["additional_fields"],
    ]
    assert table.select(old.column_names).equals(old.replace_schema_metadata(None))
    with np.load(tmp_path / "out" / "odd.npz") as arrays:
        assert arrays.files == DATACOMP["postprocess_features"]
        assert {name: arrays[name].tobytes() for name in old_arrays} == old_arrays
    reference = pq.read_table(EXPECTED / "odd.parquet").slice(0, 8)
    assert table["uid"].to_pylist() == reference["uid"].to_pylist()
    for name in set(DATACOMP["postprocess_columns"]) - {"face-boxes"}:
        assert np.abs(table[name].to_numpy() - reference[name].to_numpy()).max() < 1e-4


def test_only_what_is_new_is_computed(tmp_path: Path, computed: dict[str, int]) -> None:
    write_shards(tmp_path / "tars", 2)
    values = {**TEXT, "models": ["text-stats", "image-stats"], "postprocess_features": []}
    steps: list[tuple[dict[str, Any], dict[str, int]]] = [
        ({}, {"images": 10, "image-stats": 10, "text-stats": 10}),
        ({"additional_fields": ["uid", "caption"]}, {}),
        ({"postprocess_columns": ["text-words", "text-characters"]}, {"text-stats": 10}),
        ({"postprocess_features": ["image-histogram"]}, {"images": 10, "image-stats": 10}),
        ({"postprocess_columns": ["text-characters", "text-words"]}, {}),
        ({}, {}),
    ]
    for more, expected in steps:
        computed.clear()
        values |= more
        run(workload(tmp_path, "out", values))
        assert computed == expected
    run(workload(tmp_path, "full", values))
    assert_same(tmp_path / "out", tmp_path / "full")


ODD_FIELDS: list[dict[str, Any]] = [
    {"boxes": [[0.5, 1.0]], "exif": {"iso": 100, "by": [1]}, "mixed": 1, "none": None},
    {"boxes": [], "exif": {"iso": None, "by": []}, "mixed": "one", "none": None},
    {"boxes": None, "exif": None, "mixed": None, "none": None},
]


def test_models_in_another_order_are_the_same_run(tmp_path: Path) -> None:
    """Also once a model is added between them: nothing is to do for the same models again."""
    write_shards(tmp_path / "tars", 1)
    stats, more = ["text-stats", "image-stats"], ["text-stats", "language-lid176", "image-stats"]
    for models, todo in ((stats, 1), (stats[::-1], 0), (more, 1), (more[::-1], 0)):
        asked = workload(tmp_path, "out", MORE, models=models)
        assert len(decide(asked).pending) == todo
        run(asked)
        assert summarise(asked.run, asked.config).done == 1


def odd_fields(images: list[bytes]) -> dict[str, bytes]:
    """The members of three samples with lists, objects, mixtures and nulls in their JSON."""
    members: dict[str, bytes] = {}
    for i, (image, values) in enumerate(zip(images, ODD_FIELDS, strict=True)):
        text = json.dumps(values).encode()
        members |= {**sample(f"{i}", i), f"{i}.json": text, f"{i}.jpg": image}
    return members


def test_kept_columns_of_any_type_stay_as_they_are(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "00000.tar", odd_fields([jpeg(i) for i in range(3)]))
    run(workload(tmp_path, "out", TEXT, additional_fields=[*ODD_FIELDS[0]]))
    more = {**TEXT, **MORE, "additional_fields": [*ODD_FIELDS[0], "caption"]}
    more["allow_missing_fields"] = True  # these samples have no caption
    run(workload(tmp_path, "out", more))
    run(workload(tmp_path, "full", more))
    assert_same(tmp_path / "out", tmp_path / "full")


def test_kept_columns_keep_their_types_where_no_row_is_left(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "00000.tar", odd_fields([b"no image"] * 3))
    run(workload(tmp_path, "out", TEXT, additional_fields=[*ODD_FIELDS[0]]))
    before = pq.read_table(tmp_path / "out" / "00000.parquet")
    asked = workload(tmp_path, "out", {**TEXT, **MORE, "additional_fields": [*ODD_FIELDS[0]]})
    run(asked)
    after = pq.read_table(tmp_path / "out" / "00000.parquet")
    assert (before.num_rows, after.num_rows) == (3, 0)
    assert [after.schema.field(name).type for name in before.column_names] == before.schema.types
    assert verify(asked.run, asked.config).faults == []


def test_new_tars_are_computed_whole_beside_extended_ones(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 2)
    run(workload(tmp_path, "out", TEXT))
    write_shards(tmp_path / "tars", 4)
    seen: list[Progress] = []
    asked = workload(tmp_path, "out", {**TEXT, **MORE})
    submit(asked, ThisProcess(lambda shards: nullcontext(seen.append)))
    assert [(p.done, p.failed, p.rows) for p in seen][-1] == (4, 0, 20)
    run(workload(tmp_path, "full", {**TEXT, **MORE}))
    assert_same(tmp_path / "out", tmp_path / "full")


def test_a_failed_extension_leaves_the_old_pair_and_is_tried_again(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 2)
    run(workload(tmp_path, "out", TEXT))
    tar = tmp_path / "tars" / "00001.tar"
    tar.rename(tmp_path / "away")
    before = (tmp_path / "out" / "00001.parquet").read_bytes()
    run(asked := workload(tmp_path, "out", {**TEXT, **MORE}))
    summary = summarise(asked.run, asked.config)
    assert (summary.done, summary.failed, summary.outdated) == (1, 1, 1)
    assert summary.state == "failed"
    assert (tmp_path / "out" / "00001.parquet").read_bytes() == before
    (tmp_path / "away").rename(tar)
    decided = run(workload(tmp_path, "out", {**TEXT, **MORE}))
    assert (len(decided.done), len(decided.pending)) == (1, 1)
    run(workload(tmp_path, "full", {**TEXT, **MORE}))
    assert_same(tmp_path / "out", tmp_path / "full")


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_damaged_pair_is_not_built_upon(suffix: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1, samples=40)
    run(workload(tmp_path, "out", {**TEXT, **MORE}, additional_fields=["uid"]))
    path = tmp_path / "out" / f"00000{suffix}"
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(data)
    asked = workload(tmp_path, "out", {**TEXT, **MORE})
    run(asked)
    [failed] = Manifest.load(asked.run).failures["00000"]
    assert "this finished pair cannot be extended" in failed.error
    assert "delete 00000.parquet to have the shard computed whole" in failed.error
    assert path.read_bytes() == data
    (tmp_path / "out" / "00000.parquet").unlink()
    run(asked)
    run(workload(tmp_path, "full", {**TEXT, **MORE}))
    assert_same(tmp_path / "out", tmp_path / "full")


def test_samples_of_one_key_that_cannot_be_told_apart_are_not_guessed(tmp_path: Path) -> None:
    """One of two has no image; the old pair has both, and the new columns are of the other."""
    first = {k: v for k, v in sample("x", 1).items() if k != "x.jpg"}
    write_tar(tmp_path / "tars" / "00000.tar", [*first.items(), *sample("x", 2).items()])
    run(workload(tmp_path, "out", TEXT))
    run(asked := workload(tmp_path, "out", {**TEXT, **MORE}))
    [failed] = Manifest.load(asked.run).failures["00000"]
    assert "2 samples have the key 'x' and some are rejected" in failed.error


def test_a_tar_that_changed_since_is_not_merged_with_what_it_was(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    run(workload(tmp_path, "out", TEXT))
    write_tar(tmp_path / "tars" / "00000.tar", {**sample("000000000"), **sample("other")})
    asked = workload(tmp_path, "out", {**TEXT, **MORE})
    run(asked)
    [failed] = Manifest.load(asked.run).failures["00000"]
    assert "the tar has other samples than when its finished pair was made" in failed.error


def test_odd_members_count_by_what_is_computed_and_stop_no_extension(tmp_path: Path) -> None:
    """For words, `clip` lacks a text, and for pictures it lacks pictures: other members count."""
    odd = {f"clip.{i}.jpg": b"" for i in range(3)}
    odd |= {"clip.txt": b"words", "clip.json": b'{"uid": "1", "caption": "words"}'}
    good = [member for i in range(40) for member in sample(f"{i:03d}", i).items()]
    write_tar(tmp_path / "tars" / "00000.tar", [*good, *odd.items(), ("README", b"")])
    run(workload(tmp_path, "out", TEXT))
    first = record_of(tmp_path / "out", "00000")
    assert (first.rows, first.rejections) == (41, [])
    assert first.notices == ["foreign members are not read: README"]
    run(workload(tmp_path, "out", {**TEXT, **MORE}))
    record = record_of(tmp_path / "out", "00000")
    assert (record.state, record.rows) == ("done", 40)
    assert {r.key for r in record.rejections} == {"clip", "clip.1.jpg", "clip.2.jpg"}
    run(workload(tmp_path, "full", {**TEXT, **MORE}))
    assert_same(tmp_path / "out", tmp_path / "full")


def test_rejections_of_both_count_towards_the_limit(tmp_path: Path) -> None:
    odd_tars(tmp_path)
    run(workload(tmp_path, "out", TEXT))
    asked = workload(tmp_path, "out", {**TEXT, **MORE}, max_rejected_fraction=0.5)
    run(asked)
    [failed] = Manifest.load(asked.run).failures["odd"]
    assert "5 of 7 samples are rejected, over max_rejected_fraction (0.5)" in failed.error


def planned(asked: Workload) -> str:
    """Commit what is left of it; the submission's name."""
    with submitting(asked):
        decision = decide(asked)
        repair(decision)
        return commit(decision, chunking.groups(decision.pending)).name


def test_a_task_leaves_alone_what_is_not_as_it_was_at_the_submit(tmp_path: Path) -> None:
    """One pair is gone, one has been extended by a later config."""
    write_shards(tmp_path / "tars", 3)
    run(workload(tmp_path, "out", TEXT))
    asked = workload(tmp_path, "out", TEXT, additional_fields=["uid", "caption"])
    submission = planned(asked)
    (tmp_path / "out" / "00000.parquet").unlink()
    # The last shard only, by a config that has still more.
    later = workload(tmp_path, "out", {**TEXT, **MORE}, input_tars=str(tmp_path / "tars/00002.tar"))
    with submitting(later):
        decision = decide(later)
        [last] = [s for s in decision.pending if s.stem == "00002"]
        name = commit(decision, [[last]]).name
    run_task(later.run.root, name, 0)
    run_task(asked.run.root, submission, 0)
    found = {p.stem: record_of(tmp_path / "out", p.stem) for p in (tmp_path / "out").glob("*.p*")}
    assert {stem: r.fingerprint for stem, r in found.items()} == {
        "00001": asked.fingerprint_id,
        "00002": later.fingerprint_id,
    }
    assert Manifest.load(asked.run).failures == {}
    with pytest.raises(ConfigError, match="'image-stats' is no longer listed"):
        decide(asked)
    decided = run(workload(tmp_path, "out", {**TEXT, **MORE}))
    assert sorted((s.stem, bool(s.extends)) for s in decided.pending) == [
        ("00000", False),
        ("00001", True),
    ]
    run(workload(tmp_path, "full", {**TEXT, **MORE}))
    assert_same(tmp_path / "out", tmp_path / "full")


def test_a_record_that_was_lost_is_put_back_by_the_next_task(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 2)
    run(workload(tmp_path, "out", TEXT))
    asked = workload(tmp_path, "out", {**TEXT, **MORE})
    run(asked)
    (asked.run.records / "001-0-0.jsonl").unlink()  # as if it was killed before it wrote
    assert {(f.file, f.what) for f in verify(asked.run, asked.config).faults} == {
        (f"{stem}.parquet", "has replaced the pair that its record tells of; run d2m-submit again")
        for stem in ("00000", "00001")
    }
    decided = run(asked)
    assert len(decided.pending) == 2
    assert verify(asked.run, asked.config).faults == []
    assert decide(asked).pending == []
    rebuilt = [v for v in all_values(asked.run) if v.get("rebuilt")]
    assert len(rebuilt) == 2


def test_two_tasks_share_the_shards_of_one_base_only(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 2)
    run(workload(tmp_path, "out", TEXT))
    write_shards(tmp_path / "tars", 4)
    asked = workload(tmp_path, "out", {**TEXT, **MORE})
    with submitting(asked):
        decision = decide(asked)
        old, new = chunking.groups(decision.pending)
        submission = commit(decision, [[old[0]], [old[1]], [new[0]], [new[1]]]).name
    ended = [run_task(asked.run.root, submission, i) for i in (1, 3, 0, 2)]
    assert [(p.done, p.shards) for p in ended] == [(2, 2), (2, 2), (1, 1), (1, 1)]
    run(workload(tmp_path, "full", {**TEXT, **MORE}))
    assert_same(tmp_path / "out", tmp_path / "full")


def test_outputs_on_a_store_are_extended(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 2)
    out = f"memory://backfill-{os.getpid()}/out"
    state = {"output_metadata_dir": out, "run_dir": str(tmp_path / "run")}
    run(workload(tmp_path, "", TEXT, **state))
    asked = workload(tmp_path, "", {**TEXT, **MORE}, **state)
    assert len(run(asked).extends) == 2
    assert verify(asked.run, asked.config).faults == []
    run(workload(tmp_path, "full", {**TEXT, **MORE}))
    store = OutputDir(out)
    for stem in ("00000", "00001"):
        got = pq.read_table(pa.BufferReader(store.read(f"{stem}.parquet")))
        assert got.equals(pq.read_table(tmp_path / "full" / f"{stem}.parquet"))


def test_a_kill_before_any_file_operation_leaves_a_pair_old_or_new_or_none(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    run(workload(tmp_path, "before", TEXT))
    more = {**TEXT, "additional_fields": ["caption", "uid"]}
    full = workload(tmp_path, "full", more)
    run(full)
    ended = fork("task-steps", tmp_path / "c.yml", tmp_path / "out", tmp_path / "before")
    killed, last = ended[:-1], ended[-1]
    assert (killed, last) == (["killed", "0"] * (len(killed) // 2), "0")
    assert len(killed) > 50
    for out in (tmp_path / "out").iterdir():
        assert_same(out, tmp_path / "full")
        assert leftovers(out) == set()
        asked = workload(tmp_path, f"out/{out.name}", more)
        assert verify(asked.run, asked.config).faults == []
        assert decide(asked).pending == []


def killed_before_its_record(asked: Workload, number: int) -> None:
    """Leave what a task that was killed right after its pair leaves of a run's only shard."""
    for path in asked.run.records.iterdir():
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(n for n in lines if asked.fingerprint_id.encode() not in n))
    Attempts(asked.run.attempts).begin("00000", Attempt(number), anew=True)


def test_a_pair_whose_task_was_killed_before_its_record_is_extended(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    run(workload(tmp_path, "out", TEXT))
    run(grown := workload(tmp_path, "out", {**TEXT, "additional_fields": ["uid", "caption"]}))
    killed_before_its_record(grown, 2)
    asked = workload(tmp_path, "out", {**TEXT, **MORE})
    assert run(asked).extends == {"00000": grown.fingerprint_id}
    run(workload(tmp_path, "full", {**TEXT, **MORE}))
    assert_same(tmp_path / "out", tmp_path / "full")
    assert verify(asked.run, asked.config).faults == []


def test_a_pair_of_another_config_whose_task_was_killed_is_not_taken_for_done(
    tmp_path: Path,
) -> None:
    write_shards(tmp_path / "tars", 1)
    run(workload(tmp_path, "out", TEXT))
    run(other := workload(tmp_path, "out", MORE, reprocess=True))
    killed_before_its_record(other, 2)
    with pytest.raises(ConfigError, match="postprocess_columns"):
        decide(workload(tmp_path, "out", TEXT))
    assert len(run(workload(tmp_path, "out", TEXT, reprocess=True)).pending) == 1
    run(workload(tmp_path, "full", TEXT))
    assert_same(tmp_path / "out", tmp_path / "full")


CUSTOM = custom_file("length", "length")


def test_a_custom_model_is_added_and_its_file_must_stay_as_it_is(
    tmp_path: Path, computed: dict[str, int]
) -> None:
    write_shards(tmp_path / "tars", 1)
    file = tmp_path / "mine.py"
    file.write_text(CUSTOM)
    run(workload(tmp_path, "out", TEXT))
    own = {
        "models": ["text-stats", "length"],
        "postprocess_columns": ["text-words", "length"],
        "custom_pypath": str(file),
    }
    computed.clear()
    run(workload(tmp_path, "out", TEXT, **own))
    assert computed == {"length": 5}
    names = ["key", "text-words", "length", "uid"]
    assert pq.read_schema(tmp_path / "out" / "00000.parquet").names == names
    file.write_text(CUSTOM + "\n# changed\n")
    with pytest.raises(ConfigError, match="length of the finished outputs come from it"):
        decide(workload(tmp_path, "out", TEXT, **own))
    file.write_text(CUSTOM.replace('lambda cache: cache["length"]', "dict.get"))
    changed = workload(tmp_path, "out", TEXT, **own, reprocess=True)
    assert len(decide(changed).pending) == 1


def test_what_was_changed_is_refused_and_told_from_what_was_added(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    run(workload(tmp_path, "out", {**TEXT, **MORE}))
    less = workload(tmp_path, "out", TEXT, resize="exact")
    with pytest.raises(ConfigError) as refused:
        decide(less)
    assert refused.value.mistakes[:3] == [
        "resize: was 'fast', is 'exact'",
        "models: 'image-stats' is no longer listed",
        "postprocess_columns: 'image-brightness' is no longer listed",
    ]
    assert refused.value.mistakes[-1].startswith("1 shard (00000) of the run in ")
    assert "take additional models, columns, features and fields only" in refused.value.mistakes[-1]


def test_a_config_that_made_nothing_binds_nobody(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    run(asked := workload(tmp_path, "out", TEXT))
    planned(workload(tmp_path, "out", {**TEXT, **MORE}))
    assert summarise(asked.run, asked.config).state == "pending"
    assert len(run(asked).done) == 1
    assert summarise(asked.run, asked.config).state == "complete"
    planned(workload(tmp_path, "out", {**TEXT, **MORE}))
    with pytest.raises(ConfigError, match="'image-stats' is no longer listed"):
        decide(asked, in_flight=["00000", "another"])


def test_a_config_that_is_not_on_record_is_not_guessed(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    run(asked := workload(tmp_path, "out", TEXT))
    asked.run.fingerprint(asked.fingerprint_id).unlink()
    assert len(decide(asked).done) == 1
    with pytest.raises(ConfigError, match="nobody knows by what config some shards were made"):
        decide(workload(tmp_path, "out", {**TEXT, **MORE}))


def test_a_fingerprint_is_kept_as_it_was(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    asked = workload(tmp_path, "out", TEXT)
    planned(asked)
    kept = json.loads(asked.run.fingerprint(asked.fingerprint_id).read_bytes())
    assert kept == {**asked.fingerprint, "custom_names": []}
