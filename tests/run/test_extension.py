"""Which configs only add to another, and what of one is to be computed then."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from kit import DATACOMP, write_config

from d2m_hpc import config as configs
from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.models import custom
from d2m_hpc.models.registry import Registry
from d2m_hpc.run.extension import obstacles, only_new, with_own_names
from d2m_hpc.run.fingerprints import require_growth
from d2m_hpc.run.folder import RunDir

B32: dict[str, Any] = {
    "models": ["oai-clip-vit-b32"],
    "postprocess_columns": ["oai-clip-vit-b32-score"],
    "postprocess_features": ["oai-clip-vit-b32-image"],
    "additional_fields": ["uid"],
}
HASHES = {"ViT-B-32.pt": "b", "ViT-L-14.pt": "l"}

OWN = """
class Own:
    raw_inputs = ["text"]
    preprocessors = ["identity"]
    dependencies = ["oai-clip-vit-b32"]
    def __init__(self, device): ...

model_lookup = {"own": Own, "other": Own}
postprocess_parquet_lookup = {
    "own-score": lambda cache: cache["own"][0],
    "any-score": lambda cache: score(cache),
}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def config(folder: Path, values: dict[str, Any], **more: Any) -> Config:
    common = {"input_tars": "x.tar", "output_metadata_dir": str(folder)}
    return configs.load(write_config(folder / "c.yml", {**values, **common, **more}))


def names(asked: Config) -> Registry:
    """What is known once the custom file was run."""
    file = asked.custom_file
    return custom.registry(custom.lookups(custom.load(file))) if file else Registry()


def fingerprint(asked: Config, **hashes: str) -> dict[str, Any]:
    file = asked.custom_file
    code = {"d2m_custom_own": hashlib.sha256(file.read_bytes()).hexdigest()} if file else {}
    return with_own_names(asked.fingerprint({**HASHES, **hashes}, code), names(asked))


def test_every_list_may_grow(folder: Path) -> None:
    old, new = (fingerprint(config(folder, values)) for values in (B32, DATACOMP))
    assert obstacles(old, new) == []
    assert "models: 'dedup-isc-ft-v107' is no longer listed" in obstacles(new, old)
    assert len(obstacles(new, old)) == 5 + 5 + 4 + 5


def test_a_model_of_another_name_is_one_mistake(folder: Path) -> None:
    stats = {"kind": "text-boxes", "limit_side_len": 320}
    old, new = (
        fingerprint(
            config(folder, {"models": [{name: stats}], "postprocess_columns": [f"{name}-count"]})
        )
        for name in ("sw", "swin")
    )
    [told] = obstacles(old, new)
    assert told.startswith("models: 'sw' is named 'swin' now, and counts as another model; ")
    assert "models: 'sw' is no longer listed" in obstacles(old, {**new, "models": ["text-stats"]})


def test_one_difference_is_one_mistake_that_tells_of_all_shards(folder: Path) -> None:
    run, stems = RunDir(folder / "run"), ["00000", "00001", "00002", "00003"]
    old, new = (fingerprint(config(folder, v)) for v in (B32, {**B32, "resize": "exact"}))
    run.fingerprints.mkdir(parents=True)
    run.fingerprint("old").write_text(json.dumps(old))
    with pytest.raises(ConfigError) as refused:
        require_growth(run, "old", stems, new, "c.yml")
    [told] = refused.value.mistakes
    assert told.startswith("resize: was 'fast', is 'exact'; 4 shards (00000, 00001, 00002 and 1 mo")


def test_the_order_of_columns_may_change(folder: Path) -> None:
    turned = {k: v[::-1] if isinstance(v, list) else v for k, v in DATACOMP.items()}
    old, new = (fingerprint(config(folder, values)) for values in (DATACOMP, turned))
    assert obstacles(old, new) == obstacles(new, old) == []
    lacked = only_new(config(folder, turned), old, Registry())
    assert lacked.models == lacked.postprocess_columns == lacked.additional_fields == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("amp", "off"),
        ("resize", "exact"),
        ("feature_dtype", "float32"),
        ("max_image_pixels", 5),
        ("use_datacomp_keys", True),
    ],
)
def test_what_changes_the_values_that_are_there_may_not_change(
    key: str, value: Any, folder: Path
) -> None:
    old, new = (fingerprint(config(folder, v)) for v in (B32, {**B32, key: value}))
    assert obstacles(old, new) == [f"{key}: was {old[key]!r}, is {value!r}"]


def test_a_checkpoint_may_not_change(folder: Path) -> None:
    asked = config(folder, B32)
    old, new = fingerprint(asked), fingerprint(asked, **{"ViT-B-32.pt": "z"})
    assert obstacles(old, new) == ["checkpoints: the sha256 of ViT-B-32.pt was b, is z"]


def test_a_custom_file_may_come_if_nothing_that_is_there_is_its(folder: Path) -> None:
    own = {"custom_pypath": str(folder / "own.py"), "models": ["oai-clip-vit-b32", "own"]}
    plain, with_file = fingerprint(config(folder, B32)), fingerprint(config(folder, B32, **own))
    assert with_file["custom_names"] == ["any-score", "other", "own", "own-score"]
    assert obstacles(plain, with_file) == []
    (folder / "own.py").write_text(OWN.replace("own-score", "oai-clip-vit-b32-score"))
    [why] = obstacles(plain, fingerprint(config(folder, B32, **own)))
    assert why.startswith("custom_file: the sha256 was None, is ")
    assert why.endswith("; oai-clip-vit-b32-score of the finished outputs come from it")


