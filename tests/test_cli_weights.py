"""`d2m weights` as a user runs it: the kit's files in their published names, from a mirror."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
from hubs import Hub, serving, serving_folder
from huggingface_hub import constants
from kit import CHECKPOINTS, DATACOMP, d2m, write_config
from models.families.test_open_clip import CLIP
from models.families.test_open_clip import export as export_clip
from timm.models import save_for_hf
from tiny_nets import vit

from d2m_hpc.cli.commands import app
from d2m_hpc.config import load
from d2m_hpc.errors import ConfigError, D2MError, WeightsError
from d2m_hpc.models import weights
from d2m_hpc.models.families.stats import StatsOfText
from d2m_hpc.models.published import HubRepo
from d2m_hpc.plan.workload import inspect

NO_OUTPUT: dict[str, Any] = {
    "postprocess_columns": [],
    "postprocess_features": [],
    "allow_unpublished_weights": True,
}


@pytest.fixture
def folder(weights_mirror: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights folder, which is to be made."""
    for name, value in weights_mirror.items():
        monkeypatch.setenv(name, value)
    return Path(weights_mirror["D2M_WEIGHTS"])


def _config(tmp_path: Path, **more: Any) -> Path:
    common = {"input_tars": "a.tar", "output_metadata_dir": str(tmp_path / "out")}
    return write_config(tmp_path / "c.yml", {**DATACOMP, **common, **more})


def _weights(*words: object) -> None:
    app(["weights", *map(str, words)], standalone_mode=False)


def _files(folder: Path) -> dict[str, int]:
    """Sizes of all that is in a weights folder but the lock file."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "weights.lock.json"]
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}


def test_from_nothing_to_all_that_a_config_needs(
    folder: Path, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, allow_unpublished_weights=True)
    _weights("list", config)
    assert capsys.readouterr().out.count("missing") == len(CHECKPOINTS)
    _weights("fetch", config)
    said = capsys.readouterr().out
    assert _files(folder) == {name: _files(checkpoints)[name] for name in CHECKPOINTS}
    accepted = [c.name for c in CHECKPOINTS.values() if c.sha256]
    for name in accepted:
        line = rf"^not the published file {folder / name} \(accepted: allow_unpublished_weights"
        assert re.search(line, said, re.MULTILINE), name
    assert said.count("ok  ") == len(CHECKPOINTS) - len(accepted)
    locked = json.loads((folder / "weights.lock.json").read_bytes())["files"]
    fetched = {name: size for name, size in _files(folder).items() if name not in accepted}
    assert {name: file["size"] for name, file in locked.items()} == fetched
    _weights("check", config)
    assert capsys.readouterr().out == said
    _weights("list", config)
    listed = capsys.readouterr().out
    assert "missing" not in listed
    assert [name for name in CHECKPOINTS if str(folder / name) not in listed] == []


def test_a_mirror_s_own_files_are_refused_by_default(folder: Path, tmp_path: Path) -> None:
    ended = d2m("weights", "fetch", _config(tmp_path))
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    published = [c for c in CHECKPOINTS.values() if c.sha256]
    assert ended.stderr.count("sent a file of sha256") == len(published)
    assert _files(folder).keys() == {c.name for c in CHECKPOINTS.values() if not c.sha256}


def test_a_mirror_that_lacks_a_file_gives_the_others(
    folder: Path, tmp_path: Path, weights_mirror: dict[str, str]
) -> None:
    config = _config(tmp_path, models=["faces-scrfd10g"], **NO_OUTPUT)
    address = weights_mirror["D2M_WEIGHTS_MIRROR"] + "/nowhere"
    message = f"{address}/scrfd_10g.pt: the server answers 404 .*copy to {folder}/scrfd_10g.pt"
    with pytest.raises(WeightsError, match=message):
        _weights("fetch", config, "--mirror", address)


def test_the_option_wins_over_the_environment(
    folder: Path, tmp_path: Path, weights_mirror: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2M_WEIGHTS_MIRROR", "http://127.0.0.1:9")
    empty = {"postprocess_columns": [], "postprocess_features": []}
    config = _config(
        tmp_path, models=["dedup-isc-ft-v107"], allow_unpublished_weights=True, **empty
    )
    _weights("fetch", config, "--mirror", weights_mirror["D2M_WEIGHTS_MIRROR"])
    assert _files(folder).keys() == {"isc_ft_v107.pth.tar", "eval_dedup_embeddings.pt"}


# --- repositories of the hub, and what custom files declare ---

STATS = ["text-stats"]
OWN = """
from torch import nn

class Own(nn.Module):
    name, raw_inputs, preprocessors = "own", ["text"], ["identity"]
    checkpoints = ["mine.pth"]

model_lookup = {"own": Own}
"""


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a repository that `text-stats` needs in these tests."""
    monkeypatch.setattr(StatsOfText, "checkpoints", lambda self, use: [HubRepo("Org/net")])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("D2M_WEIGHTS_MIRROR")
    with serving() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.put("Org/net", config__json=b"{}", model__safetensors=bytes(2000))
        yield running


