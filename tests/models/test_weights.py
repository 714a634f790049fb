from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import open_clip
import pytest
from kit import CHECKPOINTS, DATACOMP, write_config

from d2m_hpc.config import load
from d2m_hpc.errors import WeightsError
from d2m_hpc.models import weights
from d2m_hpc.models.registry import builtin
from d2m_hpc.models.weights import HashCache, check, require
from d2m_hpc.plan.workload import absolute, customs, run_dir


@pytest.mark.parametrize(
    ("name", "model"), [("ViT-B-32.pt", "ViT-B-32"), ("ViT-L-14.pt", "ViT-L-14")]
)
def test_clips_urls_are_those_that_open_clip_knows(name: str, model: str) -> None:
    known = open_clip.pretrained.get_pretrained_cfg(model, "openai")
    assert CHECKPOINTS[name].url == known["url"]
    assert CHECKPOINTS[name].sha256 == known["url"].split("/")[-2]


def test_needed_lists_each_checkpoint_once() -> None:
    clip, text = (builtin().models[name] for name in ("oai-clip-vit-b32", "text-stats"))
    assert [c.name for c in weights.needed([clip, text, clip])] == ["ViT-B-32.pt"]
    six = [builtin().models[name] for name in DATACOMP["models"]]
    assert [c.name for c in weights.needed([*six, *six])] == [*CHECKPOINTS]


def test_a_custom_model_under_a_built_in_name_needs_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "class Own:\n"
        "    raw_inputs, preprocessors = ['image'], ['clip-aug']\n"
        "    def __init__(self, device): ...\n"
        "model_lookup = {'oai-clip-vit-b32': Own}\n"
    )
    config = write_config(
        tmp_path / "c.yml",
        {
            "models": ["oai-clip-vit-b32", "nsfw-image-oai-clip-vit-l-14", "oai-clip-vit-l14"],
            "input_tars": "a.tar",
            "output_metadata_dir": "out",
            "custom_pypath": str(tmp_path / "own.py"),
        },
    )
    loaded = absolute(load(config))
    custom, mistakes = customs(loaded, run_dir(loaded))
    names = {c.name for c in weights.needed(custom.registry.specs(loaded.model_names).values())}
    assert (names, mistakes) == ({"nsfw_torch.pt", "ViT-L-14.pt"}, [])


def test_a_missing_file_is_named_with_its_url_and_the_command(tmp_path: Path) -> None:
    checked = check([builtin().models["faces-scrfd10g"]], tmp_path)
    assert [item.state for item in checked] == ["missing"]
    with pytest.raises(WeightsError) as caught:
        require(checked, allow_unpublished=True, config="my config.yml")
    message = str(caught.value)
    assert str(tmp_path / "scrfd_10g.pt") in message
    assert CHECKPOINTS["scrfd_10g.pt"].url in message
    assert "d2m weights fetch" in message
    assert "my config.yml" in message


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "scrfd_10g.pt").write_bytes(b"mine")
    specs = [builtin().models["faces-scrfd10g"], builtin().models["dedup-isc-ft-v107"]]
    with pytest.raises(WeightsError) as caught:
        require(check(specs, tmp_path), False, "c.yml")
    for name in ("scrfd_10g.pt has sha256", "isc_ft_v107.pth.tar is missing", "eval_dedup"):
        assert name in str(caught.value)


def test_an_unpublished_file_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "scrfd_10g.pt").write_bytes(b"mine")
    checked = check([builtin().models["faces-scrfd10g"]], tmp_path)
    digest = hashlib.sha256(b"mine").hexdigest()
    assert [item.state for item in checked] == ["not the published file"]
    with pytest.raises(WeightsError, match=f"{digest}.*963570df(.|\n)*allow_unpublished_weights"):
        require(checked, allow_unpublished=False, config="c.yml")
    assert require(checked, allow_unpublished=True, config="c.yml") == {"scrfd_10g.pt": digest}


def test_a_prefix_of_the_hash_is_compared_where_no_more_was_published() -> None:
    checkpoint = CHECKPOINTS["multilingual_debiased-0b549669.ckpt"]
    assert checkpoint.sha256 in checkpoint.name
    assert checkpoint.is_published("0b549669" + "f" * 56)
    assert not checkpoint.is_published("0b549668" + "f" * 56)
    assert CHECKPOINTS["isc_ft_v107.pth.tar"].is_published("a" * 64)


def test_the_hash_cache_reads_a_file_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(weights, "sha256_of", counted)
    file, cache = tmp_path / "net.pt", tmp_path / "hashes.json"
    file.write_bytes(b"one")
    for _ in range(2):  # a cache of its own each time, as in another process
        assert HashCache(cache)(file) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 1
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert HashCache(cache)(file) == hashlib.sha256(b"two").hexdigest()
    file.write_bytes(b"three")
    os.utime(file, ns=(1, 1))
    assert HashCache(cache)(file) == hashlib.sha256(b"three").hexdigest()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}'])
def test_a_damaged_hash_cache_is_started_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "hashes.json").write_bytes(content)
    (tmp_path / "a").write_bytes(b"one")
    cache = HashCache(tmp_path / "hashes.json")
    assert cache(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()


def test_the_folder_is_the_configs_or_the_environments_or_the_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("D2M_WEIGHTS", "~/shared")
    assert weights.weights_dir("~/own") == tmp_path / "own"
    assert weights.weights_dir(None) == tmp_path / "shared"
    monkeypatch.delenv("D2M_WEIGHTS")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert weights.weights_dir(None) == tmp_path / ".cache/d2m_hpc"


def test_the_documented_layout_is_that_of_the_folder() -> None:
    """By which files are copied by hand."""
    page = Path(__file__).parents[2] / "docs" / "weights.md"
    [listed] = re.findall(r"^```text\n(.+?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert sorted(listed.split()) == sorted(CHECKPOINTS)
