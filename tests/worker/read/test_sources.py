"""Which member is a sample's image, and where its text and its fields come from."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from kit import STATS, jpeg, submit, write_config, write_tar

from d2m_hpc import config as configs
from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.models.preprocessors import PREPROCESSORS
from d2m_hpc.run.extension import obstacles
from d2m_hpc.run.records import Rejection
from d2m_hpc.worker.read import parse
from d2m_hpc.worker.read.members import UNUSED
from d2m_hpc.worker.read.prepare import Ready, Recipe, prepare
from d2m_hpc.worker.read.shard import Archive, Index
from d2m_hpc.worker.read.tar import ReadAhead

EXIF = json.dumps({"Image Model": "X100", "Image": {"Make": "Fuji"}})
META = {"caption": "recaptioned", "exif": EXIF, "a.b": 1, "a": {"b": 2, "c": {"d": None, "e": 3}}}


def _config(**more: Any) -> Config:
    given = {"models": ["m"], "input_tars": ["unused"], "output_metadata_dir": "unused"}
    return Config(**{**given, **more})


def _prepared(folder: Path, members: dict[str, bytes], raw: str, **more: Any) -> Any:
    """What a model is given of the one sample of a tar; its fields, for none; or its rejection."""
    wanted = (raw, "identity")
    inputs = {wanted: PREPROCESSORS["identity"]} if raw else {}
    recipe = Recipe.of(_config(**more), inputs)
    with closing(Archive(write_tar(folder / "a.tar", members))) as archive:
        (sample,) = archive.index(recipe.needed)
        made = prepare(sample, archive, recipe)
    if isinstance(made, Rejection):
        return made.reason
    assert isinstance(made, Ready)
    return made.inputs[wanted] if raw else dict(zip(recipe.fields, made.fields, strict=True))


@pytest.mark.parametrize(
    ("key", "width"),
    [
        ([], 20),
        ("jpg", 20),
        ("seg.png", 30),
        (".SEG.PNG", 30),
        (["none.png", "mask", "jpg"], 40),
        (["jpg", "mask"], 20),
    ],
)
def test_the_image_is_the_first_member_that_is_named(tmp_path: Path, key: Any, width: int) -> None:
    sizes = {"a.jpg": 20, "a.seg.png": 30, "a.mask": 40}
    members = {name: jpeg(0, (size, 10)) for name, size in sizes.items()}
    assert _prepared(tmp_path, members, "image", image_key=key).width == width


def test_a_sample_without_the_named_image_is_rejected(tmp_path: Path) -> None:
    reason = _prepared(tmp_path, {"a.jpg": jpeg()}, "image", image_key=["x.png", "y"])
    assert reason == "no image (x.png or y); it has jpg"


def test_the_named_member_is_not_another_sample_nor_unused() -> None:
    buffer = io.BytesIO()

    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key in "abc":
            for name in ("jpg", "seg.png", "json"):
                tar.addfile(tarfile.TarInfo(f"{key}.{name}"))
    needed = {"image": ("seg.png", "jpg"), "json": ("json",)}
    index = Index(ReadAhead(buffer), len(buffer.getvalue()), needed)
    assert [s.key for s in index] == ["a", "b", "c"]
    assert index.strays == []
    assert index.ledger.notes.texts() == [UNUSED.format("a.jpg, b.jpg, c.jpg")]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "of the txt"),
        ({"text_key": ["alt", "cap"]}, "of the cap"),
        ({"text_key": "cap"}, "of the cap"),
        ({"text_from": "json:caption"}, "recaptioned"),
        ({"text_from": "json:exif.Image Model"}, "X100"),
        ({"text_from": "json:none"}, "no text in the JSON's field 'none': found null"),
        ({"text_from": "json:a.c.e"}, "no text in the JSON's field 'a.c.e': found int"),
        ({"text_key": "alt"}, "no text (alt); it has txt, cap, json"),
    ],
)
def test_the_text_comes_from_a_member_or_a_field(
    tmp_path: Path, more: dict[str, str], text: str
) -> None:
    members = {"a.txt": b"of the txt", "a.cap": b"of the cap", "a.json": json.dumps(META).encode()}
    assert _prepared(tmp_path, members, "text", **more) == text


def test_a_field_that_holds_the_text_needs_no_txt(tmp_path: Path) -> None:
    members = {"a.json": json.dumps(META).encode()}
    assert _prepared(tmp_path, members, "text", text_from="json:caption") == "recaptioned"
    reason = _prepared(tmp_path, {"a.txt": b"x"}, "text", text_from="json:caption")
    assert reason == "no json (json); it has txt"


@pytest.mark.parametrize("more", [{}, {"text_from": "json:none"}, {"text_key": "none"}])
def test_a_sample_without_text_is_a_row_where_no_model_asks_for_it(
    tmp_path: Path, more: dict[str, str]
) -> None:
    assert _prepared(tmp_path, {"a.jpg": jpeg(0, (20, 10))}, "image", **more).width == 20
    members = {"a.json": json.dumps(META).encode()}
    assert _prepared(tmp_path, members, "", additional_fields=["a.b"], **more) == {"a.b": 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a.b", 1),  # the field's own name has a dot
        ("a.c.e", 3),
        ("a.c.d", None),
        ("a.c", {"d": None, "e": 3}),
        ("exif.Image Model", "X100"),
        ("exif.Image.Make", "Fuji"),
        ("exif.none", None),
        ("caption.none", None),
        ("none.a", None),
        ("a..b", None),
    ],
)
def test_a_field_may_lie_within_another(tmp_path: Path, name: str, value: Any) -> None:
    members = {"a.json": json.dumps(META).encode()}
    assert _prepared(tmp_path, members, "", additional_fields=[name]) == {name: value}
    assert parse.has_field(META, name) == (value is not None)


def test_a_text_that_is_no_json_holds_no_field() -> None:
    assert parse.field({"a": "{broken", "b": "{" * 500}, "a.b") is None
    assert parse.field({"a": '{"b": "\ud800"}'}, "a.b") == "\ud800"


def test_datacomps_text_comes_from_where_the_models_take_theirs(tmp_path: Path) -> None:
    members = {"a.json": json.dumps({**META, "re": {"cap": "best"}}).encode(), "a.alt": b"alt"}
    values = {"use_datacomp_keys": True, "additional_fields": ["text"]}
    for more, text in (
        ({"text_from": "json:re.cap"}, "best"),
        ({"text_from": "json:none", "text_key": "alt"}, "alt"),
        ({}, "recaptioned"),
    ):
        assert _prepared(tmp_path, members, "", **values, **more) == {"text": text}


def test_the_sources_decide_the_outputs_and_old_runs_go_on() -> None:
    plain, other = _config().fingerprint({}), _config(text_from="json:caption").fingerprint({})
    assert {"image_key", "text_key", "text_from"}.isdisjoint(plain)
    was = {**plain, "custom_names": []}
    assert obstacles(was, {**other, "custom_names": []}) == [
        "text_from: was None, is 'json:caption'"
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "text_from: caption",
            "text_from: found 'caption'; valid are `json:FIELD` and `parquet:PATH.parquet:COLUMN`",
        ),
        ("text_from: {a b: json:x}", "text_from: found {'a b': 'json:x'}; the name 'a b'; valid"),
        ("text_from: {a: 3}", "text_from.a: found 3; input should be a valid string"),
        ("text_key: [a, '']", "text_key: found ['a', '']; valid are names after the key's dot"),
        ("image_key: a/b.jpg", "image_key: found 'a/b.jpg'; valid are names after"),
        ("text_key: a\ntext_from: json:b", "text_from: found text_key, too; valid is one of both"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, line: str, told: str) -> None:
    path = write_config(
        tmp_path / "c.yml", {**STATS, "input_tars": "x", "output_metadata_dir": "y"}
    )
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ConfigError) as caught:
        configs.load(path)
    assert told in str(caught.value)


def test_a_run_scores_recaptions_of_the_json_and_carries_inner_fields(tmp_path: Path) -> None:
    members = {}
    for i in range(4):
        meta = {"better": {"caption": " ".join("word" for _ in range(i + 1))}, "exif": EXIF}
        members[f"{i}.seg.jpg"] = jpeg(i)
        members[f"{i}.json"] = json.dumps(meta).encode()
    write_tar(tmp_path / "0.tar", members)
    more = {
        "image_key": "seg.jpg",
        "text_from": "json:better.caption",
        "additional_fields": ["exif.Image Model", "better.caption"],
        "postprocess_columns": ["image-brightness", "text-words"],
        "input_tars": str(tmp_path / "*.tar"),
        "output_metadata_dir": str(tmp_path / "out"),
    }
    ended = submit(write_config(tmp_path / "c.yml", {**STATS, **more}))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    table = pq.read_table(tmp_path / "out" / "0.parquet").to_pydict()
    assert table["text-words"] == [1, 2, 3, 4]
    assert table["exif.Image Model"] == ["X100"] * 4
    assert table["better.caption"][1] == "word word"
