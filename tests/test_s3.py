"""Inputs and outputs on an object store: a real S3 API, over HTTP."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3
from kit import STATS, write_config, write_shards
from typer.testing import CliRunner

import d2m_hpc as d2m
from d2m_hpc.cli.commands import app
from d2m_hpc.errors import D2MError
from d2m_hpc.plan.patterns import expand
from d2m_hpc.run.owner import OWNER
from d2m_hpc.run.pair import METADATA
from d2m_hpc.storage import stores

FORKER = Path(__file__).with_name("forker.py")
OUT = "s3://bucket/out"


class Ended:
    """A command's exit code and what it printed."""

    def __init__(self, *arguments: object) -> None:
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        error = done.exception
        self.code = error.exit_code if isinstance(error, D2MError) else done.exit_code
        self.out = done.output + (str(error) if isinstance(error, D2MError) else "")
        if error and not isinstance(error, D2MError | SystemExit):
            raise error


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are run, and the run folder is made."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(folder: Path, **more: Any) -> Path:
    values = {"input_tars": "s3://bucket/tars/*.tar", "output_metadata_dir": OUT, **more}
    return write_config(folder / "c.yml", STATS, **values)


def upload(bucket: s3.Server, folder: Path, shards: int, samples: int = 3) -> list[Path]:
    """Tars to `s3://bucket/tars/`; requests are counted from then on."""
    paths = write_shards(folder / "tars", shards, samples)
    for path in paths:
        bucket.put(f"tars/{path.name}", path.read_bytes())
    bucket.requests.clear()
    return paths


# --- planning ---


def test_globs_and_braces_have_sizes_by_a_listing(bucket: s3.Server, tmp_path: Path) -> None:
    paths = upload(bucket, tmp_path, 10, samples=1)
    want = {f"s3://bucket/tars/{p.name}": p.stat().st_size for p in paths}
    for pattern in ("s3://bucket/tars/*.tar", "s3://bucket/tars/{00000..00009}.tar"):
        bucket.requests.clear()
        assert expand([pattern]).sizes == want
        assert len(bucket.requests) <= 4


def test_braces_say_which_tars_are_missing(bucket: s3.Server, tmp_path: Path) -> None:
    upload(bucket, tmp_path, 8, samples=1)
    found = expand(["s3://bucket/tars/{00000..00009}.tar"])
    assert found.missing == [f"s3://bucket/tars/0000{i}.tar" for i in (8, 9)]
    assert len(expand(["s3://bucket/none/{0..9}.tar"]).missing) == 10


def test_a_few_named_tars_are_not_worth_a_listing(bucket: s3.Server) -> None:
    found = expand(["s3://bucket/{a,b}/{0..6}.tar"])
    assert set(found.sizes.values()) == {None}
    assert bucket.requests == []


def test_a_folder_that_may_not_be_listed_has_no_sizes(bucket: s3.Server) -> None:
    bucket.fail("GET", "bucket", s3.status(403))
    found = expand(["s3://bucket/tars/{0..9}.tar"])
    assert (set(found.sizes.values()), found.missing, found.mistakes) == ({None}, [], [])


def test_a_missing_library_is_named_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    for pattern in ("s3://bucket/*.tar", "s3://bucket/{0..1}.tar"):
        (mistake,) = expand([pattern]).mistakes
        assert "pip install 'd2m_hpc[s3]'" in mistake
    write_shards(here / "tars", 1)
    ended = Ended("submit", config_of(here, input_tars=f"{here}/tars/*.tar"), "--local")
    assert ended.code == 1
    assert "the library for s3:// is not installed; pip install 'd2m_hpc[s3]'" in ended.out


# Names that mean something to a library, and what it could take them for.
ODD = {
    "cut::off.tar": "cut",
    "part[7-9].tar": "part8.tar",
    "w?y.tar": "way.tar",
    "st*r.tar": "star.tar",
    "[[x]].tar": "x].tar",
    "two  words.tar": "two words.tar",
    "a#1.tar": "a",
    "100%25.tar": "100%.tar",
    "a+b.tar": "a b.tar",
    "s3::x.tar": "x.tar",
}


