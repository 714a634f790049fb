"""A newcomer's first commands: a config for the tars, the first samples, this machine, the help."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import Result
from kit import STATS, custom_config, custom_file, jpeg, write_config, write_shards, write_tar
from typer.testing import CliRunner

import d2m_hpc as d2m
from d2m_hpc.cli.commands import app
from d2m_hpc.config.load import load
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.plan import workload


@pytest.fixture(autouse=True)
def _weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None are there."""
    monkeypatch.setenv("D2M_WEIGHTS", str(tmp_path / "weights"))


def _d2m(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def _tar(path: Path, count: int, members: dict[str, bytes], **fields: Any) -> Path:
    found: dict[str, bytes] = {}
    for i in range(count):
        found |= {f"{path.stem}{i}.{kind}": data for kind, data in members.items()}
        if fields:
            found[f"{path.stem}{i}.json"] = json.dumps({"uid": f"{i:032x}", **fields}).encode()
    return write_tar(path, found) or path


def _init(folder: Path, *inputs: object) -> dict[str, Any]:
    """The config that `d2m init` writes."""
    ended = _d2m("init", *inputs, "-o", folder / "c.yml")
    assert (ended.exit_code, ended.stderr) == (0, ""), ended.exception
    config: dict[str, Any] = yaml.safe_load((folder / "c.yml").read_text())
    return config


# --- init ---


def test_from_a_folder_to_a_finished_run_in_three_commands(tmp_path: Path) -> None:
    _tar(tmp_path / "tars" / "a.tar", 3, {"jpg": jpeg(), "txt": b"a cat"}, caption="a cat", n=1)
    _tar(tmp_path / "tars" / "b.tar", 2, {"jpg": jpeg(), "txt": b"a dog"}, caption=None, later=2)
    config = _init(tmp_path, tmp_path / "tars")
    assert config["models"] == ["opennsfw", "language-lid176", "image-stats", "text-stats"]
    assert {"opennsfw-score", "image-phash", "text-words"} < {*config["postprocess_columns"]}
    assert config["additional_fields"] == ["uid", "caption", "n"]
    text = (tmp_path / "c.yml").read_text()
    assert "# 2 shards. Of the first 5 samples: jpg in 100%, txt in 100%, json in 100%." in text
    assert "# - oai-clip-vit-l14\n" in text
    assert '# also in the JSON: ["later"]' in text
    assert "opennsfw-score" in _d2m("head", tmp_path / "c.yml", 2).stdout
    run = d2m.submit(tmp_path / "c.yml", local=True)
    assert (run.status().complete, run.status().rows) == (True, 5)
    assert run.path == tmp_path / "c-metadata" / ".d2m"


def test_models_whose_weights_are_here_are_listed(tmp_path: Path, checkpoints: Path) -> None:
    (tmp_path / "weights").symlink_to(checkpoints)
    tar = _tar(tmp_path / "a.tar", 1, {"jpg": jpeg(), "txt": b"a"})
    config = _init(tmp_path, tar)
    assert config["models"][:3] == [
        *("oai-clip-vit-l14", "nsfw-image-oai-clip-vit-l-14", "oai-clip-vit-b32")
    ]
    assert "oai-clip-vit-l14-image" in config["postprocess_features"]
    assert "d2m weights fetch" not in (tmp_path / "c.yml").read_text()


@pytest.mark.parametrize("are_there", [True, False])
def test_a_model_that_reads_one_that_does_not_fit_is_not_offered(
    tmp_path: Path, checkpoints: Path, are_there: bool
) -> None:
    """Of pictures without texts, the offered head of a CLIP model was refused when listed."""
    if are_there:
        (tmp_path / "weights").symlink_to(checkpoints)
    _init(tmp_path, _tar(tmp_path / "a.tar", 1, {"jpg": jpeg()}))
    text = (tmp_path / "c.yml").read_text()
    assert "oai-clip" not in text
    assert ("# - faces-scrfd10g\n" in text) == (not are_there)
    (tmp_path / "c.yml").write_text(text.replace("\n# - ", "\n- "))  # list all that is offered
    assert not isinstance(_d2m("plan", tmp_path / "c.yml").exception, ConfigError)


def test_captions_in_the_json_and_pictures_of_another_name_are_found(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "a.tar", 2, {"edge.png": jpeg()}, caption="a cat", exif={"Model": "x"})
    config = _init(tmp_path, tar)
    assert (config["image_key"], config["text_from"]) == ("edge.png", "json:caption")
    assert config["additional_fields"] == ["uid", "caption"]
    rows = d2m.head(tmp_path / "c.yml").to_dict()["rows"]
    assert [(row["text-words"], len(row["image-histogram"])) for row in rows] == [(2, 48)] * 2


@pytest.mark.parametrize(
    ("members", "models"),
    [
        ({"jpg": jpeg()}, ["opennsfw", "image-stats"]),
        ({"txt": b"a"}, ["language-lid176", "text-stats"]),
    ],
)
def test_only_models_that_fit_are_listed(
    tmp_path: Path, members: dict[str, bytes], models: list[str]
) -> None:
    assert _init(tmp_path, _tar(tmp_path / "a.tar", 2, members))["models"] == models


def test_compressed_tars_and_stores_are_looked_into(tmp_path: Path) -> None:
    plain = _tar(tmp_path / "a.tar", 3, {"jpg": jpeg(), "txt": b"a"}, caption="x").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(plain))
    with fsspec.open("memory://init/a.tar", "wb") as file:
        file.write(plain)
    first = _init(tmp_path, tmp_path / "a.tar")
    for number, place in enumerate((tmp_path / "a.tar.gz", "memory://init/a.tar")):
        (tmp_path / str(number)).mkdir()
        found = _init(tmp_path / str(number), place)
        assert found["input_tars"] == [str(place)]
        assert found["additional_fields"] == first["additional_fields"] == ["uid", "caption"]