@pytest.mark.parametrize("name", ["clip-aug", "oai-clip-vit-b32-score", "oai-clip-vit-b32-image"])
def test_a_custom_file_may_not_replace_what_made_the_outputs(name: str, folder: Path) -> None:
    """By any of its lookups: also the preprocessor of a model, which the config does not name."""
    plain = fingerprint(config(folder, B32))
    lookup = {"clip-aug": "preprocessor_lookup"}.get(name, "postprocess_parquet_lookup")
    (folder / "own.py").write_text(f"{lookup} = {{{name!r}: len}}\n")
    replaced = fingerprint(config(folder, B32, custom_pypath=str(folder / "own.py")))
    [why] = obstacles(plain, replaced)
    assert why.endswith(f"; {name} of the finished outputs come from it")
    [why] = obstacles(replaced, plain)
    assert why.endswith(f"; {name} of the finished outputs come from it")


def test_a_file_whose_names_an_earlier_version_could_not_tell_is_not_trusted(folder: Path) -> None:
    plain = fingerprint(config(folder, B32))
    own = fingerprint(config(folder, B32, custom_pypath=str(folder / "own.py")))
    untold = {**own, "custom_names": None}
    for old, new in ((untold, plain), (untold, {**own, "custom_file": "other"})):
        [why] = obstacles(old, new)
        assert why.endswith("it is not known which finished outputs come from it")
    assert obstacles(untold, own) == []


def test_a_module_of_a_custom_file_is_as_much_of_it_as_the_file_itself(folder: Path) -> None:
    values = {**B32, "models": ["oai-clip-vit-b32", "own"]}
    asked = config(folder, values, custom_pypath=str(folder / "own.py"))
    one, other = (
        with_own_names(
            asked.fingerprint(HASHES, {"d2m_custom_own": "m", "helper": h}), names(asked)
        )
        for h in "ab"
    )
    assert one["custom_modules"] == {"helper": "a"}
    [why] = obstacles(one, other)
    assert why.startswith("helper: the sha256 was a, is b; own of the finished outputs")
    alone = with_own_names(asked.fingerprint(HASHES, {"d2m_custom_own": "m"}), names(asked))
    assert "custom_modules" not in alone
    assert obstacles(alone, one)[0].startswith("helper: the sha256 was None, is a")


def lacked_models(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    asked = config(folder, new)
    return only_new(asked, fingerprint(config(folder, old)), names(asked)).models


def test_models_run_that_are_new_asked_of_or_needed(folder: Path) -> None:
    """The NSFW model takes L/14's output; faces are not asked of, but may reject a sample."""
    l14 = {**B32, "models": ["oai-clip-vit-b32", "oai-clip-vit-l14"]}
    nsfw = {**l14, "models": [*l14["models"], "nsfw-image-oai-clip-vit-l-14", "faces-scrfd10g"]}
    assert lacked_models(folder, l14, nsfw) == [
        "oai-clip-vit-l14",
        "nsfw-image-oai-clip-vit-l-14",
        "faces-scrfd10g",
    ]
    text = {**B32, "postprocess_features": ["oai-clip-vit-b32-text", "oai-clip-vit-b32-image"]}
    assert lacked_models(folder, B32, text) == ["oai-clip-vit-b32"]
    assert lacked_models(folder, B32, {**B32, "additional_fields": ["uid", "url"]}) == []


def test_a_postprocessor_that_does_not_say_what_it_reads_takes_all_models(folder: Path) -> None:
    own = {
        **B32,
        "custom_pypath": str(folder / "own.py"),
        "models": ["oai-clip-vit-b32", "oai-clip-vit-l14", "own", "other"],
    }
    columns = B32["postprocess_columns"]
    told = {**own, "postprocess_columns": [*columns, "own-score"]}
    assert lacked_models(folder, own, told) == ["oai-clip-vit-b32", "own"]
    untold = {**own, "postprocess_columns": [*columns, "any-score"]}
    assert lacked_models(folder, own, untold) == own["models"]


def test_the_names_of_datacomp_are_kept_out_unless_fields_are_new(folder: Path) -> None:
    """Their column `text` is there already, and to read it anew would be for nothing."""
    old = {**B32, "use_datacomp_keys": True}
    columns = {**old, "models": [*B32["models"], "text-stats"]}
    asked = config(folder, columns)
    lacked = only_new(asked, fingerprint(config(folder, old)), names(asked))
    assert (lacked.models, lacked.carried) == (["text-stats"], [])
    asked = config(folder, {**old, "additional_fields": ["uid", "url"]})
    lacked = only_new(asked, fingerprint(config(folder, old)), names(asked))
    assert (lacked.additional_fields, lacked.use_datacomp_keys) == (["url"], True)


def test_changed_parameters_of_models_are_told_without_secrets() -> None:
    head = {"kind": "head", "on": "a-image", "checkpoint": "https://h.org/a.pth", "width": 3}
    more = {"checkpoint": "https://me:pw@h.org/b.pth", "auth_token": "t0p", "final": "sigmoid"}
    old, new = ({"models": ["image-stats", {"head": given}]} for given in (head, {**head, **more}))
    del new["models"][1]["head"]["width"]
    none: dict[str, Any] = {
        **{key: [] for key in ("postprocess_columns", "postprocess_features")},
        "additional_fields": [],
        "checkpoints": {},
        "custom_file": None,
        "custom_names": [],
    }
    assert obstacles({**none, **old}, {**none, **new}) == [
        "models: 'head': auth_token was not given, is '***'",
        "models: 'head': checkpoint was 'https://h.org/a.pth', is 'https://***@h.org/b.pth'",
        "models: 'head': final was not given, is 'sigmoid'",
        "models: 'head': width was 3, is not given",
    ]
