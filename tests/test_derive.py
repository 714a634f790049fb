"""Derived columns against brute force, and what stays of them when runs are killed and changed."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import STATS, sample, submit, write_config, write_shards, write_tar
from kit import d2m as command
from launch.scripted import commands_of

import d2m_hpc as d2m
from d2m_hpc.errors import ConfigError, D2MError, SlurmError
from d2m_hpc.launch import derive as launch
from d2m_hpc.plan.standing import standings
from d2m_hpc.run.derived import evaluated, require_steady
from d2m_hpc.run.folder import RunDir
from d2m_hpc.worker.task import run_task

FEATURE = "image-histogram"
ROWS, WIDTH = 6, 48
DERIVE: dict[str, Any] = {
    "cluster": {"kind": "clusters", "feature": FEATURE, "count": 3, "seed": 1},
    "duplicate": {
        "kind": "duplicates",
        "feature": FEATURE,
        "within": "cluster",
        "threshold": 0.9,
    },
    "probe": {"kind": "head", "on": FEATURE, "normalize": True, "classes": ["a", "b"]},
    "near": {"kind": "nearest", "feature": FEATURE},
    "norm": {"kind": "normsim", "feature": FEATURE, "norm": 2},
    "largest": {"kind": "normsim", "feature": FEATURE},
    "loss": {
        "kind": "negcliploss",
        "image": FEATURE,
        "text": FEATURE,
        "temperature": 0.1,
        "batch": 8,
        "batches": 2,
    },
    "weighed": {
        "kind": "sql",
        "expression": '"image-brightness" * 2 + cluster + CASE WHEN duplicate THEN 10 ELSE 0 END',
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, submitted; its shards stay as they are."""
    folder = made(tmp_path_factory.mktemp("derive"))
    d2m.submit(config(folder), local=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path)


def made(tmp_path: Path) -> Path:
    """Three shards of six pictures, some of them twice, and one shard without any."""
    write_shards(tmp_path / "tars", 3, ROWS)
    members: dict[str, bytes] = {}
    for i in range(ROWS):
        members |= sample(f"copy{i}", seed=i % 2)
    write_tar(tmp_path / "tars" / "00002.tar", members)
    write_tar(tmp_path / "tars" / "00003.tar", {})
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "probe.npz", coef_=rng.normal(size=(2, WIDTH)), intercept_=np.ones(2))
    np.save(tmp_path / "reference.npy", rng.random((5, WIDTH)).astype(np.float32))
    return tmp_path


def config(folder: Path, names: list[str] | None = None, **more: Any) -> Path:
    """`c.yml` with these entries; `more` changes some keys of theirs, by name."""
    entries = {name: DERIVE[name] | more.pop(name, {}) for name in names or DERIVE}
    for name in {"near", "norm", "largest"} & entries.keys():
        entries[name].setdefault("reference", str(folder / "reference.npy"))
    if "probe" in entries:
        entries["probe"].setdefault("checkpoint", str(folder / "probe.npz"))
    places = {
        "input_tars": str(folder / "tars" / "*.tar"),
        "output_metadata_dir": str(folder / "out"),
    }
    return write_config(folder / "c.yml", STATS, derive=entries, **places, **more)


def derived(file: Path) -> pa.Table:
    run = d2m.derive(file, local=True)
    assert run.status().complete
    return run.table()


def unit(array: np.ndarray) -> np.ndarray:
    flat = array.reshape(len(array), -1).astype(np.float64)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def stored(folder: Path, stem: str) -> np.ndarray:
    with np.load(folder / "out" / f"{stem}.npz") as arrays:
        return arrays[FEATURE]


def kept(folder: Path, *names: str) -> dict[str, np.ndarray]:
    """What a first step has kept: the file with these arrays."""
    for path in sorted((folder / "out" / ".d2m" / "derived").glob("*.npz")):
        with np.load(path) as arrays:
            if {*names} <= {*arrays.files}:
                return {name: arrays[name] for name in arrays.files}
    raise AssertionError(names)


