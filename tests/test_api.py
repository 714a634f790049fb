"""The door for Python: what it gives, what it raises, and that it leaves no trace in a process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from kit import STATS, custom_config, custom_file, write_config, write_shards

import d2m_hpc as d2m
from d2m_hpc.errors import ConfigError, D2MError, SlurmError
from d2m_hpc.models.weights import OFFLINE
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.subsets.finished import Features

CUSTOM = """
import os
import torch
from functools import partial
from dataset2metadata.postprocessors import select
from beside import OFFSET

torch.set_default_dtype(torch.float32)
os.environ["A_LIBRARY_SAYS"] = "so"

class Size(torch.nn.Module):
    name = "size"
    raw_inputs = ("text",)
    preprocessors = ("letters",)
    dependencies = ()
    to_device = False

    def __init__(self, device):
        super().__init__()
        self.net = torch.nn.Linear(3, 3)

    def forward(self, lengths):
        return (lengths + OFFSET,)

model_lookup = {"size": Size}
preprocessor_lookup = {"letters": lambda text: torch.tensor(float(len(text)))}
postprocess_parquet_lookup = {"letters": partial(select, model="size", index=0)}
postprocess_feature_lookup = {}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three tars, one of them broken, and not run yet."""
    folder = tmp_path_factory.mktemp("api")
    write_shards(folder / "tars", 3)
    (folder / "tars" / "00001.tar").write_bytes(b"not a tar" * 100)
    values = {"input_tars": str(folder / "tars"), "output_metadata_dir": str(folder / "out")}
    return write_config(folder / "c.yml", STATS, **values)


@pytest.fixture(scope="module")
def run(config: Path) -> d2m.Run:
    return d2m.submit(config, local=True)


def test_a_run_says_how_it_ended_and_what_it_made(run: d2m.Run, config: Path) -> None:
    assert (run.status().done, run.status().failed, run.status().state) == (2, 1, "failed")
    assert run.path == config.parent / "out" / ".d2m"
    assert repr(run) == f"d2m_hpc.open({str(run.path)!r})"
    report = run.verify()
    assert (report.checked, report.faults, report.unfinished) == (2, [], 1)
    assert "is no tar" in run.log("00001").read_text()
    assert "<!doctype html>" in run.report(config.parent / "page.html").read_text().lower()


@pytest.mark.parametrize("by", ["c.yml", "out/.d2m"])
def test_a_run_is_found_by_its_config_and_by_its_folder(
    by: str, run: d2m.Run, config: Path
) -> None:
    found = d2m.open(config.parent / by)
    assert found.path == run.path
    assert found.table().equals(run.table())


def test_a_table_has_all_rows_in_the_plans_order(run: d2m.Run, config: Path) -> None:
    expected = [pq.read_table(config.parent / "out" / f"0000{i}.parquet") for i in (0, 2)]
    assert run.table(["key", "text-words"]).to_pylist() == [
        row for one in expected for row in one.select(["key", "text-words"]).to_pylist()
    ]
    assert run.table().column_names == expected[0].column_names
    assert run.dataset().count_rows() == 10


def test_a_dataset_can_be_queried(run: d2m.Run) -> None:
    """DuckDB takes one as a table, and reads the columns that a query names."""
    asked = duckdb.from_arrow(run.dataset()).aggregate("count(*), count(distinct key)")
    assert asked.fetchall() == [(10, 10)]


def test_features_come_a_shard_at_a_time_with_their_keys(run: d2m.Run, config: Path) -> None:
    features = run.features("image-histogram")
    parts = list(features)
    assert [part.stem for part in parts] == ["00000", "00002"]
    for part in parts:
        with np.load(config.parent / "out" / f"{part.stem}.npz") as arrays:
            assert np.array_equal(part.values, arrays["image-histogram"])
    keys, whole = features.array()
    assert keys == [key for part in parts for key in part.keys] == run.table()["key"].to_pylist()
    assert np.array_equal(whole, np.concatenate([part.values for part in parts]))


def test_an_array_that_does_not_fit_into_memory_is_mapped(run: d2m.Run, tmp_path: Path) -> None:
    features = run.features("image-histogram")
    _, mapped = features.array(tmp_path / "all.npy")
    assert isinstance(mapped, np.memmap)
    mapped.flush()
    assert np.array_equal(np.load(tmp_path / "all.npy"), features.array()[1])


def test_features_are_mapped_where_the_files_are(run: d2m.Run) -> None:
    read, mapped = run.features("image-histogram"), run.features("image-histogram", mapped=True)
    for part, there in zip(read, mapped, strict=True):
        assert isinstance(there.values, np.memmap)
        assert not there.values.flags.writeable
        assert there.keys == part.keys
        assert np.array_equal(there.values, part.values)
    assert np.array_equal(mapped.array()[1], read.array()[1])


def test_names_are_those_of_the_config_or_of_the_files(tmp_path: Path) -> None:
    """With DataComp's keys they differ; and of a run without rows there is nothing."""
    write_shards(tmp_path / "tars", 1)
    values = {"input_tars": str(tmp_path / "tars"), "output_metadata_dir": str(tmp_path / "out")}
    path = write_config(tmp_path / "c.yml", STATS, **values)
    with pytest.raises(ConfigError, match="there is no run in"):
        d2m.open(path)
    run = d2m.submit(d2m.load_config(path, additional_fields=[]), local=True)
    assert len(run.features("image-histogram").array()[0]) == 5
    with pytest.raises(ConfigError, match="found no feature 'image-histogramm'; did you mean"):
        run.features("image-histogramm")
    with pytest.raises(ConfigError, match="found no column 'image-phahs'; did you mean"):
        run.table(["key", "image-phahs"])