def test_a_folder_of_parquets_becomes_inputs(tmp_path: Path) -> None:
    """As `datasets` writes images."""
    (tmp_path / "in").mkdir()
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(3)]
    table = pa.table({"image": images, "caption": ["a", "a b", "c"], "score": [1.0, 2, 3]})
    for number in range(2):
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
    config = _init(tmp_path, tmp_path / "in")
    assert config["inputs"] == [f"{tmp_path}/in/*.parquet"]
    assert "input_tars" not in config
    assert config["models"] == ["opennsfw", "language-lid176", "image-stats", "text-stats"]
    assert config["additional_fields"] == ["caption", "score"]
    rows = d2m.head(tmp_path / "c.yml", 4).to_dict()["rows"]
    assert [row["text-words"] for row in rows] == [1, 2, 1, 1]
    with fsspec.open("memory://init-parquets/a.parquet", "wb") as file:
        pq.write_table(table, file)
    (tmp_path / "store").mkdir()
    config = _init(tmp_path / "store", "memory://init-parquets")
    assert config["inputs"] == ["memory://init-parquets/*.parquet"]
    assert config["additional_fields"] == ["caption", "score"]


def test_a_folder_of_pictures_becomes_inputs(tmp_path: Path) -> None:
    """With files beside them, or a captions file as `datasets` writes it; also of img2dataset."""
    for place in ("a", "b/c"):
        (tmp_path / "in" / place).mkdir(parents=True)
        (tmp_path / "in" / place / "1.jpg").write_bytes(jpeg())
    (tmp_path / "in" / "b/c/1.txt").write_text("a cat")
    (tmp_path / "in" / "b/c/1.json").write_text('{"uid": "0a", "url": "x"}')
    pq.write_table(pa.table({"uid": ["0a"], "url": ["x"]}), tmp_path / "in" / "00000.parquet")
    config = _init(tmp_path, tmp_path / "in")
    assert config["inputs"] == [f"{tmp_path}/in"]
    assert config["models"] == ["opennsfw", "language-lid176", "image-stats", "text-stats"]
    assert {"input_tars", "captions"}.isdisjoint(config)
    assert (
        "# 2 shards. Of the first 2 samples: jpg in 100%, json in 50%, txt in 50%."
        in (tmp_path / "c.yml").read_text()
    )
    captions = tmp_path / "in" / "metadata.jsonl"
    lines = [{"file_name": f"{place}/1.jpg", "text": "a dog", "n": 1} for place in ("a", "b/c")]
    captions.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "again").mkdir()
    config = _init(tmp_path / "again", tmp_path / "in")
    assert config["captions"] == str(captions)
    assert "n" in config["additional_fields"]
    rows = d2m.head(tmp_path / "again" / "c.yml").to_dict()["rows"]
    assert [(row["key"], row["text-words"], row["n"]) for row in rows] == [("1", 2, 1)] * 2