@pytest.mark.parametrize("folder", ["plain", "f::g[1]"])
def test_an_object_of_any_name_is_read_as_it_is_named(
    bucket: s3.Server, folder: str, tmp_path: Path
) -> None:
    for name, other in ODD.items():
        bucket.put(f"{folder}/{other}", b"another")
        bucket.put(f"{folder}/{name}", 100 * name.encode())
    odd = {f"s3://bucket/{folder}/{name}": name for name in ODD}
    listed = expand([f"s3://bucket/{folder.replace('[', '[[]')}/*.tar"])
    assert odd.keys() <= listed.sizes.keys()
    assert expand([f"s3://bucket/{folder}/"]).sizes == listed.sizes
    escaped = f"s3://bucket/{folder.replace('[', '[[]')}/st[*]r.tar"
    assert [*expand([escaped]).sizes] == [f"s3://bucket/{folder}/st*r.tar"]
    for url, name in odd.items():
        found = expand([url])
        is_glob = "*" in name and "[" not in folder
        named = [url, url.replace("*", "a")] if is_glob else [url]
        assert [*found.sizes] == named, found
        assert b"".join(stores.blocks(url)) == 100 * name.encode()
        assert stores.peek(url, 100) == (100 * name.encode())[:100]
    with pytest.raises(FileNotFoundError):
        list(stores.blocks(f"s3://bucket/{folder}/cut::gone.tar"))


def test_a_run_over_objects_of_odd_names_reads_each_and_writes_beside(
    bucket: s3.Server, here: Path
) -> None:
    names = ["cut::off.tar", "part[7-9].tar", "w?y.tar", "50%20 a+#.tar"]
    for name, path in zip(names, write_shards(here / "tars", 4, 2), strict=True):
        bucket.put(f"t::[a]/{name}", path.read_bytes())
    tars = [f"s3://bucket/t::[a]/{name}" for name in names]
    config = config_of(here, input_tars=tars, output_metadata_dir="s3://bucket/o::[b] c")
    ended = Ended("submit", config, "--local")
    assert ended.code == 0, ended.out
    made = {key for key in bucket.keys("") if key.endswith((".npz", ".parquet"))}
    assert made == {f"o::[b] c/{n[:-4]}.{end}" for n in names for end in ("npz", "parquet")}
    told = json.loads(Ended("status", config, "--json").out)
    assert (told["done"], told["rows"]) == (4, 8)
    assert Ended("verify", config).code == 0
    assert Ended("select", config, "-o", here / "ids.npy").code == 0
    assert len(np.load(here / "ids.npy")) == 8


def test_a_look_at_an_object_fetches_its_first_bytes_alone(bucket: s3.Server) -> None:
    bucket.put("a.tar", bytes(range(256)) * 40)
    assert stores.peek("s3://bucket/a.tar", 300) == (bytes(range(256)) * 2)[:300]
    assert [r.range for r in bucket.requests if r.method == "GET"] == ["bytes=0-299"]


def test_a_chain_of_stores_is_one_and_takes_no_name_with_its_mark(bucket: s3.Server) -> None:
    bucket.put("a.tar", b"a")
    assert stores.peek("simplecache::s3://bucket/a.tar") == b"a"
    with pytest.raises(D2MError, match="chain"):
        stores.filesystem("simplecache::s3://bucket/a::b.tar")


