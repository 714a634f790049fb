"""What a config's `models` may hold besides plain names, and each mistake in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import jsonschema
import pytest
from pydantic import BaseModel

from d2m_hpc.config import load
from d2m_hpc.config.reference import json_schema
from d2m_hpc.described import described
from d2m_hpc.errors import ConfigError
from d2m_hpc.models import entries
from d2m_hpc.models.entries import family_of, known_families, one_line
from d2m_hpc.models.family import Between, Family, ParameterError, at_hand
from d2m_hpc.models.inputs import ImageInput
from d2m_hpc.models.registry import Registry

HEAD = """\
input_tars: a.tar
output_metadata_dir: out
models:
  - image-stats
"""


@pytest.mark.parametrize(
    ("line", "told", "where"),
    [
        ("x: {kind: openclip}", "unknown kind 'openclip'; did you mean 'open_clip'?", "kind: "),
        ("x: {model: ViT-B-32}", "models.1.x: found no `kind`; valid: ", "x: "),
        ("x: {kind: oai-clip}", "found no `net`, which is required: the architecture", "x: "),
        ("x: {kind: oai-clip, net: ViT-B-31}", "found 'ViT-B-31'; input should be", "net: "),
        (
            "x: {kind: oai-clip, nett: a}",
            "x.nett: unknown parameter; did you mean 'net'?",
            "nett: ",
        ),
        ("x: {kind: open_clip, model: ViT-B-33}", "did you mean 'ViT-B-32'?", "model: "),
        ("x: {kind: open_clip, model: ViT-B-32}", "no tag is given; valid: ", "x: "),
        (
            "x: {kind: open_clip, model: ViT-B-32, pretrained: opnai}",
            "models.1.x.pretrained: unknown tag 'opnai'; did you mean 'openai'?",
            "pretrained: ",
        ),
        (
            "x: {kind: open_clip, model: './none'}",
            "open_clip_config.json: No such file or directory; valid is a folder",
            "model:",
        ),
        ("text-stats: {kind: oai-clip}", "is a built-in model's name; choose another", "text-s"),
        ("{x: {}, y: {}}", "valid is one name, with a mapping that has its `kind`", "x: "),
        ("x: 3", "found {'x': 3}; valid is one name, with a mapping", "x: "),
    ],
)
def test_a_mistake_is_told_with_its_line(line: str, told: str, where: str, tmp_path: Path) -> None:
    config = tmp_path / "c.yml"
    name = "" if line.startswith("text") else "postprocess_columns: [x-score]"
    config.write_text(f"{HEAD}  - {line}\n{name}\n")
    with pytest.raises(ConfigError) as caught:
        load(config)
    [mistake] = [m for m in caught.value.mistakes if told in m]
    assert f"c.yml:5:{5 + line.index(where)}" in mistake
    assert [m for m in caught.value.mistakes if not m.startswith("models")] == []


DIGITS = "kind: head, on: image-histogram, checkpoint: /a, sha256"


@pytest.mark.parametrize(
    ("items", "told"),
    [
        ("- x: {kind: onnx, checkpoint: /n, gives: {s: {}}, size: 0}", "found 0; valid is 1 to"),
        ("- x: {kind: onnx, checkpoint: /n, gives: {s: {}}, size: true}", "found True; valid is"),
        ("- x: {kind: onnx, checkpoint: /n, gives: {s: {}}, size: [1, 2, 3]}", "at most 2 items"),
        ("- x: {kind: oai-clip}", "is required: the architecture; valid: ViT-B-32, ViT-L-14"),
        ("- x: {kind: open_clip, model: n, image_mean: [1, 2]}", "[1, 2]; a value is missing"),
        ("- sscd-disc-mixup: {kind: sscd, size: 300}", "is a built-in model's name; choose"),
        ("- text-stats\n  - text-stats: {kind: text-stats}", "is a built-in model's name; choo"),
        ("- '': {kind: text-stats}", "the name '': valid: letters"),
        ("- x: {kind: head, on: a-b, checkpoint: /a, sha256: 12}", "found 12; valid is a text; w"),
        (f"- x: {{{DIGITS}: {'1' * 64}}}", "and digits in quotes, where they are a text"),
    ],
)
def test_one_mistake_is_one_message(items: str, told: str, tmp_path: Path) -> None:
    config = tmp_path / "c.yml"
    config.write_text(f"{HEAD}  {items}\npostprocess_columns: {['x-score'] * ('x:' in items)}\n")
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        load(config)
    assert len(caught.value.mistakes) == 1


def test_a_name_in_set_is_told_with_its_option(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(HEAD)
    with pytest.raises(ConfigError, match=r"models.0.x.net: found 'a'.+\n.+--> --set models"):
        load(tmp_path / "c.yml", ["models=[{x: {kind: oai-clip, net: a}}]"])
    loaded = load(tmp_path / "c.yml", ["models=[{x: {kind: oai-clip, net: ViT-B-32}}]"])
    assert loaded.model_names == ["x"]


def test_one_name_is_one_models(tmp_path: Path) -> None:
    two = "  - x: {kind: text-stats}\n  - x: {kind: image-stats}\n"
    (tmp_path / "c.yml").write_text(HEAD + two)
    with pytest.raises(ConfigError, match=r"found 'x' more than once.+\n.+--> .*c\.yml:\d+:5"):
        load(tmp_path / "c.yml")


def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries.known_families()["head"], "packages", {"nowhere": "d2m_hpc[no]"})
    (tmp_path / "c.yml").write_text(f"{HEAD}  - x: {{kind: head, on: a, checkpoint: /a.pth}}\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yml")
    [mistake] = caught.value.mistakes
    assert "needs nowhere, which is not installed; `pip install 'd2m_hpc[no]'`" in mistake


@pytest.mark.parametrize("kind", entries.known_families().values())
def test_a_family_is_described(kind: type[Family]) -> None:
    assert (kind.__doc__ or "").strip()
    assert described(kind).keys() == kind.model_fields.keys()
    assert all(described(kind).values())
    assert kind.kind == kind.kind.lower()
    for name, given in kind.presets.items():
        assert kind(**given)
        assert kind.prefixes.get(name, name)


def test_paths_are_told_from_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "net").mkdir()
    (tmp_path / "openai").mkdir()
    assert at_hand("org/net") == tmp_path / "org" / "net"
    assert at_hand("./none.pt") == tmp_path / "none.pt"
    assert [at_hand(name) for name in ("openai", "org/other", "laion2b_s34b_b79k")] == [None] * 3


def test_the_json_schema_has_the_families_parameters() -> None:
    schema = json_schema()
    right: dict[str, Any] = {"input_tars": "a", "output_metadata_dir": "b"}
    for entry in ("image-stats", "own", {"x": {"kind": "oai-clip", "net": "ViT-B-32"}}):
        jsonschema.validate({**right, "models": [entry]}, schema)
    for entry in ({"x": {"kind": "oai-clip", "net": "a"}}, {"x": {}, "y": {}}, 3):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**right, "models": [entry]}, schema)


def test_several_mistakes_of_one_model_are_told_at_once() -> None:
    with pytest.raises(ParameterError) as caught:
        entries.family_of({"x": {"kind": "head", "on": 3, "width": -1}})
    assert [parameter for parameter, _ in caught.value.mistakes] == ["on", "", "width"]


def test_a_model_is_told_on_one_line() -> None:
    assert one_line("image-stats") == "image-stats"
    given = {"writing": {"kind": "text-boxes", "limit_side_len": 320}}
    assert one_line(given) == "writing (kind: text-boxes, limit_side_len: 320)"


ON_CLIP = {"kind": "head", "on": "oai-clip-vit-b32-image"}
NET = "https://host/x.pth"
URLS = ("http://me:pw@host/h.pth", "https://host/get?id=1", "https://host/h.pth#1")


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (["image-stats", {"image": {"kind": "perceptual-hash"}}], "'image-phash' is an output of"),
        ([{"../x": {"kind": "perceptual-hash"}}], "the name '../x': valid: letters"),
        ([{"": {"kind": "perceptual-hash"}}], "the name '': valid: letters"),
        *(([{"h": {**ON_CLIP, "checkpoint": url}}], "names no published file") for url in URLS),
        (
            [{"h": {**ON_CLIP, "checkpoint": NET, "classes": ["a", "a"]}}],
            "gives twice",
        ),
        ([{"h": {**ON_CLIP, "checkpoint": NET, "classes": ["../a", "b"]}}], "valid:"),
    ],
)
def test_no_two_outputs_share_a_name_and_no_name_or_url_is_odd(
    models: list[Any], says: str, tmp_path: Path
) -> None:
    _, problems = Registry().with_models(models, (), tmp_path)
    assert any(says in problem.what for problem in problems), problems


def _bounded(kind: Any, metadata: Any = ()) -> bool:
    """Whether numbers of a type, also within lists and other types, have a range."""
    if kind in (int, float):
        return any(isinstance(m, Between) for m in metadata)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return all(_bounded(f.annotation, f.metadata) for f in kind.model_fields.values())
    if get_origin(kind) is Annotated:
        return _bounded(kind.__origin__, kind.__metadata__)
    parts = () if get_origin(kind) is Literal else get_args(kind)
    return all(_bounded(part, metadata) for part in parts)


@pytest.mark.parametrize("kind", [*known_families()])
def test_every_number_of_every_family_has_a_range(kind: str) -> None:
    for name, field in known_families()[kind].model_fields.items():
        assert _bounded(field.annotation, field.metadata), name


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        ("text-boxes", {"limit_side_len": 10**9}, "found 1000000000; valid is 32 to 4096"),
        ("text-boxes", {"thresh": 1.0}, "found 1.0; valid is 0.001 to 0.999"),
        ("sscd", {"size": -1}, "found -1; valid is 32 to 4096"),
        ("text-embedding", {"checkpoint": "a/b", "max_tokens": 2}, "found 2; valid is 3 to 131072"),
        ("onnx", {"checkpoint": "a", "gives": {"s": {}}, "size": [9, 9**9]}, "valid is 1 to 4096"),
        ("onnx", {"checkpoint": "a", "gives": {"s": {"index": -1}}, "size": 9}, "valid is 0 to 16"),
        ("onnx", {"checkpoint": "a", "gives": {"s": {"index": True}}, "size": 9}, "found {'s'"),
        (
            "onnx",
            {"checkpoint": "a", "gives": {"s": {}}, "size": True},
            "found True; ",
        ),
        ("Open_CLIP", {}, "unknown kind 'Open_CLIP'; did you mean 'open_clip'?"),
    ],
)
def test_a_number_out_of_its_range_is_told_with_the_range(
    kind: str, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(ParameterError) as found:
        family_of({"own": {"kind": kind, **given}})
    assert told in str(found.value)


@pytest.mark.parametrize("size", [0, 10**9, -3, "x", 2.5, (3, 10**9), True])
def test_an_image_of_a_size_that_takes_too_much_memory_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="valid is 1 to 4096"):
        ImageInput(size)


def test_a_mean_of_pixels_up_to_255_is_refused() -> None:
    mean = (123.675, 116.28, 103.53)
    with pytest.raises(ValueError, match=r"a mean of \[123.675, .*; valid is 0 to 1, as is a mean"):
        ImageInput(224, mean=mean, std=(58.395, 57.12, 57.375))