def test_a_repository_is_listed_fetched_and_checked(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, **{**NO_OUTPUT, "allow_unpublished_weights": False}, models=STATS)
    place, net = folder / "hub/Org--net@main", folder / "hub/Org--net@main/model.safetensors"
    _weights("list", config)
    assert re.search(rf"{place}.*missing.*{hub.url}/Org/net at main", capsys.readouterr().out)
    with pytest.raises(WeightsError, match="is missing; it is published at"):
        _weights("check", config)
    assert capsys.readouterr().out.count(str(place)) == 1
    hub.ways = ["right", "right", "404"]
    with pytest.raises(WeightsError, match="/Org/net: the server answers 404"):
        _weights("fetch", config)
    _weights("list", config)
    assert re.search(rf"{place}.*2 bytes, partial", capsys.readouterr().out)
    _weights("fetch", config)
    commit = next(iter(hub.commits))[:12]
    assert f"present  {place} (2 files, 2.0 kB, main is {commit})" in capsys.readouterr().out
    _weights("check", config)
    _weights("list", config)
    assert re.search(rf"{place}.*2.0 kB, present.*{commit}", capsys.readouterr().out)
    net.write_bytes(bytes(1999))
    with pytest.raises(WeightsError, match=rf"{net} has sha256 .*, published is "):
        _weights("check", config)
    assert f"changed  {place}" in capsys.readouterr().out


def test_a_mirror_with_a_lock_file_gives_repositories_too(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path, models=STATS, **NO_OUTPUT)
    _weights("fetch", config)
    before = _files(folder)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with serving_folder(folder) as mirror:
        monkeypatch.setenv("D2M_WEIGHTS", str(tmp_path / "other"))
        _weights("fetch", config, "--mirror", mirror)
        assert _files(tmp_path / "other") == before
        monkeypatch.setenv("D2M_WEIGHTS", str(tmp_path / "third"))
        told = f"{mirror}/none/weights.lock.json: the server answers 404"
        with pytest.raises(WeightsError, match=told):
            _weights("fetch", config, "--mirror", f"{mirror}/none")
        (folder / "weights.lock.json").write_bytes(b"{")
        told = f"^{mirror}/weights.lock.json cannot be read: it is no lock file"
        with pytest.raises(WeightsError, match=told):
            _weights("fetch", config, "--mirror", mirror)


def test_a_hash_that_a_config_gives_of_a_file_at_hand_is_checked(tmp_path: Path) -> None:
    (net := tmp_path / "mine.npz").write_bytes(b"net")
    head = {"kind": "head", "on": "stats-histogram", "checkpoint": str(net), "sha256": "0" * 64}
    keys = {**NO_OUTPUT, "allow_unpublished_weights": False}
    keys["models"] = [{"stats": {"kind": "image-stats"}}, {"own": head}]
    with pytest.raises(WeightsError, match=rf"{net} has sha256 \w+, the config says 000") as caught:
        _weights("check", _config(tmp_path, **keys))
    assert "weights fetch" not in str(caught.value)
    head["sha256"] = weights.sha256_of(net)
    _weights("check", _config(tmp_path, **keys))


def test_the_checkpoints_of_a_custom_file_are_listed_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    config = _config(tmp_path, models=["own"], custom_pypath=str(tmp_path / "own.py"), **NO_OUTPUT)
    _weights("list", config)
    assert re.search(
        rf"{tmp_path}/mine.pth.*missing.*declared by a custom", capsys.readouterr().out
    )
    with pytest.raises(WeightsError, match=r"mine.pth is missing; a custom file declares it"):
        _weights("check", config)
    (tmp_path / "mine.pth").write_bytes(b"net")
    capsys.readouterr()
    _weights("check", config)
    assert capsys.readouterr().out == f"ok       {tmp_path}/mine.pth\n"


# --- files that cannot be used ---

