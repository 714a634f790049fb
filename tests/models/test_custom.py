from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_blip2
import torch
from bench import run
from kit import photographs
from PIL import Image

from d2m_hpc.errors import ConfigError
from d2m_hpc.models import custom, postprocessors
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.family import ModelSpec, Post
from d2m_hpc.models.inputs import NAMED
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options, Picture
from d2m_hpc.models.published import HubRepo
from d2m_hpc.models.registry import builtin
from d2m_hpc.run import frozen
from d2m_hpc.worker.batch import collate

SEED = Path(__file__).parent.parent / "seed" / "custom.py"

LOOK = """
import torch

class Look(torch.nn.Module):
    raw_inputs = ('text',)
    preprocessors = ('identity',)
    dependencies = ()
    def __init__(self, device):
        super().__init__()
    def forward(self, texts):
        return torch.tensor([len(text) for text in texts])

model_lookup = {'look': Look}
"""


def _look(tmp_path: Path, old: str = "", new: str = "") -> custom.Tables:
    """The tables of a file with one thing changed."""
    assert old in LOOK
    return custom.lookups(custom.load(_write(tmp_path, LOOK.replace(old, new))))


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "custom.py"
    path.write_text(text)
    return path


def test_what_the_seeds_file_gives_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_blip2.save(tmp_path / "Salesforce" / "blip2-opt-2.7b")
    monkeypatch.chdir(tmp_path)
    made = custom.registry(custom.lookups(custom.load(SEED)))
    assert made.models["blip2"].inputs == (("image", "blip2-aug"),)
    assert made.columns["blip2-cap"].model == "blip2"
    assert made.own >= {"blip2", "blip2-aug", "blip2-cap"}


CAPTION = """
from functools import partial
from dataset2metadata.postprocessors import identity

class Base:
    raw_inputs = ['image', 'text']
    dependencies = ['image-stats']
    def __init__(self, device):
        pass

class Caption(Base):
    preprocessors: tuple = ('small', 'identity')
    dependencies = ['oai-clip-vit-b32']
    to_device = False

def small(x):
    return x

preprocessor_lookup = {'small': small}
model_lookup = {name: Caption for name in ('caption', 'other')}
postprocess_parquet_lookup = {'caption-text': partial(identity, model='caption', to_cpu=False)}
postprocess_feature_lookup = {}
postprocess_feature_lookup['caption-feature'] = lambda cache: cache['caption']
output_types = {'caption-text': 'string', 'caption-feature': [7]}
"""


def test_names_of_a_custom_file_come_on_top_of_the_built_in_ones(tmp_path: Path) -> None:
    module = custom.load(_write(tmp_path, CAPTION))
    found = custom.registry(custom.lookups(module), custom.output_types(module))
    assert found.models["other"] == ModelSpec(
        "other",
        raw_inputs=("image", "text"),
        preprocessors=("small", "identity"),
        dependencies=("oai-clip-vit-b32",),
        to_device=False,
    )
    assert found.columns["caption-text"] == Post("caption", type="string")
    assert found.features["caption-feature"] == Post("caption", shape=(7,))
    assert found.own == {"small", "caption", "other", "caption-text", "caption-feature"}
    assert builtin().models.keys() < found.models.keys()
    assert builtin().columns.keys() < found.columns.keys()
    assert builtin().features.keys() < found.features.keys()
    assert found.preprocessors > NAMED.keys()


TYPED = """
import torch
class Tones(torch.nn.Module):
    raw_inputs = ('image', 'text')
    preprocessors = ({'size': [32, 48], 'resize': 'squash', 'mean': [0, 0, 0], 'std': [1, 1, 1]},
                     'identity')
    outputs = {'tone': 'float32', 'rgb': [3], 'words': 'list<string>'}
    def __init__(self, device):
        super().__init__()
    def forward(self, pixels, texts):
        assert pixels.shape[1:] == (3, 32, 48), pixels.shape
        colours = pixels.mean(dim=(2, 3))
        words = [text.split() for text in texts]
        return {'tone': colours[:, 0], 'rgb': colours, 'words': words}
model_lookup = {'tones': Tones}
"""