def test_all_kinds_are_what_brute_force_finds(folder: Path) -> None:
    before = d2m.submit(config(folder), local=True).table()
    table = derived(config(folder))
    own = before.column_names
    assert table.select(own).equals(before)
    assert len(table) == 3 * ROWS
    assert pq.read_table(folder / "out" / "00003.parquet").num_rows == 0
    x = unit(np.concatenate([stored(folder, f"{i:05d}") for i in range(3)]))
    found = {name: np.array(table[name].to_pylist()) for name in table.column_names}

    # clusters
    files = (folder / "out" / ".d2m" / "derived").glob("*.npz")
    arrays = [np.load(path)["vectors"] for path in files if "vectors" in np.load(path).files]
    [centroids] = [array for array in arrays if array.shape == (3, WIDTH)]
    cosines = x @ unit(centroids).T
    assert (found["cluster"] == cosines.argmax(axis=1)).all()
    assert len({*found["cluster"]}) == 3
    np.testing.assert_allclose(found["cluster-similarity"], cosines.max(axis=1), atol=1e-5)

    # duplicates, as SemDeDup's code finds them
    largest = np.zeros(len(x))
    for cluster in range(3):
        rows = np.flatnonzero(found["cluster"] == cluster)
        rows = rows[np.argsort(cosines[rows, cluster].round(5), kind="stable")]
        products = np.triu(x[rows] @ x[rows].T, 1)
        largest[rows] = products.max(axis=0)
    np.testing.assert_allclose(found["duplicate-similarity"], largest, atol=1e-5)
    assert (found["duplicate"] == (largest >= 0.9)).all()
    copies = found["duplicate"][2 * ROWS :].reshape(-1, 2)
    assert (copies.sum(axis=0) >= 2).all()  # three of the same picture: one stays at most

    # head
    with np.load(folder / "probe.npz") as probe:
        scores = x @ probe["coef_"].T + probe["intercept_"]
    np.testing.assert_allclose(found["probe-a"], scores[:, 0], atol=1e-5)
    np.testing.assert_allclose(found["probe-b"], scores[:, 1], atol=1e-5)

    # nearest and NormSim
    against = x @ unit(np.load(folder / "reference.npy")).T
    assert (found["near"] == against.argmax(axis=1)).all()
    np.testing.assert_allclose(found["near-similarity"], against.max(axis=1), atol=1e-5)
    np.testing.assert_allclose(found["norm"], np.linalg.norm(against, axis=1), atol=1e-5)
    np.testing.assert_allclose(found["largest"], against.max(axis=1), atol=1e-5)

    # negCLIPLoss
    batches = kept(folder, "image0", "image1")
    expected = np.zeros(len(x))
    keys = [(f"{i // ROWS:05d}", i % ROWS) for i in range(len(x))]
    for batch in range(2):
        others = unit(batches[f"image{batch}"])
        assert len(others) == 8
        places = [*zip(batches[f"stem{batch}"].tolist(), batches[f"row{batch}"], strict=True)]
        for i, key in enumerate(keys):
            rest = others[[place != key for place in places]]
            logits = np.append(x[i] @ rest.T, 1.0) / 0.1
            expected[i] += 0.1 * (logits[-1] - np.log(np.exp(logits).sum())) / 2
    np.testing.assert_allclose(found["loss"], expected, atol=1e-3)

    # SQL
    brightness = np.array(before["image-brightness"].to_pylist())
    value = brightness * 2 + found["cluster"] + 10 * found["duplicate"]
    np.testing.assert_allclose(found["weighed"], value, atol=1e-5)
    assert d2m.open(folder / "c.yml").verify().faults == []


def records(folder: Path) -> list[dict[str, Any]]:
    files = (folder / "out" / ".d2m" / "records").glob("*.jsonl")
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(found, key=lambda r: (r["finished"], r["shard"]))


def test_a_run_that_has_not_begun_is_told(folder: Path) -> None:
    """It was told to submit again."""
    with pytest.raises(ConfigError, match=r"there is no run in .*; start one with `d2m-submit"):
        d2m.derive(config(folder), local=True)


@pytest.mark.parametrize("name", ["cluster", "loss"])
def test_a_run_without_rows_is_told(name: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "00000.tar", {})
    d2m.submit(file := config(tmp_path, [name]), local=True)
    with pytest.raises(D2MError, match=rf"derive\.{name}: no shard that is finished has rows yet"):
        d2m.derive(file, local=True)