DAMAGES = {
    "cut": lambda data: data[:-2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "other": lambda data: b"[]",
}
NETS = {
    "vit": {"kind": "image-classification", "checkpoint": "Org/vit"},
    "clip": {"kind": "open_clip", "model": "hf-hub:Org/clip"},
    "timm": {"kind": "timm", "model": "hf-hub:Org/timm"},
}


@pytest.fixture
def nets(hub: Hub, tmp_path: Path) -> Path:
    """A config of checkpoints that are fetched from a hub."""
    export_clip(tmp_path / "nets/clip", CLIP)
    vit(tmp_path / "nets/vit", id2label={0: "a", 1: "b"})
    made = timm.create_model("test_resnet", num_classes=2)
    save_for_hf(made, str(tmp_path / "nets/timm"), safe_serialization="both")
    for folder in (tmp_path / "nets").iterdir():
        found = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        hub.put_files(f"Org/{folder.name}", found)
    models = [{name: given} for name, given in NETS.items()]
    columns = ["vit-a", "clip-score", "timm-label"]
    config = _config(tmp_path, **{**NO_OUTPUT, "postprocess_columns": columns}, models=models)
    _weights("fetch", config)
    return config


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_configs_are_told_and_mended(
    damage: str, nets: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = [
        folder / "hub/Org--vit@main/config.json",
        folder / "hub/Org--vit@main/preprocessor_config.json",
        folder / "hub/Org--clip@main/open_clip_config.json",
        folder / "hub/Org--timm@main/config.json",
    ]
    before = _files(folder)
    for path in damaged:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    text = nets.read_text().replace("allow_unpublished_weights: true", "")
    nets.write_text(text)
    _weights("list", nets)
    assert capsys.readouterr().out.count("changed") == 3
    with pytest.raises(WeightsError) as caught:
        _weights("check", nets)
    assert [p for p in damaged if f"{p} has sha256" not in str(caught.value)] == []
    assert capsys.readouterr().out.count("changed  ") == 3
    with pytest.raises(ConfigError) as refused:
        inspect(load(nets), str(nets))
    told = str(refused.value)
    assert [p for p in damaged if f"{p} has sha256" not in told] == []
    assert f"run `d2m weights fetch {nets}`" in told
    _weights("fetch", nets)
    _weights("check", nets)
    assert _files(folder) == before


def test_a_repository_that_is_no_model_of_the_kind_is_told_with_the_kind_that_fits(
    hub: Hub, nets: Path, tmp_path: Path
) -> None:
    files = hub.revisions["Org/vit"]["main"]
    hub.put_files("Org/bare", {n: d for n, d in files.items() if "safetensors" not in n})
    hub.put_files("Org/blind", {n: d for n, d in files.items() if "processor" not in n})
    own = json.loads(files["config.json"]) | {
        "model_type": "vitx",
        "auto_map": {"AutoModel": "x.Y"},
    }
    hub.put_files("Org/own", {**files, "config.json": json.dumps(own).encode()})
    for given, told in {
        ("open_clip", "hf-hub:Org/vit"): "no open_clip_config.json.*`kind: image-classification`",
        ("open_clip", "hf-hub:Org/timm"): "no open_clip_config.json.*`kind: timm`",
        ("timm", "hf-hub:Org/vit"): "holds no model of timm.*`kind: image-classification`",
        (
            "timm",
            "hf-hub:Org/clip",
        ): "has no config.json.*so it is no model of timm; `kind: open_clip`",
        ("image-classification", "Org/timm"): "`kind: timm`",
        ("image-classification", "Org/bare"): "no file of weights.*; choose another repository or",
        ("image-classification", "Org/blind"): "no image processor.*; copy the repository to a fo",
        ("image-classification", "Org/own"): "vitx'; code of a repository .auto_map. is not run",
    }.items():
        kind, name = given
        entry = {"kind": kind, "checkpoint" if kind.startswith("image") else "model": name}
        config = _config(tmp_path, **NO_OUTPUT, models=[{"net": entry}])
        with pytest.raises(D2MError, match=f"(?s){told}|has none of config.json"):
            _weights("fetch", config)
        with pytest.raises(ConfigError, match=f"(?s){told}"):
            inspect(load(config), str(config))


def test_one_format_of_a_net_is_fetched(nets: Path, folder: Path) -> None:
    found = {p.name for p in (folder / "hub/Org--timm@main").iterdir()}
    assert found == {"config.json", "model.safetensors"}


def test_a_repository_never_asked_for_is_told_once(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nets = [{"a": {"kind": "text-embedding", "checkpoint": "Org/net"}}]
    nets += [{"b": {"kind": "timm", "model": "hf-hub:Org/net"}}]
    config = _config(tmp_path, **{**NO_OUTPUT, "allow_unpublished_weights": False}, models=nets)
    with pytest.raises(ConfigError) as caught:
        inspect(load(config), str(config))
    assert str(caught.value).count("is missing; it is published") == 1
    with pytest.raises(WeightsError):
        _weights("check", config)
    assert f"missing  {folder}/hub/Org--net@main (main)" in capsys.readouterr().out
    _weights("list")
    listed = capsys.readouterr().out
    assert "declared by" not in listed
    assert "an installed package" in listed


def test_names_of_another_form_say_the_right_one(tmp_path: Path) -> None:
    for entry, told in (
        (
            {"kind": "open_clip", "model": "acme/net"},
            "unknown model 'acme/net'.*'hf-hub:acme/net', a folder './acme/net'",
        ),
        (
            {"kind": "timm", "model": "acme/x.y"},
            "unknown model 'acme/x'.*'hf-hub:acme/x.y', a folder './acme/x.y'",
        ),
        ({"kind": "siglip2-b16-224"}, "is the plain name of a model.*`- siglip2-b16-224`"),
    ):
        with pytest.raises(ConfigError, match=f"(?s){told}"):
            load(_config(tmp_path, **NO_OUTPUT, models=[{"net": entry}]))


def test_a_misspelt_folder_that_reads_as_a_repository_is_told_as_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    entry = {"kind": "text-classification", "checkpoint": "nets/mien"}
    config = _config(tmp_path, **NO_OUTPUT, models=[{"net": entry}])
    told = rf"co/nets/mien; {tmp_path}/nets has no 'mien'; did you mean 'mine'"
    with pytest.raises(ConfigError, match=told):
        inspect(load(config), str(config))