def test_a_class_declares_its_image_input_and_its_outputs(tmp_path: Path) -> None:
    """Equal inputs are prepared once, as uint8, for all models."""
    keys = {
        "models": ["tones", "image-stats"],
        "postprocess_columns": ["tones-tone", "tones-words", "image-brightness"],
        "postprocess_features": ["tones-rgb"],
        "custom_pypath": str(_write(tmp_path, TYPED)),
    }
    pictures = photographs(3)
    found = run(keys, pictures, ["a cat", "", "b"])
    small = [np.asarray(p.resize((48, 32), Image.Resampling.BICUBIC)) for p in pictures]
    expected = np.stack([pixels.mean(axis=(0, 1)) / 255 for pixels in small])
    np.testing.assert_allclose(found.features["tones-rgb"], expected, atol=1e-5)
    np.testing.assert_allclose(found.columns["tones-tone"], expected[:, 0], atol=1e-5)
    assert found.columns["tones-words"] == [["a", "cat"], [], ["b"]]
    known = custom.registry(custom.lookups(custom.load(tmp_path / "custom.py")))
    assert known.columns["tones-words"].type == "list<string>"
    assert known.features["tones-rgb"].shape == (3,)
    assert known.own == {"tones", "tones-tone", "tones-words", "tones-rgb"}
    told = frozen.Custom(known).described()
    assert frozen.Custom.of(json.loads(json.dumps(told)), {}).registry == known


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ("'size': [32, 48]", "'sise': 32", "sise"),
        ("'size': [32, 48]", "'size': 'large'", "preprocessors: size: found 'large'"),
        (", 'std': [1, 1, 1]", "", "a mean without a std; give both"),
        ("'mean': [0, 0, 0], ", "'mean': None, ", "a std without a mean; give both"),
        ("'squash'", "'squish'", "preprocessors: resize: found 'squish'"),
        ("'float32'", "'float'", "outputs: found 'tone': 'float'; valid are a column's type"),
        ("[3]", "[0]", r"outputs: found 'rgb': \[0\]"),
    ],
)
def test_a_wrong_input_or_output_is_told(old: str, new: str, mistake: str, tmp_path: Path) -> None:
    module = custom.load(_write(tmp_path, TYPED.replace(old, new)))
    with pytest.raises(ConfigError, match=mistake):
        custom.registry(custom.lookups(module))


def helper(values: Any) -> Any:
    return values


NAME = "own"


@pytest.mark.parametrize(
    ("post", "model"),
    [
        (lambda cache: cache["own"], "own"),
        (lambda cache: cache["cache"], "cache"),
        (lambda c: (c["own"][0] * c["own"][1]).sum(1), "own"),
        (lambda c: c["own"] * c["other"], ""),
        (lambda c: helper(c), ""),
        (lambda c: helper(c) + c["own"], ""),
        (lambda c: c.get("own"), ""),
        (lambda c: c[NAME], ""),
        (lambda c: helper(c["own"]), "own"),
        (lambda c: [c["own"] for _ in range(2)] and (lambda: c)(), ""),
        (lambda c, d=1: c["own"], ""),
        (lambda: 1, ""),
        (helper, ""),
        (len, ""),
        (partial(postprocessors.identity, model="own"), "own"),
    ],
)
def test_a_postprocessors_model_is_told_where_it_can_read_no_other(post: Any, model: str) -> None:
    assert custom.source(post) == model


@pytest.mark.parametrize("fields", ["raw_inputs = 5", "preprocessors = ('a', 3)"])
def test_a_field_of_other_things_than_names_is_a_mistake(fields: str, tmp_path: Path) -> None:
    tables = custom.lookups(
        custom.load(_write(tmp_path, f"class A:\n    {fields}\nmodel_lookup = {{'a': A}}\n"))
    )
    with pytest.raises(ConfigError, match=r"A in custom.py: 1 mistake\n  \w+: found .* of names"):
        custom.registry(tables)


def test_the_seeds_postprocessors_are_ours() -> None:
    custom.install_seed_names()
    from dataset2metadata.postprocessors import (  # type: ignore[import-not-found]
        batched_dot_product,
        identity,
        select,
        transpose_list,
    )

    assert identity is postprocessors.identity
    assert batched_dot_product is postprocessors.batched_dot_product
    assert select is postprocessors.select
    assert transpose_list is postprocessors.transpose_list