# --- preflight ---


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with sbatch; nothing gets as far as to call it."""
    monkeypatch.setattr("d2m_hpc.launch.slurm.is_here", lambda: True)


@pytest.mark.usefixtures("slurm")
def test_a_missing_bucket_is_found_before_anything_is_submitted(
    bucket: s3.Server, here: Path
) -> None:
    write_shards(here / "tars", 1)
    tars, out = f"{here}/tars/*.tar", "s3://no-such-bucket/out"
    ended = Ended("submit", config_of(here, input_tars=tars, output_metadata_dir=out))
    assert ended.code == 2
    assert "output_metadata_dir: s3://no-such-bucket/out cannot be written" in ended.out
    assert "bucket does not exist" in ended.out
    assert bucket.client.list_buckets()["Buckets"] == [
        b for b in bucket.client.list_buckets()["Buckets"] if b["Name"] == s3.BUCKET
    ]


@pytest.mark.usefixtures("slurm")
def test_wrong_keys_are_found_before_anything_is_submitted(bucket: s3.Server, here: Path) -> None:
    upload(bucket, here, 1)
    bucket.fail("GET", "bucket", s3.status(403))
    bucket.fail("PUT", ".d2m-probe", s3.status(403))
    ended = Ended("submit", config_of(here))
    assert ended.code == 2
    assert "input_tars: cannot list 's3://bucket/tars/*.tar': PermissionError" in ended.out
    assert "output_metadata_dir: s3://bucket/out cannot be written: AccessDenied" in ended.out


def test_a_local_run_into_a_missing_bucket_computes_nothing(bucket: s3.Server, here: Path) -> None:
    upload(bucket, here, 1)
    ended = Ended("submit", config_of(here, output_metadata_dir="s3://none/out"), "--local")
    assert ended.code == 2
    assert "output_metadata_dir: s3://none/out cannot be written" in ended.out
    assert "GET" not in {r.method for r in bucket.requests if r.path.endswith(".tar")}


# --- a run ---


def pairs(bucket: s3.Server) -> dict[str, Any]:
    """What all outputs hold."""
    found: dict[str, Any] = {}
    for key in sorted(set(bucket.keys("out/")) - {f"out/{OWNER}"}):
        data = io.BytesIO(bucket.get(key))
        if key.endswith(".parquet"):
            found[Path(key).name] = pq.read_table(data).to_pydict()
        else:
            with np.load(data) as arrays:
                found[Path(key).name] = {k: arrays[k].tolist() for k in arrays.files}
    return found


def local_pairs(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in folder.glob("0*.parquet"):
        found[path.name] = pq.read_table(path).to_pydict()
        with np.load(path.with_suffix(".npz")) as arrays:
            found[f"{path.stem}.npz"] = {k: arrays[k].tolist() for k in arrays.files}
    return found


def test_a_run_on_a_store_from_its_start_to_its_mending(bucket: s3.Server, here: Path) -> None:
    upload(bucket, here, 3)
    config = config_of(here)
    assert Ended("submit", config, "--local").code == 0

    tars, out = f"{here}/tars/*.tar", str(here / "o")
    local = config_of(here / "l", input_tars=tars, output_metadata_dir=out)
    assert Ended("submit", local, "--local").code == 0
    made = pairs(bucket)
    assert made == local_pairs(here / "o")
    assert sorted(made) == [f"0000{i}.{e}" for i in range(3) for e in ("npz", "parquet")]

    told = json.loads(Ended("status", config, "--json").out)
    assert (told["done"], told["pending"]) == (3, 0)
    assert Ended("verify", config).code == 0

    bucket.requests.clear()
    assert "3 done, 0 to do" in Ended("submit", config, "--local").out
    assert bucket.methods().keys() <= {"GET", "HEAD"}

    bucket.client.delete_object(Bucket=s3.BUCKET, Key="out/00001.parquet")
    assert "2 done, 1 to do" in Ended("submit", config, "--local").out
    assert pairs(bucket) == made

    bucket.client.delete_object(Bucket=s3.BUCKET, Key="out/00002.npz")
    ended = Ended("verify", config)
    assert ended.code == 1
    assert "00002.npz" in ended.out

    again = ["--set", "postprocess_columns=[text-words]", "--set", "reprocess=true"]
    assert Ended("submit", config, "--local", *again).code == 0
    assert set(pairs(bucket)["00002.parquet"]) == {"key", "text-words", "uid", "caption"}
    assert Ended("verify", config).code == 0
    assert list(Path(".d2m").iterdir()) == [Path(".d2m/bucket-out")]


def test_derived_columns_replace_the_parquet_alone(bucket: s3.Server, here: Path) -> None:
    upload(bucket, here, 2)
    feature = {"feature": "image-histogram"}
    derive = {
        "cluster": {"kind": "clusters", **feature, "count": 2},
        "duplicate": {"kind": "duplicates", **feature, "within": "cluster"},
        "twice": {"kind": "sql", "expression": '"image-brightness" * 2'},
    }
    run = d2m.submit(config_of(here, derive=derive), local=True)
    before, npz = run.table(), bucket.get("out/00000.npz")
    run = d2m.derive(config_of(here, derive=derive), local=True)
    assert (run.status().complete, run.verify().faults) == (True, [])
    table = run.table()
    assert table.select(before.column_names).equals(before)
    expected = [2 * value for value in before["image-brightness"].to_pylist()]
    assert table["twice"].to_pylist() == pytest.approx(expected)
    assert bucket.get("out/00000.npz") == npz


def test_a_shard_takes_seven_requests(bucket: s3.Server, here: Path) -> None:
    """One to see that it is not done, one for the tar, and five to publish the pair."""
    upload(bucket, here, 20, samples=1)
    assert Ended("submit", config_of(here), "--local").code == 0
    of_shards = [r for r in bucket.requests if r.path.startswith(("bucket/out/0", "bucket/tars/0"))]
    assert len(of_shards) == 7 * 20
    of_owner = [r for r in bucket.requests if OWNER in r.path or OWNER in r.query]
    assert len(of_owner) <= 10
    rest = [r for r in bucket.requests if r not in of_shards and r not in of_owner]
    assert len(rest) <= 16, rest


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_an_upload_that_lost_its_end_is_found(bucket: s3.Server, here: Path, suffix: str) -> None:
    key = f"out/00000.{suffix}"
    upload(bucket, here, 1)

    def half(app: Any, environ: dict[str, Any], start_response: Any) -> Any:
        answer = app(environ, start_response)
        whole = bucket.get(key)
        bucket.put(key, whole[: len(whole) // 2])
        return answer

    bucket.fail("PUT", key, half)
    ended = Ended("submit", config_of(here), "--local")
    assert ended.code == 1
    assert f"00000 cannot be written: bucket/{key} has" in ended.out.replace("\n", "")
    assert key not in bucket.keys("out/")
    assert "out/00000.parquet" not in bucket.keys("out/")
    assert Ended("submit", config_of(here), "--local").code == 0
    assert Ended("verify", config_of(here)).code == 0


def test_a_store_that_errs_now_and_then_costs_nothing(bucket: s3.Server, here: Path) -> None:
    upload(bucket, here, 1)
    for method, ending in (
        ("GET", ".tar"), ("GET", ".parquet"), ("PUT", ".npz"), ("PUT", ".parquet"),
        ("DELETE", ".parquet"), ("HEAD", ".npz"), ("PUT", "probe"), ("DELETE", "probe"),
    ):  # fmt: skip
        bucket.fail(method, ending, s3.status(503), times=2)
    assert Ended("submit", config_of(here), "--local").code == 0
    assert Ended("verify", config_of(here)).code == 0


# --- kills ---


def outputs_in(bucket: s3.Server, folder: str) -> list[str]:
    """The keys of all outputs."""
    return [key for key in bucket.keys(f"{folder}/") if not key.endswith(OWNER)]


def is_one_pair(bucket: s3.Server, folder: str, stem: str = "00000") -> bool:
    """Whether what a reader finds belongs together; a parquet without an npz does not."""
    keys = bucket.keys(f"{folder}/")
    if f"{folder}/{stem}.parquet" not in keys:
        return True
    schema = pq.read_schema(io.BytesIO(bucket.get(f"{folder}/{stem}.parquet")))
    want = json.loads(schema.metadata[METADATA])["npz_sha256"]
    return want == hashlib.sha256(bucket.get(f"{folder}/{stem}.npz")).hexdigest()


def test_a_kill_between_any_two_steps_of_a_commit_leaves_what_the_next_run_mends(
    bucket: s3.Server, here: Path
) -> None:
    """An older pair is replaced meanwhile, in each of many folders."""
    upload(bucket, here, 1)
    assert Ended("submit", config_of(here), "--local").code == 0
    again = {"postprocess_columns": ["text-words"], "feature_dtype": "float32"}
    config = config_of(here, **again, reprocess=True)
    for step in range(1, 10):
        for name in ("00000.npz", "00000.parquet"):
            bucket.put(f"kills/{step}/{name}", bucket.get(f"out/{name}"))
    command = [sys.executable, str(FORKER), "requests", str(config), "s3://bucket/kills"]
    killed = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as forker:
        assert forker.stdin is not None
        assert forker.stdout is not None
        while (ended := forker.stdout.readline().strip()) == "killed":
            folder = f"kills/{len(killed) + 1}"
            assert is_one_pair(bucket, folder)
            killed.append(len(outputs_in(bucket, folder)))
            print("", file=forker.stdin, flush=True)
            assert forker.stdout.readline() == "0\n"
            assert is_one_pair(bucket, folder)
            made = pq.read_table(io.BytesIO(bucket.get(f"{folder}/00000.parquet")))
            assert made.column_names == ["key", "text-words", "uid", "caption"]
            assert len(outputs_in(bucket, folder)) == 2
        assert ended == "0"
    assert len(killed) >= 5
    assert min(killed) == 0  # some between the removal of the old pair and the new one


# --- commands ---


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """`aws` beside this Python comes first."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)


