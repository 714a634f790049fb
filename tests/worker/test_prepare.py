"""What a sample's JSON and text become under DataComp's names."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kit import write_tar

from d2m_hpc import config as configs
from d2m_hpc.state.manifest import Rejection
from d2m_hpc.worker.prepare import Ready, Recipe, prepare
from d2m_hpc.worker.shard import Archive

UID = "0" * 28 + "00ab"


def _prepared(
    folder: Path, values: dict[str, Any], text: bytes | None = b"of the txt", **more: Any
) -> dict[str, Any] | str:
    """The fields of one sample, or why it is rejected."""
    members = {"a.json": json.dumps(values).encode()} | ({"a.txt": text} if text else {})
    config = configs.Config(
        models=["text-stats"],
        input_tars=["unused"],
        output_metadata_dir="unused",
        **{"additional_fields": ["uid"], "use_datacomp_keys": True, **more},
    )
    recipe = Recipe.of(config, {})
    with closing(Archive(write_tar(folder / "a.tar", members))) as archive:
        (sample,) = archive.index()
        made = prepare(sample, archive, recipe)
    if isinstance(made, Rejection):
        return made.reason
    assert isinstance(made, Ready)
    return dict(zip(recipe.fields, made.fields, strict=True))


def test_text_is_the_caption(tmp_path: Path) -> None:
    assert _prepared(tmp_path, {"uid": UID, "caption": "of the JSON"}) == {
        "uid": UID,
        "text": "of the JSON",
    }


@pytest.mark.parametrize("caption", [{}, {"caption": None}, {"caption": 7}])
def test_text_is_the_txts_where_there_is_no_caption(
    tmp_path: Path, caption: dict[str, Any]
) -> None:
    assert _prepared(tmp_path, {"uid": UID, **caption}) == {"uid": UID, "text": "of the txt"}


def test_an_empty_caption_is_a_text(tmp_path: Path) -> None:
    assert _prepared(tmp_path, {"uid": UID, "caption": ""}, text=None) == {"uid": UID, "text": ""}


def test_a_sample_without_any_text_is_rejected(tmp_path: Path) -> None:
    reason = _prepared(tmp_path, {"uid": UID, "caption": None}, text=None)
    assert reason == "no text (txt); it has json"


def test_text_is_there_once_and_beside_the_caption(tmp_path: Path) -> None:
    fields = _prepared(
        tmp_path, {"caption": "c", "text": "t"}, additional_fields=["text", "caption"]
    )
    assert fields == {"text": "c", "caption": "c"}
    assert list(fields) == ["text", "caption"]


def test_without_datacomps_names_nothing_is_added_or_changed(tmp_path: Path) -> None:
    values = {"uid": "AB", "caption": "c"}
    assert _prepared(tmp_path, values, use_datacomp_keys=False) == {"uid": "AB"}


@pytest.mark.parametrize(
    ("uid", "normal"),
    [("ab", UID), ("AB", UID), (UID, UID), ("F" * 32, "f" * 32)],
)
def test_a_uid_is_32_lower_case_digits(tmp_path: Path, uid: str, normal: str) -> None:
    fields = _prepared(tmp_path, {"uid": uid})
    assert isinstance(fields, dict)
    assert fields["uid"] == normal


@pytest.mark.parametrize("uid", [None, "", 171, "0" * 33, "xyz", "0xab", "ab\n", "a b"])
def test_a_sample_without_a_usable_uid_is_rejected(tmp_path: Path, uid: Any) -> None:
    reason = _prepared(tmp_path, {"uid": uid})
    assert reason == f"no usable uid: found {str(uid)!r}, valid are up to 32 hex digits"


def test_a_uid_that_nobody_asked_for_is_not_looked_at(tmp_path: Path) -> None:
    assert _prepared(tmp_path, {}, additional_fields=[]) == {"text": "of the txt"}
