"""Repositories of the hub are fetched by its real client, from a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hubs import TOKEN, Hub, commit_of, serving
from huggingface_hub import constants
from kit import write_config, write_shards
from safetensors.numpy import save

from d2m_hpc.cli import trouble
from d2m_hpc.config import load
from d2m_hpc.errors import ConfigError, WeightsError
from d2m_hpc.models import download, weights
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.families.stats import StatsOfText
from d2m_hpc.models.family import ModelSpec
from d2m_hpc.models.hub import Wish, fetch
from d2m_hpc.models.lock import Lock
from d2m_hpc.models.published import Checkpoint, HubRepo
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run import frozen

NET = save({"weights": np.frombuffer(os.urandom(100_000), np.float16)})
REPO = HubRepo("Org/net")
WISH = Wish(lambda name: nullcontext(lambda done, total: None))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(download, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.put("Org/net", config__json=b"{}", model__safetensors=NET, vocab__txt=b"<s>\n</s>")
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def _names(folder: Path, repo: HubRepo = REPO) -> list[str]:
    place = folder / repo.name
    return sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())


def _state(folder: Path, repo: HubRepo = REPO) -> str:
    return weights.survey(repo, folder, Lock.read(folder)).state


# --- what is fetched ---


def test_a_folder_of_plain_files_and_a_lock_file(hub: Hub, folder: Path) -> None:
    commit = hub.put("Org/net", config__json=b"{}", model__safetensors=NET, notes__txt=b"")
    found = fetch(REPO, folder, WISH)
    assert (found.state, found.commit, found.size) == ("present", commit, len(NET) + 2)
    assert folder / "hub/Org--net@main" == found.place
    assert _names(folder) == ["config.json", "model.safetensors", "notes.txt"]
    assert (found.place / "model.safetensors").read_bytes() == NET
    assert sorted(p.name for p in folder.iterdir()) == ["hub", "weights.lock.json"]
    [locked] = json.loads((folder / "weights.lock.json").read_bytes())["repositories"].values()
    assert (locked["repo_id"], locked["revision"], locked["commit"]) == ("Org/net", "main", commit)
    expected = {"config.json": b"{}", "model.safetensors": NET, "notes.txt": b""}
    told = {name: (file["size"], file["sha256"]) for name, file in locked["files"].items()}
    assert told == {n: (len(d), hashlib.sha256(d).hexdigest()) for n, d in expected.items()}


def test_only_the_files_that_are_needed_are_asked_for(hub: Hub, folder: Path) -> None:
    kept = ("1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.model")
    left = ("pytorch_model.bin", "tf_model.h5", "onnx/config.json", "onnx/model.onnx", "README.md")
    left = (*left, "flax_model.msgpack", ".gitattributes", "training_args.bin", "runs/a.json")
    hub.put_files("Org/net", {name: NET for name in (*kept, *left)})
    fetch(REPO, folder, WISH)
    assert _names(folder) == sorted(kept)
    assert {a.split("/", 3)[-1] for a in hub.asked if "/lfs/" in a} == {*kept}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("*.bin", "*.safetensors"), ["a/x.safetensors", "b/x.bin"]),
        (("*.bin", "*.safetensors", "a/x.bin"), ["a/x.bin", "a/x.safetensors", "b/x.bin"]),
        (("a/x.bin", "a/x.safetensors"), ["a/x.safetensors"]),
        (("a/x.bin", "a/y.safetensors"), ["a/x.bin"]),
        (("a/*.json",), ["a/x.json"]),
    ],
)
def test_patterns_choose_and_exact_names_are_always_kept(
    files: tuple[str, ...], expected: list[str]
) -> None:
    names = ["a/x.bin", "a/x.safetensors", "a/x.json", "b/x.bin", "b/x.h5"]
    assert HubRepo("a/b", files=files).selected(names) == expected


def test_without_safetensors_the_other_format_is_taken() -> None:
    names = ["config.json", "pytorch_model.bin", "tf_model.h5", "training_args.bin"]
    assert HubRepo("a/b").selected(names) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.fp16.safetensors", "model.safetensors"], ["model.safetensors"]),
        (["config.json", "model.fp16.safetensors"], ["config.json", "model.fp16.safetensors"]),
        (["model.safetensors", "sub/model.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin", "sub/model.safetensors"], ["pytorch_model.bin"]),
        (
            ["2_Dense/model.safetensors", "model.safetensors", "modules.json"],
            ["2_Dense/model.safetensors", "model.safetensors", "modules.json"],
        ),
    ],
)
def test_weights_that_nothing_reads_are_left_out(names: list[str], expected: list[str]) -> None:
    assert HubRepo("a/b").selected(names) == expected


def test_patterns_that_match_nothing_are_told_with_what_there_is(hub: Hub, folder: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"none of \*.ckpt at \w{12}; its files: config.json, model"
    ):
        fetch(HubRepo("Org/net", files=("*.ckpt",)), folder, WISH)


# --- one commit for all ---


def test_a_repository_without_a_models_files_is_not_locked_and_never_passes(
    hub: Hub, folder: Path
) -> None:
    hub.put_files("Org/net", {"README.md": b"soon"})
    with pytest.raises(WeightsError, match=r"no file of a model at .*its files: README.md"):
        fetch(REPO, folder, WISH)
    assert Lock.read(folder).repositories == {}
    hub.put_files("Org/net", {"model.safetensors": NET, "config.json": b"{}"})
    fetch(REPO, folder, WISH)
    held = Lock.read(folder)
    held.repositories[REPO.name] = replace(held.repositories[REPO.name], files={})
    # By hand, or by an earlier version: then the folder itself is missing.
    [needed] = held.of(REPO, folder)
    assert needed.name == REPO.name


@pytest.mark.parametrize(
    ("files", "lacking"),
    [
        ({"model.safetensors": NET}, "has no config.json at"),
        ({"config.json": b"{}"}, "has no file of weights"),
    ],
)
def test_a_fetched_repository_that_is_no_model_is_refused_at_submit(
    files: dict[str, bytes], lacking: str, hub: Hub, folder: Path, tmp_path: Path
) -> None:
    hub.put_files("Org/net", files)
    model = {"kind": "image-classification", "checkpoint": "Org/net"}
    fetch(REPO, folder, WISH)
    write_shards(tmp_path / "tars", 1)
    config = write_config(
        tmp_path / "c.yml",
        {"models": [{"net": model}], "postprocess_features": [], "weights_dir": str(folder)},
        input_tars=str(tmp_path / "tars"),
        output_metadata_dir=str(tmp_path / "out"),
    )
    with pytest.raises(ConfigError, match=lacking):
        inspect(load(config), str(config))


def test_a_second_fetch_has_the_locked_commit_until_it_is_asked_to_update(
    hub: Hub, folder: Path
) -> None:
    first = fetch(REPO, folder, WISH).commit
    newer = os.urandom(90_000)
    second = hub.put("Org/net", config__json=b"{ }", model__safetensors=newer)
    (folder / REPO.name / "model.safetensors").unlink()
    found = fetch(REPO, folder, WISH)
    assert (found.commit, found.state) == (first, "present")
    assert (found.place / "model.safetensors").read_bytes() == NET
    asked = len(hub.asked)
    fetch(REPO, folder, WISH)
    assert len(hub.asked) == asked  # nobody is asked for what is there
    found = fetch(REPO, folder, replace(WISH, update=True))
    assert (found.commit, found.state) == (second, "present")
    assert (found.place / "model.safetensors").read_bytes() == newer
    assert (found.place / "config.json").read_bytes() == b"{ }"
    assert _names(folder) == ["config.json", "model.safetensors"]  # the vocabulary is gone


def test_another_config_s_patterns_add_files_of_the_same_commit(hub: Hub, folder: Path) -> None:
    first = fetch(HubRepo("Org/net", files=("*.json",)), folder, WISH).commit
    hub.put("Org/net", config__json=b"[]", model__safetensors=NET[::-1])
    assert _state(folder) == "partial"
    assert fetch(REPO, folder, WISH).commit == first
    assert (folder / REPO.name / "model.safetensors").read_bytes() == NET


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/7", "../up", "%2e%2e"])
def test_a_revision_is_no_path(revision: str, hub: Hub, folder: Path) -> None:
    commit = hub.put("Org/net", revision, config__json=b"{}")
    repo = HubRepo("Org/net", revision)
    assert fetch(repo, folder, WISH).commit == commit
    assert [p.parent.name for p in [folder / repo.name]] == ["hub"]
    assert _names(folder, repo) == ["config.json"]


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "../a", "a/..", "a b", "/a", "a--b", "a\n", "*"])
def test_a_name_that_no_repository_has_is_refused(repo_id: str) -> None:
    with pytest.raises(ValueError, match="owner/name"):
        HubRepo(repo_id)


@pytest.mark.parametrize("name", ["../../escaped.json", "/etc/escaped.json", "a//b.json"])
def test_a_file_that_would_lead_out_of_the_folder_is_refused(
    name: str, hub: Hub, folder: Path
) -> None:
    hub.put_files("Org/net", {name: b"{}"})
    with pytest.raises(WeightsError, match="no name of a file"):
        fetch(REPO, folder, WISH)
    assert not folder.exists()


# --- transfers that go wrong ---


def test_a_cut_connection_is_resumed_in_the_call_and_in_the_next_one(
    hub: Hub, folder: Path
) -> None:
    repo = HubRepo("Org/net", files=("model.safetensors",))
    hub.ways = ["right", "right", "breaks", "right", "404"]  # the answer, the redirect, the file
    with pytest.raises(WeightsError, match="404"):
        fetch(repo, folder, WISH)
    hub.asked.clear()
    fetch(repo, folder, WISH)
    assert (folder / repo.name / "model.safetensors").read_bytes() == NET
    assert [asked.split()[-1] for asked in hub.asked] == [f"bytes={len(NET) // 2}-"] * 2
    assert _names(folder) == ["model.safetensors"]


def test_another_file_than_the_commit_has_is_not_kept(hub: Hub, folder: Path) -> None:
    small = HubRepo("Org/net", files=("config.json",))
    hub.ways = ["right", "other"]
    with pytest.raises(WeightsError, match=r"config.json: another file came"):
        fetch(small, folder, WISH)
    hub.ways = ["right", "other"]  # the redirect, the file
    with pytest.raises(WeightsError, match=r"sent a file of sha256 .*, published is "):
        fetch(HubRepo("Org/net", files=("*.safetensors",)), folder, WISH)
    assert _names(folder) == []


@pytest.mark.parametrize("tries", [1, 9])
def test_too_many_requests_are_repeated_within_limits(tries: int, hub: Hub, folder: Path) -> None:
    hub.ways = ["429"] * tries
    if tries == 1:
        assert fetch(REPO, folder, WISH).state == "present"
        return
    with pytest.raises(WeightsError, match=r"/Org/net: .*429; too many requests.*wait some min"):
        fetch(REPO, folder, WISH)
    assert len(hub.asked) == download.TRIES


@pytest.mark.parametrize("answer", ["<html>", "[]", "{}"])
def test_what_is_no_hub_s_answer_is_told_so(answer: str, hub: Hub, folder: Path) -> None:
    hub.ways = [answer]
    with pytest.raises(WeightsError, match=rf"{hub.url} gives no hub's answer: \w+"):
        fetch(REPO, folder, WISH)


def test_a_hub_that_hangs_is_given_up(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    hub.ways = ["hangs"] * 9
    with pytest.raises(WeightsError, match=r"cannot be reached: ReadTimeout.*; try again, or set"):
        fetch(REPO, folder, WISH)


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        (
            HubRepo("Org/nett"),
            r"/Org/nett: the server answers 401; .*misspelt.*HF_TOKEN; a folder at.* './Org/n",
        ),
        (HubRepo("Org/net", "v9"), r"/Org/net has no revision 'v9': valid is a branch, a tag or"),
    ],
)
def test_an_unknown_repository_or_revision(
    repo: HubRepo, message: str, hub: Hub, folder: Path
) -> None:
    with pytest.raises(WeightsError, match=message):
        fetch(repo, folder, WISH)


def test_a_gated_repository_says_how_to_get_it_and_a_token_opens_it(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated = {"Org/net"}
    with pytest.raises(WeightsError, match=r"401 .*accept its licence.*`hf auth login` or set HF_"):
        fetch(REPO, folder, WISH)
    hub.ways = ["403"]  # as some hubs answer where there is no token
    with pytest.raises(WeightsError, match=r"403 .*accept its licence.*`hf auth login` or set HF_"):
        fetch(REPO, folder, WISH)
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(WeightsError, match=r"403 .*account of your token") as caught:
        fetch(REPO, folder, WISH)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch(REPO, folder, WISH).state == "present"
    written = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert (TOKEN.encode() in written, "hf_of" in str(caught.value)) == (False, False)
    assert hub.leaked == []  # the server of large files is another one


def test_a_gated_repository_that_was_renamed_is_named_and_a_token_opens_it(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub leads to the new name itself, where it must be told again who asks."""
    hub.put("Org/new", config__json=b"{}", model__safetensors=NET)
    hub.gated, hub.renamed = {"Org/new"}, {"Org/net": "Org/new"}
    told = (
        r"Org/net: the server answers 401 .* for http\S+/Org/new/resolve/\S+, to which it redir.*"
    )
    with pytest.raises(WeightsError, match=f"{told}gated, private, renamed or misspelt"):
        fetch(REPO, folder, WISH)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch(REPO, folder, WISH).state == "present"
    assert hub.leaked == []