@pytest.mark.parametrize(
    ("name", "key"),
    [("data/train-0.parquet", "inputs"), ("a/b/0.tar", "input_tars"), ("a/0.tar.gz", "input_tars")],
)
def test_shards_in_folders_below_are_found(tmp_path: Path, name: str, key: str) -> None:
    """As the Hub lays a data set out; its folder's name is no pattern."""
    folder = tmp_path / "ds [1]"
    for place in (folder / name, folder / "other" / name):
        place.parent.mkdir(parents=True)
        if name.endswith(".parquet"):
            images = [{"bytes": jpeg(), "path": None}]
            pq.write_table(pa.table({"image": images, "text": ["a"]}), place)
        else:
            plain = _tar(tmp_path / "0.tar", 1, {"jpg": jpeg(), "txt": b"a"}).read_bytes()
            place.write_bytes(gzip.compress(plain) if name.endswith("gz") else plain)
    (folder / "README.md").write_text("# hi")
    config = _init(tmp_path, folder)
    assert next(iter(config)) == key
    assert d2m.head(tmp_path / "c.yml", 9).table.num_rows == 2


def test_what_was_looked_at_is_counted(tmp_path: Path) -> None:
    for name in "abcd":
        tar = _tar(tmp_path / "in" / f"{name}.tar", 2, {"jpg": jpeg(), "txt": b"a"})
    for place, told in (
        (tar.parent, "6 samples in 3 of 4 shards"),
        (tar, "2 samples in 1 of 1 shard"),
    ):
        ended = _d2m("init", place, "-o", tmp_path / f"{place.stem}.yml")
        assert ended.stdout.splitlines()[0] == f"looked at {told}"