def test_only_changed_entries_are_computed_again(folder: Path) -> None:
    d2m.submit(config(folder), local=True)
    whole = derived(config(folder, ["cluster", "duplicate"]))
    steps = {*(folder / "out" / ".d2m" / "derived").iterdir()}
    assert len(records(folder)) == 8
    # The same again does nothing, nor does a submit, which leaves derived columns alone.
    assert derived(config(folder, ["cluster", "duplicate"])).equals(whole)
    assert d2m.submit(config(folder), local=True).table().equals(whole)
    assert len(records(folder)) == 8

    file = config(folder, ["cluster", "duplicate", "weighed"], duplicate={"threshold": 0.99})
    table = derived(file)
    assert {*(folder / "out" / ".d2m" / "derived").iterdir()} == steps
    assert table["cluster"].equals(whole["cluster"])
    similarity = np.array(whole["duplicate-similarity"].to_pylist())
    assert table["duplicate"].to_pylist() == [*(similarity >= np.float32(0.99))]
    assert table.column_names == [*whole.column_names, "weighed"]
    # An entry that is gone takes its columns along.
    assert derived(config(folder, ["cluster"])).column_names == whole.column_names[:-2]


def test_a_dry_run_tells_what_is_left_and_changes_nothing(folder: Path) -> None:
    names = ["cluster", "duplicate"]
    d2m.submit(config(folder), local=True)

    def planned(**more: Any) -> tuple[int, list[str]]:
        before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
        decision = launch.dry_run(d2m.api.inspect(config(folder, names, **more)))
        after = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
        assert after == before
        return len(decision.pending), [n for n in decision.notices if "first steps" in n]

    assert planned() == (4, ["first steps are done before: cluster, duplicate"])
    derived(config(folder, names))
    assert planned() == (0, [])
    assert planned(duplicate={"threshold": 0.99}) == (4, [])
    assert planned(cluster={"seed": 2}) == (4, ["first steps are done before: cluster, duplicate"])


def test_later_shards_get_the_same_clusters(folder: Path) -> None:
    (folder / "tars" / "00002.tar").rename(folder / "late.tar")
    d2m.submit(config(folder, ["cluster"]), local=True)
    before = derived(folder / "c.yml")
    (folder / "late.tar").rename(folder / "tars" / "00002.tar")
    # The new tar is not in the plan, so the run as it stands has all columns.
    assert derived(folder / "c.yml").equals(before)
    d2m.submit(folder / "c.yml", local=True)
    table = derived(folder / "c.yml")
    assert len(table) == 3 * ROWS
    assert table.slice(0, 2 * ROWS).equals(before)
    assert len([*(folder / "out" / ".d2m" / "derived").glob("*.npz")]) == 1
    assert [r["shard"] for r in records(folder)].count("00000") == 2