@pytest.mark.usefixtures("aws")
def test_tars_come_through_the_aws_command(bucket: s3.Server, here: Path) -> None:
    upload(bucket, here, 1)
    bucket.put("tars/00001.tar", bucket.get("tars/00000.tar")[:4000])
    tars = ["pipe:aws s3 cp s3://bucket/tars/{00000..00002}.tar -"]
    config = config_of(here, input_tars=tars)
    ended = Ended("submit", config, "--local")
    assert ended.code == 1
    told = json.loads(Ended("status", config, "--json").out)
    assert (told["done"], told["failed"]) == (1, 2)
    errors = json.dumps(told["failures"])
    assert "ended with exit code 1: " in errors
    assert "(404)" in errors
    assert "is truncated at byte" in errors


# --- processes ---


def test_a_fork_has_a_client_of_its_own(bucket: s3.Server) -> None:
    """The parent's has an event loop whose thread the child lacks: it would wait for ever."""
    code = """
import os, signal
from d2m_hpc.run.outputs import OutputDir
output = OutputDir("s3://bucket/out")
output.make()
pid = os.fork()
if not pid:
    signal.alarm(20)
    output.make()
    os._exit(0)
raise SystemExit(os.waitpid(pid, 0)[1])
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert bucket.methods()["PUT"] == 2