@pytest.mark.parametrize(
    ("seed", "ours"),
    [("oai_clip_image", "clip-aug"), ("dedup", "dedup-aug")],
)
def test_the_seeds_image_preprocessors_give_one_samples_floats(seed: str, ours: str) -> None:
    custom.install_seed_names()
    function = getattr(sys.modules["dataset2metadata.preprocessors"], seed)
    image = photographs(1)[0]
    made = PREPROCESSORS[ours]
    expected = made.finish(collate([made.prepare(Picture(image), Options(exact=True))]))[0]
    assert torch.equal(function(image), expected)


def test_the_seeds_faces_preprocessor_gives_one_samples_pair() -> None:
    """Without a batch's axis, so that a batch of them is what `faces-aug` makes."""
    custom.install_seed_names()
    function = sys.modules["dataset2metadata.preprocessors"].faces_scrfd
    images = photographs(2)
    made = PREPROCESSORS["faces-aug"]
    prepared = [made.prepare(Picture(image), Options(exact=True)) for image in images]
    pixels, paddings = made.finish(collate(prepared))
    ours, told = collate([function(image) for image in images])
    assert torch.equal(ours, pixels)
    assert torch.equal(told, paddings)


def test_the_seeds_text_preprocessors() -> None:
    custom.install_seed_names()
    module = sys.modules["dataset2metadata.preprocessors"]
    tokens = module.oai_clip_text("a cat")
    assert tokens.shape == (77,)
    assert tokens[:4].tolist() == [49406, 320, 2368, 49407]
    assert module.identity("a cat") == "a cat"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("\n1 / 0", r"ZeroDivisionError: division by zero \(custom.py, line 2\)"),
        ("raise SystemExit('no licence')", r"SystemExit: no licence \(custom.py, line 1\)"),
        ("class M(M):\n    pass", r"NameError: name 'M' is not defined \(custom.py, line 1\)"),
        ("class M(B):\n  pass\nclass B(M):\n  pass", r"NameError: name 'B' is not defined"),
        ("class M:\n    dependencies = {[]: 1}", "TypeError: unhashable type: 'list'"),
        ("x = " + "(" * 20_000, "(SyntaxError|MemoryError|ValueError): "),
    ],
)
def test_a_custom_file_that_fails_on_import_is_the_configs_mistake(
    text: str, reason: str, tmp_path: Path
) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(
        ConfigError, match=f"custom_pypath: importing it failed: {reason}"
    ) as caught:
        custom.load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_named_as_python_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "custom.txt"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"must end in \.py"):
        custom.load(path)


def test_tables_that_are_left_out_are_empty(tmp_path: Path) -> None:
    module = custom.load(_write(tmp_path, "model_lookup = {'a': int}"))
    assert custom.lookups(module) == {
        "model_lookup": {"a": int},
        "preprocessor_lookup": {},
        "postprocess_parquet_lookup": {},
        "postprocess_feature_lookup": {},
    }


def test_the_static_fields_have_the_seeds_defaults() -> None:
    class Bare:
        def __init__(self, device: str) -> None:
            pass

    spec = custom.spec_of("bare", Bare)
    assert (spec.inputs, spec.dependencies, spec.to_device, spec.family) == ((), (), True, None)


def test_a_custom_class_can_be_pickled_by_its_module(tmp_path: Path) -> None:
    """As libraries do that start processes, and as `inspect` needs."""
    module = custom.load(_write(tmp_path, "class A:\n    pass\n"))
    assert sys.modules[module.A.__module__] is module


def test_modules_beside_a_custom_file_are_found_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "a_neighbour.py").write_text("NAME = 'of a neighbour'")
    module = custom.load(_write(tmp_path, "from a_neighbour import NAME"))
    assert module.NAME == "of a neighbour"


def test_packages_win_over_modules_beside_a_custom_file(tmp_path: Path) -> None:
    (tmp_path / "graphlib.py").write_text("1 / 0")
    assert custom.load(_write(tmp_path, "from graphlib import CycleError")).CycleError


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ("{'look': Look}", "[Look]", "model_lookup: found list; valid is a dict"),
        ("{'look': Look}", "{'look': Look('cpu')}", r"model_lookup: 'look' is Look\(\)"),
        ("{'look': Look}", "{'look': 'Look'}", "model_lookup: 'look' is 'Look'"),
        ("model_lookup =", "postprocess_parquet_lookup = {'c': 'len'}; model_lookup =", "'len'"),
    ],
)
def test_a_lookup_of_other_things_than_classes_and_functions_is_a_mistake(
    old: str, new: str, mistake: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=mistake) as caught:
        _look(tmp_path, old, new)
    assert "custom.py: 1 mistake" in str(caught.value)