def test_a_submit_that_adds_models_says_which_columns_go(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    d2m.submit(config(folder, ["cluster"]), local=True)
    before = derived(folder / "c.yml")
    columns = [*STATS["postprocess_columns"], "text-characters"]
    file = config(folder, ["cluster"], postprocess_columns=columns)
    with pytest.raises(D2MError, match="4 of 4 shards are not finished"):
        d2m.derive(file, local=True)
    assert d2m.open(file).table().equals(before)
    told = submit(file)
    assert "4 extended shards lose their derived columns; `d2m derive` makes" in told.stdout
    assert "cluster" not in d2m.open(file).table().column_names
    assert "text-characters" in derived(file).column_names


KILLED = """
import os, pathlib, signal, sys, time
import d2m_hpc as d2m
from d2m_hpc.worker import derive

whole = derive.Deriver.__call__

def call(self, stem, *given):
    if stem == "00001":
        while not [*pathlib.Path(sys.argv[2]).glob("*/extended/00000")]:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, stem, *given)

derive.Deriver.__call__ = call
d2m.derive(sys.argv[1], local=True)
"""


def test_a_killed_derive_goes_on(folder: Path) -> None:
    names = ["cluster", "probe", "weighed"]
    weighed = {"expression": '"image-brightness" * cluster'}
    file = config(folder, names, lease_seconds=1, weighed=weighed)
    d2m.submit(file, local=True)
    submissions = folder / "out" / ".d2m" / "submissions"
    done = subprocess.run([sys.executable, "-c", KILLED, file, submissions], check=False)
    assert done.returncode == -signal.SIGKILL
    run = d2m.open(file)
    assert (run.status().done, run.verify().faults) == (1, [])
    assert d2m.submit(file, local=True).status().complete  # of what a submit computes
    table = derived(file)
    assert [r["shard"] for r in records(folder) if "+" in r["fingerprint"]].count("00000") == 1
    shutil.rmtree(folder / "out")
    d2m.submit(file, local=True)
    assert derived(file).equals(table)


def test_a_shard_without_the_feature_fails_alone(folder: Path) -> None:
    file = config(folder, ["probe"])
    d2m.submit(file, local=True)
    before = d2m.open(file).table()
    pair = folder / "out" / "00001.npz"
    good = pair.read_bytes()
    np.savez(pair)
    run = d2m.derive(file, local=True)
    status = run.status()
    assert (status.done, status.underived, status.failed) == (4, 1, 0)
    [failure] = status.failures
    assert "this finished pair cannot be extended: the npz has the sha256" in failure.error
    assert d2m.submit(file, local=True).status().complete  # the pair is as it was
    pair.write_bytes(good)
    assert derived(file).select(before.column_names).equals(before)

    # A pair that an earlier version, or another program, made so.
    np.savez(pair)
    table = pq.read_table(folder / "out" / "00001.parquet")
    note = json.loads(table.schema.metadata[b"d2m"])
    note["npz_sha256"] = hashlib.sha256(pair.read_bytes()).hexdigest()
    noted = table.replace_schema_metadata({b"d2m": json.dumps(note)})
    pq.write_table(noted, folder / "out" / "00001.parquet")
    run = d2m.derive(config(folder, ["probe"], probe={"normalize": False}), local=True)
    [failure] = run.status().failures
    assert (
        "00001: this finished pair cannot be extended: 'image-histogram is not a file"
        in failure.error
    )


def test_a_run_stays_finished_where_a_derived_column_fails(folder: Path) -> None:
    names = {"input_tars": str(folder / "tars/*.tar"), "output_metadata_dir": str(folder / "out")}
    plain = write_config(folder / "plain.yml", STATS, **names)
    d2m.submit(plain, local=True)
    before = d2m.open(plain).status().samples_per_second
    number = {"kind": "sql", "type": "int64", "expression": "key::BIGINT"}
    file = write_config(folder / "c.yml", STATS, **names, derive={"x": number}, max_attempts=2)
    for _ in range(2):
        assert command("derive", file, "--local").returncode == 1
    for opened in (plain, file):
        run = d2m.open(opened)
        status = run.status()
        assert (status.done, status.failed, status.underived, status.given_up) == (4, 0, 1, 1)
        assert (status.complete, status.samples_per_second) == (True, before)
        [failure] = status.failures
        assert failure.shards == ["00002"]
        assert failure.error.startswith("derive.x: found 'key::BIGINT': Conversion Error")
        assert (run.verify().unfinished, run.verify().faults) == (0, [])
        chosen = run.select(folder / "kept.jsonl", where="x IS NOT NULL")
        assert (chosen.rows, chosen.passed, chosen.unfinished) == (3 * ROWS, 2 * ROWS, 0)
        table = run.table()
        assert table.column("x").null_count == ROWS
        assert table.column("key").to_pylist()[-ROWS:] == [f"copy{i}" for i in range(ROWS)]
        assert run.export("hf", folder / "hf").rows == 3 * ROWS
        assert not standings(RunDir(run.path), run.config).is_complete  # to rounds of the derive
    told = command("derive", file, "--local")
    assert told.returncode == 1
    assert "1 given up after 2 attempts" in told.stdout
    assert "4 shards: 4 done, 0 to do" in command("plan", plain).stdout


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cluster": {"feature": "image-phash"}}, "which is not listed in postprocess_features"),
        ({"cluster": {"count": 100}}, "derive.cluster.count: found 100; valid is up to the 18"),
        ({"cluster": {"count": 0}}, "derive.cluster.count: found 0; input should be"),
        ({"cluster": {"sedd": 0}}, "derive.cluster.sedd: unknown key; did you mean 'seed'"),
        ({"cluster": {"kind": "kmeans"}}, "derive.cluster.kind: found 'kmeans'; valid: clusters"),
        (
            {"cluster": {"kind": None}},
            "derive.cluster.kind: found nothing; the key is required; val",
        ),
        ({"duplicate": {"within": "probe"}}, "valid is an entry of kind clusters before"),
        ({"probe": {"checkpoint": "/no/file.npz"}}, "derive.probe.checkpoint: /no/file.npz cannot"),
        ({"probe": {"classes": ["a"]}}, "derive.probe: "),
        ({"probe": {"checkpoint": "narrow.npz"}}, "image-histogram has 48 values, and the head in"),
        ({"probe": {"on": "image-histgram"}}, "did you mean 'image-histogram'"),
        ({"weighed": {"expression": "clutser + 1"}}, "unknown column 'clutser'; did you mean"),
        ({"weighed": {"expression": "cluster, 1"}}, "derive.weighed.expression: found"),
        ({"weighed": {"expression": "(SELECT content FROM read_text('/etc/passwd'))"}}, "disabled"),
        ({"weighed": {"expression": "cluster + Random()"}}, "random() gives another value each"),
        ({"weighed": {"expression": "list_sum([x + random() for x in [1]])"}}, "random() gives"),
        ({"weighed": {"expression": "epoch(now())"}}, "now() gives another value each time"),
        ({"weighed": {"expression": "year(CURRENT_DATE)"}}, "CURRENT_DATE gives another value"),
        ({"weighed": {"expression": "year(age(DATE '2020-01-01'))"}}, "age() gives another"),
        ({"weighed": {"expression": "setseed(0.5) IS NULL"}}, "setseed() gives another value"),
        ({"weighed": {"expression": "max(cluster)"}}, "gives 1 row of 1 column for 2 rows"),
    ],
)
def test_mistakes_are_told_in_a_line(finished: Path, change: dict[str, Any], told: str) -> None:
    before = records(finished)
    np.savez(finished / "narrow.npz", coef_=np.ones((2, 7)), intercept_=np.ones(2))
    if (checkpoint := change.get("probe", {}).get("checkpoint")) == "narrow.npz":
        change = {"probe": {"checkpoint": str(finished / checkpoint)}}
    with pytest.raises(ConfigError) as caught:
        d2m.derive(config(finished, **change), local=True)
    assert told in str(caught.value)
    assert records(finished) == before