def test_a_damaged_output_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    values = {"input_tars": str(tmp_path / "tars"), "output_metadata_dir": str(tmp_path / "out")}
    run = d2m.submit(write_config(tmp_path / "c.yml", STATS, **values), local=True)
    features = run.features("image-histogram")
    (tmp_path / "out" / "00000.npz").write_bytes(b"PK\3\4")
    with pytest.raises(D2MError, match=r"out/00000 cannot be read: .*; see `d2m verify`"):
        features.array()
    (tmp_path / "out" / "00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(D2MError, match=r"out cannot be read: .*; see `d2m verify`"):
        run.table()


def test_mistakes_are_raised_and_never_printed(
    config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="batch_size: found 0") as error:
        d2m.load_config(config, batch_size=0, slurm={"partiton": "gpu"})
    assert len(error.value.mistakes) == 2
    with pytest.raises(ConfigError, match="no such file"):
        d2m.submit(config.with_name("none.yml"), local=True)
    monkeypatch.setenv("PATH", str(config.parent))
    with pytest.raises(SlurmError, match="there is no sbatch here"):
        d2m.submit(config)
    with pytest.raises(SlurmError, match="there is no sbatch here"):
        d2m.submit(config, preflight=False)
    assert capfd.readouterr() == ("", "")


def test_keys_of_a_call_take_the_place_of_the_files(config: Path) -> None:
    loaded = d2m.load_config(str(config), batch_size=3, slurm={"mem": "8G"}, logging=False)
    assert (loaded.batch_size, loaded.slurm.mem, loaded.models) == (3, "8G", STATS["models"])


def test_progress_is_told(config: Path, tmp_path: Path) -> None:
    told: list[int] = []
    again = d2m.load_config(config, output_metadata_dir=str(tmp_path / "out"))
    d2m.submit(again, local=True, on_progress=lambda task: told.append(task.rows))
    assert told[-1] == 10


# --- a good guest ---

SCENE = """
import gc, json, logging, os, signal, sys, threading, warnings
import torch
from PIL import Image, ImageFile
import d2m_hpc as d2m

def umask():
    now = os.umask(0o027)
    os.umask(now)
    return now

def scene():
    loggers = ["", "d2m_hpc", "torch", "transformers", "PIL"]
    return {
        "gc": [gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()],
        "environment": dict(os.environ),
        "umask": umask(),
        "folder": os.getcwd(),
        "signals": [str(signal.getsignal(s)) for s in sorted(signal.valid_signals() - {9, 19})],
        "PIL": [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES],
        "logging": [
            [n, log.level, list(map(str, log.handlers)), log.propagate, log.disabled]
            for n in loggers for log in [logging.getLogger(n)]
        ] + [logging.root.manager.disable],
        "torch": [
            torch.get_num_threads(), torch.get_num_interop_threads(),
            str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.is_autocast_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(),
            torch.get_rng_state().tolist(),
        ],
        "path": list(sys.path),
        "finders": [str(f) for f in sys.meta_path if type(f).__module__.startswith("d2m_hpc")],
        "modules": sorted(
            n for n in sys.modules
            if n.startswith(("dataset2metadata", "d2m_custom", "beside"))
        ),
        "hooks": [str(sys.excepthook), str(threading.excepthook), str(warnings.showwarning)],
        "threads": sorted(t.name for t in threading.enumerate()),
        "streams": [str(sys.stdout), str(sys.stderr)],
    }

Image.MAX_IMAGE_PIXELS = 1234
torch.set_num_threads(2)
torch.backends.cuda.matmul.allow_tf32 = True
torch.backends.cudnn.benchmark = True
signal.signal(signal.SIGTERM, lambda *_: None)
os.umask(0o027)
gc.collect()
before = scene()
runs = [d2m.submit(path, local=True) for path in sys.argv[2:]]
for run in runs:
    run.status(), run.verify(), run.table()
    run.report(run.path / "report.html")
after = scene()
with open(sys.argv[1], "w") as file:
    json.dump({n: [before[n], after[n]] for n in before if before[n] != after[n]}, file)
import huggingface_hub.constants
assert not huggingface_hub.constants.HF_HUB_OFFLINE
assert all(run.status().complete for run in runs), [run.status().failures for run in runs]
assert [run.table()["letters"][0].as_py() for run in runs] == [9.0, 10.0]
"""


@pytest.fixture
def two_customs(tmp_path: Path) -> Iterator[list[Path]]:
    """Configs of two files of one name, whose helpers have one name too."""
    write_shards(tmp_path / "tars", 2)
    paths = []
    for number in range(2):
        folder = tmp_path / f"own-{number}"
        folder.mkdir()
        (folder / "custom.py").write_text(CUSTOM)
        (folder / "beside.py").write_text(f"OFFSET = {number}.0\n")
        own = {
            "models": ["size", "image-stats"],
            "postprocess_columns": ["letters", "image-phash"],
            "postprocess_features": [],
            "custom_pypath": str(folder / "custom.py"),
            "input_tars": str(tmp_path / "tars"),
            "output_metadata_dir": str(folder / "out"),
        }
        paths.append(write_config(folder / "c.yml", {**STATS, **own}))
    return paths


def test_a_local_run_leaves_the_process_as_it_found_it(
    two_customs: list[Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SCENE, tmp_path / "changed.json", *two_customs]
    # Tasks that other tests ran in this process have told it to ask no hub.
    environment = {name: value for name, value in os.environ.items() if name not in OFFLINE}
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert json.loads((tmp_path / "changed.json").read_text()) == {}


def test_a_run_that_hangs_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    """Its shard is free for the next submit, and the log has all stacks."""
    write_shards(tmp_path / "tars", 1)
    code = custom_file("slow", before="import time; time.sleep(600)")
    path = custom_config(tmp_path, code, "slow", stall_seconds=1)
    with pytest.raises(D2MError, match="nothing happened for 1 s; the stacks of all threads are"):
        d2m.submit(path, local=True)
    run = d2m.open(path)
    assert run.status().running == 0
    assert "in forward" in (run.path / "logs" / "000-0.log").read_text()


def test_the_door_itself_loads_no_large_library() -> None:
    code = "import sys, d2m_hpc; d2m_hpc.submit, d2m_hpc.open; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in ended.stdout.split()}
    assert loaded & {"torch", "pandas", "numpy", "pyarrow", "pydantic", "yaml", "PIL"} == set()


USER = """
from typing import Any, assert_type

import d2m_hpc as d2m
from numpy.typing import NDArray

run = d2m.submit(d2m.load_config("config.yml", batch_size=64), local=True)
if not run.status().complete or run.verify(sample=10).faults:
    assert_type(run.status().failures[0].shards, list[str])
for part in run.features("oai-clip-vit-l14-image"):
    assert_type(part.keys, list[str])
    assert_type(part.values, NDArray[Any])
assert_type(d2m.open(run.path).cancel(), int)
run.status().dnoe
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A Python in whose site-packages the package lies, as from its wheel, beside all others."""
    venv.create(tmp_path / "venv", symlinks=True)
    [packages] = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    shutil.copytree(Path(d2m.__file__).parent, packages / "d2m_hpc")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return tmp_path / "venv" / "bin" / "python"


def test_a_users_type_checker_finds_the_types(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USER)
    options = ["--strict", "--config-file=", f"--python-executable={installed}", "mine.py"]
    command = [sys.executable, "-m", "mypy", *options]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    [error, _] = ended.stdout.splitlines()
    assert re.fullmatch(r'mine.py:\d+: error: "Summary" has no attribute "dnoe".*', error)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"slurm": 5}, "slurm: found 5; input should be a valid dictionary"),
        ({"slurm": "gpu"}, "slurm: found 'gpu'; input should be a valid dictionary"),
        ({"slurm": {5: 1}}, "slurm.5: unknown key"),
        ({"slurm": {"mem": object()}}, "slurm.mem: found <object"),
        (
            {"batch_size": object()},
            "batch_size: found <object .*; valid are values that a YAML file",
        ),
        ({"models": {"image-stats"}}, r"models: found \{'image-stats'\}; valid are values"),
        ({"batch_size": 10**5000}, "batch_size: found a int; valid are values"),
        ({"models": [{5: 3}]}, "models.0.5: found {'5': 3}; valid is one name, with a mapping"),
    ],
)
def test_a_key_of_another_type_is_a_mistake_of_the_config(
    keys: dict[str, Any], told: str, config: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        d2m.load_config(config, **keys)


def test_a_number_of_numpys_is_a_number(config: Path) -> None:
    assert d2m.load_config(config, batch_size=np.int64(3)).batch_size == 3


def parted(run: d2m.Run, path: str | Path, part: Any) -> Any:
    return run.export("npy", path, part=part, allow_missing=True)


NUMPYS: dict[str, Any] = {
    "top": lambda run, path: run.select(path, top=np.int64(2), by="text-words").chosen == 2,
    "share": lambda run, path: run.select(path, top=np.float32(0.3), by="text-words").chosen == 3,
    "one": lambda run, path: run.select(path, top=np.int64(1), by="text-words"),
    "sample": lambda run, path: run.select(path, sample=np.uint8(3), seed=np.int32(1)).chosen == 3,
    "an array": lambda run, path: run.select(path, sample=np.array(3)).chosen == 3,
    "verify": lambda run, path: run.verify(np.int64(1), seed=np.int64(2)).checked == 1,
    "tolerance": lambda run, path: run.diff(run, tolerance=np.float32(0)).is_equal,
    "samples": lambda run, path: run.report(path.with_suffix(".html"), samples=np.int64(1)),
    "head": lambda run, path: d2m.head(run.config, np.int64(1)).table.num_rows == 1,
    "part": lambda run, path: parted(run, path, np.array([3, 2])),
}
REFUSED = {
    "one": "found 1, which may be one sample or all",
    "part": "found 3 of 2 tasks; valid is 1 to 2",
}


@pytest.mark.parametrize("call", NUMPYS)
def test_a_number_of_numpys_is_an_argument(call: str, run: d2m.Run, tmp_path: Path) -> None:
    told = REFUSED.get(call)
    with pytest.raises(ConfigError, match=told) if told else nullcontext():
        assert NUMPYS[call](run, tmp_path / "kept.npy")


@pytest.mark.parametrize(
    "call",
    [
        lambda run: d2m.load_config(5),
        lambda run: d2m.submit({"models": []}),
        lambda run: d2m.open(None),
        lambda run: run.table(5),
        lambda run: run.table("key"),
        lambda run: run.table([5]),
        lambda run: run.features([]),
        lambda run: run.verify("x"),
        lambda run: run.verify(-1),
        lambda run: run.forget([5]),
        lambda run: run.remember("00000"),
        lambda run: run.report(5),
        lambda run: run.report(samples="x"),
        lambda run: run.select(5),
        lambda run: run.select("a.npy", top="x", by="text-words"),
        lambda run: run.select("a.npy", top=0.5, by=5),
        lambda run: run.select("a.npy", top=True, by="text-words"),
        lambda run: run.select("a.npy", sample=np.True_),
        lambda run: run.select("a.npy", sample=1j),
        lambda run: run.select("a.npy", sample=2, seed=0.5),
        lambda run: run.select("a.npy", top=None, by="text-words"),
        lambda run: run.verify(np.float64(2)),
        lambda run: parted(run, "kept", (1.0, 2)),
        lambda run: parted(run, "kept", "12"),
        lambda run: parted(run, "kept", 5),
        lambda run: run.export_datacomp(5),
    ],
)
def test_an_argument_of_another_type_is_told_in_a_line(call: Any, run: d2m.Run) -> None:
    with pytest.raises(ConfigError, match=r"found .*; valid (is|are)") as told:
        call(run)
    assert str(told.value).count("\n") == 1


def test_an_array_that_cannot_be_made_is_told_in_a_line(run: d2m.Run, tmp_path: Path) -> None:
    features = run.features("image-histogram")
    for path in (tmp_path / "none" / "a.npy", tmp_path, "a\0.npy", 5):
        with pytest.raises(
            D2MError, match=r"cannot take an array of|is no path of a new file"
        ) as e:
            features.array(path)  # type: ignore[arg-type]
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "arrays",
    [
        {"image-histogram": np.float32(3)},
        {"image-histogram": np.array([None] * 5, dtype=object)},
        {"image-histogram": np.ones((4, 48))},
        {"other": np.ones((5, 48))},
        None,
    ],
)
def test_an_npz_of_another_kind_is_told_in_a_line(
    arrays: dict[str, Any] | None, config: Path, run: d2m.Run, tmp_path: Path
) -> None:
    shutil.copytree(config.parent / "out", tmp_path / "out")
    npz = tmp_path / "out" / "00000.npz"
    npz.write_bytes(npz.read_bytes()[:-30]) if arrays is None else np.savez(npz, **arrays)
    features = Features("image-histogram", [Pair(OutputDir(str(tmp_path / "out")), "00000")])
    with pytest.raises(D2MError, match=r"out/00000 cannot be read: .*; see `d2m verify`") as told:
        features.array()
    assert "\n" not in str(told.value)