def test_one_name_may_stand_without_its_list(tmp_path: Path) -> None:
    """`("text")` is what a tuple of one looks like to most who write it."""
    for old, new in (("('text',)", "('text')"), ("('identity',)", "'identity'")):
        made = custom.registry(_look(tmp_path, old, new)).models["look"]
        assert made.inputs == (("text", "identity"),)


def _built(tables: custom.Tables) -> Any:
    made = tables["model_lookup"]["look"]
    return custom.build(custom.spec_of("look", made), made, "cpu", Weights(Path("w")))


def test_a_model_is_built_for_a_device(tmp_path: Path) -> None:
    assert _built(_look(tmp_path))(["a", "bcd"]).tolist() == [1, 3]


def test_a_model_that_is_no_module_is_called_all_the_same(tmp_path: Path) -> None:
    tables = _look(tmp_path, "def forward(", "def __call__(")
    assert _built(tables)(["a"]).tolist() == [1]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("class Look(torch.nn.Module)", "class Look", "derive the class from torch.nn.Module"),
        ("(self, texts)", "(self, texts, y)", r"forward\(texts, y\) is given text: missing .* 'y'"),
        ("(self, texts)", "(self)", r"forward\(\) is given text: too many"),
        ("dependencies = ()", "dependencies = ('other',)", "is given text, other: too many"),
        ("(self, device)", "(self)", r"__init__\(\) is given device: too many"),
        ("(self, device)", "(self, device, size)", "is given device: missing .* argument: 'size'"),
    ],
)
def test_a_model_that_cannot_be_called_with_its_inputs_is_not_built(
    old: str, new: str, reason: str, tmp_path: Path
) -> None:
    """A submit tells what the signatures do, and a task the rest."""
    tables = _look(tmp_path, old, new)
    with pytest.raises((ConfigError, TypeError), match=reason):
        _built(tables)


@pytest.mark.parametrize(
    ("argument", "published", "given"),
    [
        ("weights", (), "w"),
        ("weights='own'", (), "own"),
        ("weights='own'", (HubRepo("a/b"),), "w"),
    ],
)
def test_the_weights_folder_is_given_to_whoever_takes_it(
    argument: str, published: tuple[HubRepo, ...], given: str, tmp_path: Path
) -> None:
    """A default of the class's own stays, as classes written for the seed may have one."""
    keep = "super().__init__(); self.given = str(getattr(weights, 'folder', weights))"
    text = LOOK.replace("(self, device)", f"(self, device, {argument})")
    file = _write(tmp_path, text.replace("super().__init__()", keep))
    tables = custom.lookups(custom.load(file))
    tables["model_lookup"]["look"].checkpoints = published
    assert _built(tables).given == given


def test_the_line_of_the_custom_file_is_told_that_an_error_came_through(tmp_path: Path) -> None:
    module = custom.load(_write(tmp_path, "\n\ndef parse(text):\n    return int(text)\n"))
    with pytest.raises(ValueError, match="invalid literal") as caught:
        module.parse("x")
    assert custom.described(caught.value).endswith("with base 10: 'x' (custom.py, line 4)")


def test_no_line_is_told_of_an_error_that_came_through_no_custom_file() -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")
    assert custom.described(caught.value).startswith("ValueError: invalid literal")
    assert "line" not in custom.described(caught.value)


ON_A_FAMILY = """
import torch
class Warm(torch.nn.Module):
    dependencies = ('stats',)
    outputs = {'warm': 'bool'}
    def __init__(self, device):
        super().__init__()
    def forward(self, stats):
        brightness, contrast, *_ = stats
        return {'warm': brightness > contrast}
model_lookup = {'warm': Warm}
"""


def test_a_class_depends_on_a_model_with_parameters(tmp_path: Path) -> None:
    keys = {
        "models": ["warm", {"stats": {"kind": "image-stats"}}],
        "postprocess_columns": ["warm-warm", "stats-brightness"],
        "custom_pypath": str(_write(tmp_path, ON_A_FAMILY)),
    }
    found = run(keys, photographs(3)).columns
    assert len(found["warm-warm"]) == len(found["stats-brightness"]) == 3
    keys["models"] = ["warm"]
    with pytest.raises(ConfigError, match="'warm' needs the output of 'stats', which is not list"):
        run(keys, photographs(1))