def test_a_nan_is_a_missing_value_to_an_expression() -> None:
    """It was above all numbers, and a sample without a score the best."""
    for kind in (pa.float32(), pa.float64()):
        table = pa.table({"q": pa.array([math.nan, 2.0, None, math.inf, 0.5], kind)})
        assert evaluated("q > 1", "bool", table).to_pylist() == [None, True, None, True, False]
    empty = pa.table({"q": pa.array([], pa.float64())})
    assert evaluated("q > 1", "bool", empty).to_pylist() == []


def test_expressions_of_the_row_alone_are_steady() -> None:
    for expression in (
        "CASE WHEN a > 1 THEN 'random()' ELSE error('no') END",
        "year(age(DATE '2021-01-01', DATE '2020-01-01'))",
        "current_date + 1",  # a column here
        "date_trunc('day', DATE '2020-01-01')",
        "hash(a) % 10",
    ):
        require_steady(expression, ["a", "current_date"])


LISTS: dict[str, tuple[pa.Array, str]] = {
    "narrow": (pa.array([[1.0, 2.0]]), "has vectors of 2, 'image-histogram' of 48"),
    "ragged": (pa.array([[1.0, 2.0], [1.0]]), "column 'v' has lists of 1, 2 values; valid is one"),
    "null": (pa.array([[1.0, 2.0], None]), "column 'v' has lists of 2, null values; valid is one"),
    "hole": (pa.array([[1.0, None], [1.0, 2.0]]), "1 of its vectors have a NaN, an infinity or a"),
    "words": (pa.array([["a", "b"]]), "column 'v' has lists of string; valid are numbers"),
    "flat": (pa.array([1.0, 2.0]), "column 'v' is of double; valid are lists of numbers"),
    "empty": (pa.array([], pa.list_(pa.float32(), 48)), "it has the shape (0, 0); valid are"),
    "no": (pa.array([[]], pa.list_(pa.float32())), "it has the shape (1, 0); valid are vectors"),
}