@pytest.mark.parametrize("given", ["nonsense", "file:///tmp", "https://"])
def test_an_address_that_is_no_hubs_is_told(
    given: str, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", given)
    told = f"Org/net: HF_ENDPOINT is '{given.rstrip('/')}'; valid is the URL of a hub"
    with pytest.raises(WeightsError, match=re.escape(told)):
        fetch(REPO, folder, WISH)


def test_a_token_that_cannot_be_read_is_told(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))  # a folder
    with pytest.raises(WeightsError, match=r"cannot be read as a token; `hf auth login` again"):
        fetch(REPO, folder, WISH)


def test_no_network_and_the_offline_switch(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(REPO, folder, WISH)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(REPO, folder, WISH).state == "present"
    with pytest.raises(WeightsError, match=r"cannot be reached: ConnectError.*set HF_ENDPOINT"):
        fetch(HubRepo("Org/other"), folder, WISH)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:10")
    with pytest.raises(WeightsError, match=r"reached by the proxy 127\.0\.0\.1:10: Conn") as told:
        fetch(HubRepo("Org/other"), folder, WISH)
    assert "secret" not in str(told.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(REPO, folder, WISH).state == "present"
    with pytest.raises(WeightsError, match="switched off here; unset HF_HUB_OFFLINE"):
        fetch(HubRepo("Org/other"), folder, WISH)


# --- what a submit and a task see ---


def _require(folder: Path, allow_unpublished: bool = False, **more: Any) -> dict[str, str]:
    checked = weights.check([ModelSpec("m", checkpoints=(REPO,))], folder, **more)
    return weights.require(checked, allow_unpublished, "c.yml")


def test_a_submit_reads_no_file_that_is_as_it_was_fetched(hub: Hub, folder: Path) -> None:
    fetch(REPO, folder, WISH)
    read: list[Path] = []
    digest = Lock.read(folder).digest(folder, lambda p: (read.append(p), weights.sha256_of(p))[1])
    hashes = _require(folder, digest=digest)
    assert hashes[f"{REPO.name}/model.safetensors"] == hashlib.sha256(NET).hexdigest()
    assert (len(hashes), read) == (3, [])
    os.utime(folder / REPO.name / "config.json")
    assert _require(folder, digest=digest) == hashes
    assert [p.name for p in read] == ["config.json"]


def test_missing_and_changed_files_are_told_one_by_one(hub: Hub, folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"hub/Org--net@main is missing; .*/Org/net(.|\n)*fetch"):
        _require(folder)
    assert _state(folder) == "missing"
    fetch(REPO, folder, WISH)
    assert (_require(folder).keys(), _state(folder)) == (
        {f"{REPO.name}/{n}" for n in _names(folder)},
        "present",
    )
    (folder / REPO.name / "config.json").write_bytes(b"[]")
    digest = hashlib.sha256(b"[]").hexdigest()
    with pytest.raises(
        WeightsError, match=rf"config.json has sha256 {digest}, published is 44136f"
    ):
        _require(folder)
    assert _state(folder) == "changed"
    assert _require(folder, True)[f"{REPO.name}/config.json"] == digest
    (folder / REPO.name / "config.json").unlink()
    assert _state(folder) == "partial"
    with pytest.raises(WeightsError, match=r"config.json is missing; .*/resolve/[0-9a-f]{40}/conf"):
        _require(folder, True)


def test_a_folder_without_a_lock_file_is_accepted_on_request_only(hub: Hub, folder: Path) -> None:
    fetch(REPO, folder, WISH)
    (folder / "weights.lock.json").unlink()
    with pytest.raises(WeightsError, match=r"weights.lock.json beside it does not name it") as told:
        _require(folder)
    assert str(told.value).count("does not name it, nor 2 more files") == 1
    assert len(str(told.value).splitlines()) == 3
    assert (_state(folder), len(_require(folder, True))) == ("not locked", 3)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"files": {"a": {"size": "x"}}}'])
def test_a_damaged_lock_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.lock.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights.lock.json cannot be read: .*restore it"):
        Lock.read(tmp_path)


@pytest.mark.parametrize(
    "name", ["../../.bashrc", "/etc/cron.d/x", "a//b", "a/./b", "a\\b", "", "a\nb", "x" * 300]
)
@pytest.mark.parametrize("place", ["files", "repositories", "names", "commit"])
def test_a_lock_file_whose_names_lead_elsewhere_is_refused(
    place: str, name: str, tmp_path: Path
) -> None:
    file = {"size": 1, "sha256": "12ab", "modified_ns": 1}
    repo = {"repo_id": "a/b", "revision": "main", "commit": "12ab", "files": {"a": file}}
    content = {
        "files": {"files": {name: file}},
        "repositories": {"repositories": {name: repo}},
        "names": {"repositories": {"hub/a--b@main": {**repo, "files": {name: file}}}},
        "commit": {"repositories": {"hub/a--b@main": {**repo, "commit": name}}},
    }[place]
    (tmp_path / "weights.lock.json").write_text(json.dumps(content))
    with pytest.raises(
        WeightsError, match=r"lock.json cannot be read: .* is no name of a file; re"
    ):
        Lock.read(tmp_path)


NO_TRUTH: dict[str, tuple[dict[str, Any], str]] = {
    "of another": ({"repositories": {REPO.name: {"repo_id": "Org/other"}}}, "is of Org/other at m"),
    "no files": ({"repositories": {REPO.name: {"files": {}}}}, "is of no files"),
    "no hash": ({"files": {"net.pt": {"size": 3}}}, "entry 'net.pt' has no sha256"),
}


@pytest.mark.parametrize("kind", NO_TRUTH)
def test_a_lock_file_that_tells_nothing_of_a_checkpoint_is_refused(
    kind: str, tmp_path: Path
) -> None:
    change, told = NO_TRUTH[kind]
    file = {"size": 1, "sha256": "12ab"}
    repo = {"repo_id": "Org/net", "revision": "main", "commit": "12ab", "files": {"a": file}}
    content = dict(change)
    if "repositories" in change:
        content = {"repositories": {REPO.name: repo | change["repositories"][REPO.name]}}
    (tmp_path / "weights.lock.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=rf"lock.json cannot be read: its .*{told}"):
        Lock.read(tmp_path)


def test_a_file_without_a_hash_in_the_lock_file_is_none_that_was_fetched(
    hub: Hub, folder: Path
) -> None:
    """As a fetch leaves it that is stopped before the file: what lies there may be any."""
    fetch(REPO, folder, WISH)
    path = folder / "weights.lock.json"
    content = json.loads(path.read_bytes())
    content["repositories"][REPO.name]["files"]["config.json"].pop("sha256")
    path.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"config.json has sha256 \w+, published is not known"):
        _require(folder)
    assert _state(folder) == "changed"
    fetch(REPO, folder, WISH)
    assert _require(folder)


def test_another_file_under_a_locked_name_is_no_new_truth(hub: Hub, folder: Path) -> None:
    """Neither for a file without a published hash, nor for one of a repository."""
    hub.put_files("Org/files", {"net.pt": NET})
    commit = commit_of({"net.pt": NET})
    file = Checkpoint("net.pt", f"{hub.url}/Org/files/resolve/{commit}/net.pt")
    fetch(file, folder, WISH)
    fetch(REPO, folder, WISH)
    own = replace(WISH, allow_unpublished=True)
    for name in (file.name, f"{REPO.name}/config.json"):
        (folder / name).write_bytes(b"mine")
    for need in (file, REPO):
        assert [f.path.read_bytes() for f in fetch(need, folder, own).files].count(b"mine") == 1
    with pytest.raises(WeightsError, match=r"config.json has sha256"):
        _require(folder)
    for need in (file, REPO):
        assert fetch(need, folder, WISH).state in ("ok", "present")
    assert (folder / "net.pt").read_bytes() == NET
    assert (folder / REPO.name / "config.json").read_bytes() == b"{}"


def test_a_published_file_that_changed_is_taken_on_request(hub: Hub, folder: Path) -> None:
    hub.put_files("Org/files", {"net.pt": NET})
    file = Checkpoint("net.pt", f"{hub.url}/Org/files/resolve/main/net.pt")
    fetch(file, folder, WISH)
    hub.put_files("Org/files", {"net.pt": NET[::-1]})
    (folder / "net.pt").unlink()
    with pytest.raises(WeightsError, match="sent a file of sha256"):
        fetch(file, folder, WISH)
    fetch(file, folder, replace(WISH, update=True))
    assert (folder / "net.pt").read_bytes() == NET[::-1]
    fetch(file, folder, WISH)


def test_a_submission_freezes_the_files_of_a_repository(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StatsOfText, "checkpoints", lambda self, use: [REPO])
    fetch(REPO, folder, WISH)
    config = write_config(
        tmp_path / "c.yml",
        {},
        models=["text-stats"],
        input_tars=str(write_shards(tmp_path / "tars", 1, samples=1)[0]),
        output_metadata_dir=str(tmp_path / "out"),
        weights_dir=str(folder),
    )
    work = inspect(load(config), "c.yml")
    names = {f"{REPO.name}/{name}" for name in ("config.json", "model.safetensors", "vocab.txt")}
    assert work.checkpoints.keys() == work.fingerprint["checkpoints"].keys() == names
    net = folder / REPO.name / "model.safetensors"
    assert work.fingerprint["checkpoints"][f"{REPO.name}/{net.name}"] == weights.sha256_of(net)
    frozen.write_checkpoints(tmp_path / "frozen", work.checkpoints)
    assert frozen.require_checkpoints(tmp_path / "frozen") == {str(folder / n) for n in names}
    assert Weights(folder).repo(REPO) == folder / REPO.name
    net.write_bytes(NET[::-1])
    with pytest.raises(WeightsError, match=r"model.safetensors is another file: its sha256 was"):
        frozen.require_checkpoints(tmp_path / "frozen")
    with pytest.raises(WeightsError, match=r"a--b@main is missing; run `d2m weights check`"):
        Weights(folder).repo(HubRepo("a/b"))


def test_a_password_in_the_hub_s_address_is_in_no_message(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("//", "//me:s3cret@"))
    with pytest.raises(WeightsError) as caught:
        fetch(REPO, folder, WISH)
    assert "s3cret" not in trouble.explained(caught.value)[0]


def test_a_file_system_that_takes_nothing_is_told(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"cannot be written or read: .*choose another weights"):
        fetch(REPO, tmp_path / "file", WISH)


def test_own_files_are_accepted_on_request_but_never_locked(hub: Hub, folder: Path) -> None:
    own = replace(WISH, allow_unpublished=True)
    (folder / REPO.name).mkdir(parents=True)
    (folder / REPO.name / "config.json").write_bytes(b"mine")
    fetch(REPO, folder, own)
    assert (folder / REPO.name / "config.json").read_bytes() == b"mine"
    hub.ways = ["right", "other"]
    with pytest.raises(WeightsError, match=r"vocab.txt: another file came"):
        fetch(HubRepo("Org/net", "main", ("vocab.txt",)), _emptied(folder), own)
    fetch(REPO, folder, WISH)
    assert (folder / REPO.name / "config.json").read_bytes() == b"{}"


def _emptied(folder: Path) -> Path:
    (folder / REPO.name / "vocab.txt").unlink()
    (folder / "weights.lock.json").unlink()
    return folder


def test_a_file_that_two_commits_share_stays_checked(hub: Hub, folder: Path) -> None:
    fetch(REPO, folder, WISH)
    hub.put("Org/net", config__json=b"{}", model__safetensors=NET[::-1], vocab__txt=b"<s>\n</s>")
    fetch(HubRepo("Org/net", files=("model.safetensors",)), folder, replace(WISH, update=True))
    assert _state(folder) == "present"
    (folder / REPO.name / "config.json").write_bytes(b"[]")
    assert _state(folder) == "changed"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to be another user")
def test_a_folder_of_somebody_else_that_is_all_right_needs_no_rights(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # any user reaches it, unlike those of pytest
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{name}/no-token")
        fetch(REPO, Path(name), WISH)
        before = (Path(name) / "weights.lock.json").read_bytes()
        os.seteuid(65534)
        try:
            assert fetch(REPO, Path(name), WISH).state == "present"
            hub.put("Org/net", "v2", config__json=b"{}")
            with pytest.raises(WeightsError, match=r"Permission denied.*another weights_dir"):
                fetch(HubRepo("Org/net", "v2"), Path(name), WISH)
        finally:
            os.seteuid(0)
        assert (Path(name) / "weights.lock.json").read_bytes() == before