@pytest.mark.parametrize("wrapped", [True, False])
def test_rows_without_a_picture_or_a_text_are_counted_as_such(
    tmp_path: Path, wrapped: bool
) -> None:
    """Each row counted as one with all that the parquet has columns for."""
    images: list[Any] = [jpeg(), None, None, jpeg()]
    if wrapped:
        images = [{"bytes": images[0], "path": "a"}, None, {"bytes": None, "path": "x"}, images[3]]
        images[3] = {"bytes": images[3], "path": None}
    table = pa.table({"image": images, "text": ["a", "b", None, "d"], "n": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "0.parquet")
    ended = _d2m("init", tmp_path / "0.parquet", "-o", tmp_path / "c.yml")
    assert "image in 50%" in (text := (tmp_path / "c.yml").read_text())
    assert "txt in 75%" in text
    assert "50% of these samples lack image or text" in ended.stdout
    status = d2m.submit(tmp_path / "c.yml", local=True).status()
    assert (status.complete, status.rows, status.rejected) == (True, 2, 2)


@pytest.mark.parametrize("kind", ["pictures", "tar", "json"])
def test_a_config_for_samples_of_which_many_lack_a_text_works(tmp_path: Path, kind: str) -> None:
    """Every shard failed: 50% were rejected, and 10% may be."""
    if kind == "pictures":
        (tmp_path / "in").mkdir()
        for i in range(10):
            (tmp_path / "in" / f"{i}.jpg").write_bytes(jpeg(i))
        rows = [{"file_name": f"{i}.jpg", "text": "a cat"} for i in range(5)]
        (tmp_path / "in" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        text = {"txt": b"a cat"} if kind == "tar" else {"json": b'{"caption": "a cat"}'}
        none = {} if kind == "tar" else {"json": b'{"caption": null}'}
        samples = [{"jpg": jpeg(i), **(text if i < 5 else none)} for i in range(10)]
        named = {f"{i}.{k}": v for i, members in enumerate(samples) for k, v in members.items()}
        (tmp_path / "in").mkdir()
        write_tar(tmp_path / "in" / "a.tar", named)
    ended = _d2m("init", tmp_path / "in", "-o", tmp_path / "c.yml")
    lacking = {"pictures": "text or JSON", "tar": "text", "json": "text"}[kind]
    told = f"50% of these samples lack {lacking}, and become no rows"
    assert f"\n{told}: see `max_rejected_fraction` in {tmp_path}/c.yml\n" in ended.stdout
    assert f"# {told};\n" in (tmp_path / "c.yml").read_text()
    status = d2m.submit(tmp_path / "c.yml", local=True).status()
    assert (status.complete, status.rows, status.rejected) == (True, 5, 5)


def test_a_config_for_whole_samples_rejects_no_more_than_usual(tmp_path: Path) -> None:
    members = {
        f"{i}.{kind}": data
        for i in range(40)
        for kind, data in {"jpg": jpeg(), "txt": b"a"}.items()
    }
    del members["7.txt"]
    write_tar(tmp_path / "a.tar", members)
    assert "max_rejected_fraction" not in _init(tmp_path, tmp_path / "a.tar")


def test_names_in_the_tars_are_no_lines_of_the_config(tmp_path: Path) -> None:
    odd = {"jpg": jpeg(), "x\nreprocess: true\n#": b"x"}
    fields: dict[str, Any] = {"a: int64": 1, "b\nreprocess: true": 2, "\ud800": 3, "on": "no"}
    config = _init(tmp_path, _tar(tmp_path / "a.tar", 2, odd, **fields))
    assert "reprocess" not in config
    assert config["additional_fields"] == ["uid", "on"]
    assert d2m.head(tmp_path / "c.yml", 1).table["on"].to_pylist() == ["no"]


def test_fields_with_the_name_of_a_model_s_column_are_aside(tmp_path: Path) -> None:
    """Such a config was refused, as a column is there once."""
    fields = {"image-brightness": 0.5, "text-words": 3, "n": 1}
    config = _init(tmp_path, _tar(tmp_path / "a.tar", 2, {"jpg": jpeg(), "txt": b"x"}, **fields))
    assert config["additional_fields"] == ["uid", "n"]
    text = (tmp_path / "c.yml").read_text()
    assert '# also in the JSON: ["image-brightness", "text-words"]' in text
    assert _d2m("plan", tmp_path / "c.yml").exit_code == 0


def test_what_init_refuses(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="found no tar, picture or parquet in"):
        d2m.init(tmp_path / "empty", tmp_path / "c.yml")
    audio = _tar(tmp_path / "a.tar", 2, {"wav": b"x"})
    with pytest.raises(ConfigError, match="found wav; valid are samples with images or texts"):
        d2m.init(audio, tmp_path / "c.yml")
    (tmp_path / "no.tar").write_bytes(b"no tar" * 500)
    with pytest.raises(ConfigError, match=r"found no sample in .*/no\.tar; valid are"):
        d2m.init(tmp_path / "no.tar", tmp_path / "c.yml")
    with pytest.raises(ConfigError, match="is a command; name a tar"):
        d2m.init("pipe:cat x.tar", tmp_path / "c.yml")
    assert not (tmp_path / "c.yml").exists()
    (tmp_path / "c.yml").write_text("mine: 1")
    with pytest.raises(ConfigError, match=r"c\.yml exists; name another file"):
        d2m.init(_tar(tmp_path / "b.tar", 2, {"txt": b"x"}), tmp_path / "c.yml")
    assert (tmp_path / "c.yml").read_text() == "mine: 1"


def test_init_loads_no_torch(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "a.tar", 1, {"jpg": jpeg()}, caption="x")
    code = (
        f"import sys, d2m_hpc; d2m_hpc.init({str(tar)!r}, 'c.yml'); print('torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


# --- doctor, and the help ---


def test_the_doctor_says_what_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"input_tars": "x.tar", "output_metadata_dir": str(tmp_path / "out")}
    path = write_config(tmp_path / "c.yml", STATS, **values)
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = _d2m("doctor", path)
    lines = dict(line[5:].split(": ", 1) for line in ended.stdout.splitlines())
    to_mend = {line[5:].partition(":")[0] for line in ended.stdout.splitlines() if line[:2] != "ok"}
    assert to_mend <= {"scratch"}  # this machine's disk may be nearly full
    assert (ended.exit_code, ended.stderr) == (len(to_mend), "")
    assert [*lines] == [
        *("d2m_hpc", "torch", "decoders", "Slurm", "scratch", "leases", "weights", "network")
    ]
    assert lines["Slurm"] == "there is no sbatch here; --local works"
    assert lines["leases"] == f"work in {tmp_path}"
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(workload, "cached_seconds", lambda folder: 300.0)  # as an NFS mount says
    assert "set lease_seconds: 600 in place of 120" in _d2m("doctor", path).stdout

    only = {"models": ["oai-clip-vit-b32"], "postprocess_columns": []}
    write_config(path, STATS, **values, **only, postprocess_features=[])
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so: cannot be opened')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ended = _d2m("doctor", path, "--json")
    assert ended.exit_code == 1
    found = {check["name"]: check for check in json.loads(ended.stdout)}
    assert found["torch"]["found"].endswith("ImportError: libcudart.so: cannot be opened")
    assert found["torch"]["mend"] == "install torch anew"
    assert found["weights"]["found"].startswith("0 of 1 that the config needs are here")
    assert found["weights"]["mend"] == f"d2m weights fetch {path}"
    assert "HF_HUB_OFFLINE" in found["network"]["found"]


def test_the_doctor_knows_weights_that_a_submit_refuses(tmp_path: Path) -> None:
    """They were called here, and right."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "ViT-B-32.pt").write_bytes(b"another file")
    values = {"input_tars": "x.tar", "output_metadata_dir": str(tmp_path / "out")}
    only = {"models": ["oai-clip-vit-b32"], "postprocess_columns": ["oai-clip-vit-b32-score"]}
    path = write_config(tmp_path / "c.yml", STATS, **values, **only, postprocess_features=[])
    folder = tmp_path / "weights"
    assert (
        f"mend weights: 0 of 1 that the config needs are here ({folder}); not the published file: "
        f"ViT-B-32.pt; d2m weights fetch {path}"
    ) in _d2m("doctor", path).stdout.splitlines()
    write_config(path, yaml.safe_load(path.read_text()), allow_unpublished_weights=True)
    assert "ok   weights: 1 of 1" in _d2m("doctor", path).stdout


def test_a_slurm_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'no host\nno source' >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    lines = _d2m("doctor").stdout.splitlines()
    assert [line[:4] for line in lines if line[5:].startswith("Slurm: ")] == ["mend"]
    assert "mend Slurm: does not answer: no source; ask who runs it, or use --local" in lines


def test_a_folder_in_place_of_a_config_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give a YAML config, such as `d2m init`"):
        load(tmp_path)


def test_version_help_and_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _d2m("--version").stdout == f"d2m_hpc {d2m.__version__}\n"
    assert "Example: d2m head laion.yml" in _d2m("head", "-h").stdout
    words = [sys.executable, "-m", "d2m_hpc", "--version"]
    assert subprocess.run(words, capture_output=True, text=True).stdout.startswith("d2m_hpc ")
    for name, value in {"_D2M_COMPLETE": "complete_bash", "COMP_WORDS": "d2m exp"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMP_CWORD", "1")
    assert CliRunner().invoke(app, [], prog_name="d2m").stdout.split() == ["export"]


# --- head ---


def _tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_head_is_the_beginning_of_what_a_run_computes_and_writes_nothing(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 3)
    values = {"input_tars": str(tmp_path / "tars"), "output_metadata_dir": str(tmp_path / "out")}
    path = write_config(tmp_path / "c.yml", STATS, **values)
    before = _tree(tmp_path)
    found = d2m.head(path, 7)
    assert _tree(tmp_path) == before
    run = d2m.submit(path, local=True)
    assert found.table.equals(run.table().slice(0, 7))
    keys, histograms = run.features("image-histogram").array()
    assert keys[:7] == found.table["key"].to_pylist()
    assert (histograms[:7] == found.features["image-histogram"]).all()
    before = _tree(tmp_path)
    assert len(json.loads(_d2m("head", path, 2, "--json").stdout)["rows"]) == 2
    assert _tree(tmp_path) == before


def test_head_shows_rejections_and_goes_past_empty_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "0.tar", {})
    write_tar(tmp_path / "tars" / "1.tar", {"a.jpg": b"no picture", "a.txt": b"x", "a.json": b"{}"})
    _tar(tmp_path / "tars" / "2.tar", 3, {"jpg": jpeg(), "txt": b"x"}, caption="x")
    values = {"input_tars": str(tmp_path / "tars"), "output_metadata_dir": str(tmp_path / "out")}
    path = write_config(tmp_path / "c.yml", STATS, **values, allow_missing_fields=True)
    ended = _d2m("head", path, 3)
    assert ended.exit_code == 0
    assert "rejected a: " in ended.stdout
    assert "2 samples, 1 rejected; nothing was written" in ended.stdout


def test_head_tells_what_would_fail(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    code = custom_file("own", before="raise ValueError('as it does')")
    path = custom_config(tmp_path, code, "own")
    with pytest.raises(D2MError, match="as it does"):
        d2m.head(path)
    write_config(path, STATS, input_tars=str(tmp_path / "none"), output_metadata_dir="out")
    with pytest.raises(ConfigError, match="found no tar for"):
        d2m.head(path)
    write_tar(tmp_path / "empty.tar", {})
    write_config(path, STATS, input_tars=str(tmp_path / "empty.tar"), output_metadata_dir="out")
    with pytest.raises(D2MError, match=r"no samples in the first of 1 shard; look at .*empty\.tar"):
        d2m.head(path)