@pytest.mark.parametrize("name", [*LISTS, "foreign", "none", "cut", "folder", "unnamed", "wrong"])
def test_a_reference_that_cannot_be_used_is_told_in_a_line(finished: Path, name: str) -> None:
    path, column = finished / f"{name}.parquet", {"unnamed": None, "wrong": "w"}.get(name, "v")
    values, told = LISTS.get(name, LISTS["narrow"])
    pq.write_table(pa.table({"v": values}), path)
    if name in ("unnamed", "wrong"):
        told = {"unnamed": "valid for `column` is one of v", "wrong": "no column 'w'; valid"}[name]
    elif name == "foreign":
        path.write_bytes(b"a text, and no parquet\n" * 9)
        told = "not a parquet file"
    elif name == "none":
        path.write_bytes(b"")
        told = "0 bytes"
    elif name == "cut":
        path.write_bytes(path.read_bytes()[:100])
        told = "not a parquet file"
    elif name == "folder":
        path.unlink()
        path.mkdir(exist_ok=True)
        told = "cannot be read: Is a directory"
    entry = {"near": {"reference": str(path), "column": column}}
    with pytest.raises(ConfigError) as caught:
        d2m.derive(config(finished, ["near"], **entry), local=True)
    assert f"derive.near.reference: {path}" in str(caught.value)
    assert told in str(caught.value)
    assert str(caught.value).count("derive.") == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (np.array([["a"]]), "it has values of type <U1; valid are numbers"),
        (np.ones((2, 2), complex), "it has values of type complex128; valid are numbers"),
        (np.full((3, 48), np.nan), "3 of its vectors have a NaN"),
        (b"", "it is no .npy, as numpy.save writes them"),
        (b"PK\x03\x04 an npz", "it is no .npy, as numpy.save writes them"),
    ],
)
def test_an_npy_that_cannot_be_used_is_told_in_a_line(
    finished: Path, content: Any, told: str
) -> None:
    path = finished / "bad.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(ConfigError) as caught:
        d2m.derive(config(finished, ["near"], near={"reference": str(path)}), local=True)
    assert f"derive.near.reference: {path} cannot be used: {told}" in str(caught.value)


def test_a_reference_in_a_parquet_gives_what_the_same_npy_gives(folder: Path) -> None:
    d2m.submit(config(folder), local=True)
    vectors = np.load(folder / "reference.npy").astype(np.float32)
    whole = derived(config(folder, ["near"]))
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.float32(), WIDTH)):
        rows = pa.table({"v": pa.array(vectors.tolist(), kind), "w": [0] * len(vectors)})
        pq.write_table(rows, folder / "r.parquet")
        entry = {"reference": str(folder / "r.parquet"), "column": "v"}
        assert derived(config(folder, ["near"], near=entry)).equals(whole)


def test_a_job_does_the_first_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands are lines in place of its own: sbatch runs what it is to wait for."""
    told = f'echo "$@" >> {folder}/asked'
    waits = '[[ "$*" == *--wait* ]] && { bash -s > $0.out 2>&1 || code=$?; }'
    commands_of(
        folder / "bin",
        monkeypatch,
        sbatch=f'{told}\n{waits}\necho "Submitted batch job 7"; exit ${{code:-0}}',
        srun='while [[ "$1" == -* ]]; do shift; done; exec "$@"',
        squeue="true",
        scontrol="true",
    )
    setup = ["export ASKED=1"]
    file = config(folder, ["cluster"], slurm={"partition": "gpu", "setup": setup})
    d2m.submit(file, local=True)
    d2m.derive(file)
    first, array = (folder / "asked").read_text().splitlines()
    assert "--wait" in first
    assert "--partition=gpu" in first
    assert "--array=0-0" in array
    assert len([*(folder / "out" / ".d2m" / "derived").glob("*.npz")]) == 1
    # Array tasks are what a submit's are.
    run_task(folder / "out" / ".d2m", "001", 0)
    assert d2m.open(file).status().complete
    # A job that ends well where its files are not seen, as on a node of another disk.
    monkeypatch.setattr(launch, "SEEN_SECONDS", 0.5)
    unseen = config(folder, ["cluster"], cluster={"seed": 2}, slurm={"setup": ["exit 0"]})
    with pytest.raises(SlurmError, match=r"is .*derived on a filesystem that all nodes share"):
        d2m.derive(unseen)
    broken = config(folder, ["cluster"], cluster={"seed": 2}, slurm={"setup": ["exit 3"]})
    with pytest.raises(SlurmError, match=r"the job of the first steps failed; .*derive-7.out says"):
        d2m.derive(broken)
