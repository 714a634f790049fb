from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import SHARDS, write_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError, ShardError
from d2m_hpc.models import inputs, precision
from d2m_hpc.models.inputs import Input
from d2m_hpc.models.preprocessors import PREPROCESSORS, Preprocessor
from d2m_hpc.models.tokens import clip_tokens
from d2m_hpc.stopping import Stopped
from d2m_hpc.worker.batch import Batch, Outputs, collate
from d2m_hpc.worker.compute.ahead import in_turn
from d2m_hpc.worker.compute.graph import Graph, amp_dtype
from d2m_hpc.worker.compute.resolve import Toolbox
from d2m_hpc.worker.faults import guarded
from d2m_hpc.worker.work import Clock

CPU = torch.device("cpu")

HEAD = """
import torch
from functools import partial
from torch import nn
from d2m_hpc.models.postprocessors import identity, select

CALLS = []

class Model:
    raw_inputs = ['text']
    preprocessors = ['number']
    dependencies = []
    to_device = True
    def __init__(self, device):
        self.device = device
    def __call__(self, *inputs):
        CALLS.append((type(self).__name__, len(inputs[0])))
        return self.forward(*inputs)

preprocessor_lookup = {'number': lambda text: torch.tensor([float(text)])}
"""


class Bench:
    """A graph of the models of a custom file, and batches of numbers for it."""

    def __init__(self, folder: Path, text: str, columns: list[str], **values: Any) -> None:
        custom = folder / "custom.py"
        custom.write_text(HEAD + text)
        common = {
            "postprocess_columns": columns,
            "input_tars": str(SHARDS / "00000.tar"),
            "output_metadata_dir": str(folder / "out"),
            "device": "cpu",
            "custom_pypath": str(custom),
        }
        config = configs.load(write_config(folder / "config.yml", {**common, **values}))
        self.toolbox = Toolbox.of(config)
        self.graph = Graph(config, self.toolbox, CPU)
        self.module = sys.modules["d2m_custom_custom"]

    def run(self, numbers: list[float], inputs: Mapping[Input, Any] = {}) -> Outputs:
        return self.graph(self.batch(numbers, inputs))

    def batch(self, numbers: list[float], inputs: Mapping[Input, Any] = {}) -> Batch:
        return Batch(
            keys=[f"k{i}" for i in range(len(numbers))],
            inputs={
                ("text", "number"): torch.tensor(numbers, dtype=torch.float32)[:, None],
                **inputs,
            },
            fields={"uid": [f"u{i}" for i in range(len(numbers))]},
        )


Make = Callable[..., Bench]


@pytest.fixture
def bench(tmp_path: Path) -> Make:
    def make(text: str, models: list[str], columns: list[str], **values: Any) -> Bench:
        return Bench(tmp_path, text, columns, models=models, **values)

    return make


CHAIN = """
class Double(Model):
    def forward(self, x):
        return 2 * x[:, 0]
class Sum(Model):
    dependencies = ['double', 'square']
    def forward(self, x, double, square):
        return x[:, 0] + 10 * double + 100 * square
class Square(Model):
    dependencies = ['double']
    raw_inputs = []
    preprocessors = []
    def forward(self, double):
        return double ** 2
model_lookup = {'sum': Sum, 'square': Square, 'double': Double}
postprocess_parquet_lookup = {'total': partial(identity, model='sum')}
"""


def test_a_model_is_given_its_inputs_and_then_its_dependencies_outputs(bench: Make) -> None:
    made = bench(CHAIN, ["sum", "square", "double"], ["total"])
    outputs = made.run([1, 2, 3])
    assert outputs.columns["total"].tolist() == [x + 20 * x + 400 * x * x for x in (1, 2, 3)]
    assert [name for name, _ in made.module.CALLS] == ["Double", "Square", "Sum"]
    assert outputs.keys == ["k0", "k1", "k2"]
    assert outputs.fields == {"uid": ["u0", "u1", "u2"]}
    assert (outputs.rejections, outputs.recomputed) == ([], 0)


GREEDY = """
class Greedy(Model):
    def forward(self, x):
        if len(x) > LIMIT:
            raise torch.OutOfMemoryError('CUDA out of memory')
        rows = x[:, 0]
        return rows * 2, {list}
class After(Model):
    raw_inputs = []
    preprocessors = []
    dependencies = ['greedy']
    def forward(self, outputs):
        if len(outputs[0]) > LIMIT:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return [str(v) + w for v, w in zip(outputs[0].tolist(), outputs[1])]
model_lookup = {'greedy': Greedy, 'after': After}
postprocess_parquet_lookup = {
    'double': partial(select, model='greedy', index=0),
    'words': partial(select, model='greedy', index=1, to_cpu=False),
    'after': partial(identity, model='after', to_cpu=False),
}
""".replace("{list}", "[f'w{int(v)}' for v in rows.tolist()]")


def _greedy(bench: Make, limit: int) -> Bench:
    models = ["greedy", "after"]
    return bench(f"LIMIT = {limit}\n" + GREEDY, models, ["double", "words", "after"])


def test_out_of_memory_is_answered_with_halves_and_the_result_is_the_same(bench: Make) -> None:
    numbers = [float(i) for i in range(11)]
    whole = _greedy(bench, limit=100).run(numbers)
    halved = _greedy(bench, limit=3)
    outputs = halved.run(numbers)
    assert outputs.columns["double"].tolist() == whole.columns["double"].tolist()
    assert outputs.columns["words"] == whole.columns["words"] == [f"w{i}" for i in range(11)]
    assert outputs.columns["after"] == whole.columns["after"]
    sizes = [rows for name, rows in halved.module.CALLS if name == "Greedy" and rows <= 3]
    assert sum(sizes) == 11


def test_a_single_row_that_does_not_fit_is_out_of_memory(bench: Make) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        _greedy(bench, limit=0).run([1, 2])


WIDE = """
class Wide(Model):
    def __init__(self, device):
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.net.weight, 300)
    def forward(self, x):
        return self.net(x)
"""

OVERFLOW = (
    WIDE
    + """
class Next(Model):
    raw_inputs = []
    preprocessors = []
    dependencies = ['wide']
    def forward(self, y):
        return y[:, 0].float() + 1
model_lookup = {'wide': Wide, 'next': Next}
postprocess_parquet_lookup = {
    'wide': partial(identity, model='wide'), 'next': partial(identity, model='next'),
}
"""
)


def test_rows_that_overflow_in_half_precision_are_run_again_in_float32(bench: Make) -> None:
    """300 x 300 is beyond float16; the recomputed value has to stay what float32 made of it."""
    made = bench(OVERFLOW, ["wide", "next"], ["wide", "next"], amp="float16")
    outputs = made.run([1, 300, 2, 400])
    assert outputs.columns["wide"][:, 0].tolist() == [300, 90_000, 600, 120_000]
    assert outputs.columns["next"].tolist() == [301, 90_001, 601, 120_001]
    assert outputs.recomputed == 2
    assert outputs.rejections == []
    assert made.module.CALLS == [("Wide", 4), ("Next", 4), ("Wide", 2), ("Next", 2)]


MASKING = (
    WIDE
    + """
class Next(Wide):
    raw_inputs = []
    preprocessors = []
    dependencies = ['wide']
    def forward(self, y):
        return self.net(y.float().nan_to_num(posinf=0) / 300)
class Beside(Model):
    def forward(self, x):
        return [torch.is_autocast_enabled('cpu')] * len(x)
model_lookup = {'wide': Wide, 'next': Next, 'beside': Beside}
postprocess_parquet_lookup = {
    'wide': partial(identity, model='wide'), 'next': partial(identity, model='next'),
    'half': partial(identity, model='beside', to_cpu=False),
}
"""
)


def test_an_overflow_that_only_a_mended_output_shows_is_mended_too(bench: Make) -> None:
    """Models that did not overflow stay in half precision, which is all that some can do."""
    names = ["wide", "next", "half"]
    outputs = bench(MASKING, ["wide", "next", "beside"], names, amp="float16").run([1, 300, 2])
    assert outputs.columns["wide"][:, 0].tolist() == [300, 90_000, 600]
    assert outputs.columns["next"][:, 0].tolist() == [300, 90_000, 600]
    assert outputs.columns["half"] == [True, True, True]
    assert (outputs.recomputed, outputs.rejections) == (1, [])


FRAGILE = """
class Fragile(Model):
    def forward(self, x):
        y = x.clone()
        if torch.is_autocast_enabled('cpu'):
            y[y == 2] = torch.nan
        y[y == 3] = torch.inf
        return y[:, 0], [[v, v] for v in y[:, 0].tolist()]
class Next(Model):
    raw_inputs = []
    preprocessors = []
    dependencies = ['fragile']
    def forward(self, outputs):
        return outputs[0] * 2
model_lookup = {'fragile': Fragile, 'next': Next}
postprocess_parquet_lookup = {
    'value': partial(select, model='fragile', index=0),
    'list': partial(select, model='fragile', index=1, to_cpu=False),
    'next': partial(identity, model='next'),
}
postprocess_feature_lookup = {'feature': partial(select, model='fragile', index=0)}
"""


def _fragile(bench: Make, amp: str) -> Bench:
    columns = ["value", "list", "next"]
    return bench(FRAGILE, ["fragile", "next"], columns, amp=amp, postprocess_features=["feature"])


def test_rows_that_stay_not_finite_are_rejected_and_the_others_are_intact(bench: Make) -> None:
    outputs = _fragile(bench, "bfloat16").run([1, 2, 3, 4])
    assert outputs.keys == ["k0", "k1", "k3"]
    assert outputs.columns["value"].tolist() == [1, 2, 4]
    assert outputs.columns["list"] == [[1, 1], [2, 2], [4, 4]]
    assert outputs.columns["next"].tolist() == [2, 4, 8]
    assert outputs.features["feature"].tolist() == [1, 2, 4]
    assert outputs.fields == {"uid": ["u0", "u1", "u3"]}
    assert outputs.recomputed == 2
    [rejection] = outputs.rejections
    assert rejection.key == "k2"
    assert rejection.reason == "fragile gives a value that is not finite"


INVERSE = """
class Some(Model):
    def forward(self, x):
        return x[:, 0]
model_lookup = {'some': Some}
postprocess_parquet_lookup = {'inverse': lambda cache: 1 / (cache['some'] - 2)}
postprocess_feature_lookup = {}
"""


def test_a_row_that_a_postprocessor_makes_infinite_is_rejected_alone(bench: Make) -> None:
    outputs = bench(INVERSE, ["some"], ["inverse"]).run([1, 2, 3])
    assert outputs.columns["inverse"].tolist() == [-1, 1]
    assert outputs.rejections == [("k1", "inverse is not finite")]


def test_without_autocast_nothing_is_run_again(bench: Make) -> None:
    made = _fragile(bench, "off")
    outputs = made.run([1, 2, 3])
    assert (outputs.keys, outputs.recomputed) == (["k0", "k1"], 0)
    assert [rejection.key for rejection in outputs.rejections] == ["k2"]
    assert [rows for name, rows in made.module.CALLS if name == "Fragile"] == [3]


LISTS = """
class Pair(Model):
    def forward(self, x):
        return [x, x.clone()]
class Next(Model):
    raw_inputs = []
    preprocessors = []
    dependencies = ['pair']
    def forward(self, outputs):
        if len(outputs[0]) > 2:
            raise torch.OutOfMemoryError
        return outputs[0][:, 0] + outputs[1][:, 0]
model_lookup = {'pair': Pair, 'next': Next}
postprocess_parquet_lookup = {
    'second': partial(select, model='pair', index=1), 'next': partial(identity, model='next'),
}
"""


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_a_list_of_outputs_is_read_as_a_tuple_of_them(bench: Make, rows: int) -> None:
    """Row by row, also when a batch has as many rows as there are outputs."""
    numbers = [*map(float, range(1, rows)), float("nan")]
    outputs = bench(LISTS, ["pair", "next"], ["second", "next"]).run(numbers)
    assert [rejection.key for rejection in outputs.rejections] == [f"k{rows - 1}"]
    assert outputs.columns["second"][:, 0].tolist() == numbers[:-1]
    assert outputs.columns["next"].tolist() == [2 * n for n in numbers[:-1]]


@pytest.mark.parametrize(
    ("made", "what"),
    [
        ("x[1:]", r"a tensor of shape \[2, 1\]"),
        ("x.sum()", r"a tensor of shape \[\]"),
        ("['a', 'b']", "list of 2 items"),
        ("7", "int"),
        ("(x, x)", "tuple of 2 items"),
        ("(x, x, x)", "tuple of 3 items"),
        ("{'a': x, 'b': x, 'c': x}", "dict of 3 items"),
    ],
)
def test_a_postprocessor_that_makes_too_few_rows_fails_the_shard(
    bench: Make, made: str, what: str
) -> None:
    text = f"""
class Some(Model):
    def forward(self, x):
        return x
model_lookup = {{'some': Some}}
def post(cache):
    x = cache['some']
    return {made}
postprocess_parquet_lookup = {{'column': post}}
"""
    what += " of 'some' for a batch of 3 samples"
    with pytest.raises(ShardError, match=f"'column' made {what}"):
        bench(text, ["some"], ["column"]).run([1, 2, 3])


def test_the_model_whose_output_has_too_few_rows_is_named(bench: Make) -> None:
    text = CHAIN.replace("return 2 * x[:, 0]", "return x[1:, 0]")
    text = text.replace("model='sum'", "model='double'")
    what = r"'total' made a tensor of shape \[2\] of 'double' for a batch of 3 samples"
    with pytest.raises(ShardError, match=what):
        bench(text, ["double"], ["total"]).run([1, 2, 3])


def test_a_feature_whose_rows_are_of_different_lengths_fails_the_shard(bench: Make) -> None:
    text = """
class Some(Model):
    def forward(self, x):
        return [[1.0] * int(n) for n in x[:, 0]]
model_lookup = {'some': Some}
postprocess_feature_lookup = {'ragged': partial(identity, model='some', to_cpu=False)}
"""
    made = bench(text, ["some"], [], postprocess_features=["ragged"])
    with pytest.raises(ShardError, match="'ragged' has rows of different lengths"):
        made.run([1, 2])
    assert made.run([2, 2]).features["ragged"].shape == (2, 2)


def test_a_forward_without_a_return_is_told(bench: Make) -> None:
    text = """
class Some(Model):
    def forward(self, x):
        x + 1
model_lookup = {'some': Some}
"""
    with pytest.raises(ShardError, match="'some' raised TypeError: its forward returned None"):
        bench(text, ["some"], []).run([1])


FAILING = """
class Some(Model):
    def forward(self, x):
        if x.max() > 5:
            raise ValueError('too large')
        return x[:, 0]
model_lookup = {'some': Some}
postprocess_parquet_lookup = {
    'column': partial(identity, model='some'), 'wrong': lambda cache: {}['other'],
}
"""


def test_what_a_model_raises_fails_the_shard_with_its_name_and_reason(bench: Make) -> None:
    made = bench(FAILING, ["some"], ["column"])
    line = (HEAD + FAILING).splitlines().index("            raise ValueError('too large')") + 1
    what = rf"'some' raised ValueError: too large \(custom.py, line {line}\)"
    with pytest.raises(ShardError, match=what) as caught:
        made.run([1, 9])
    assert isinstance(caught.value.__cause__, ValueError)
    assert made.run([1, 2]).columns["column"].tolist() == [1, 2]


def test_what_a_postprocessor_raises_fails_the_shard_with_its_name(bench: Make) -> None:
    with pytest.raises(ShardError, match=r"'wrong' raised KeyError: 'other' \(custom.py"):
        bench(FAILING, ["some"], ["wrong"]).run([1])


@pytest.mark.parametrize("error", ["OSError('no such repository')", "SystemExit('no licence')"])
def test_a_model_that_cannot_be_built_is_named(bench: Make, error: str) -> None:
    text = f"""
class Some(Model):
    def __init__(self, device):
        raise {error}
model_lookup = {{'some': Some}}
"""
    name, reason = error.rstrip("')").split("('")
    what = (
        rf"'some' \(Some in custom.py\) cannot be built: {name}: {reason} \(custom.py, line \d+\)"
    )
    with pytest.raises(ConfigError, match=what):
        bench(text, ["some"], [])


DTYPES = """
class Half(Model):
    def __init__(self, device):
        self.net = nn.Linear(1, 4)
    def forward(self, x):
        y = self.net(x)
        return [str(y.dtype)] * len(x), y
model_lookup = {'half': Half}
postprocess_parquet_lookup = {'dtype': partial(select, model='half', index=0, to_cpu=False)}
postprocess_feature_lookup = {'feature': partial(select, model='half', index=1)}
"""


@pytest.mark.parametrize(
    ("amp", "dtype"),
    [
        ("auto", "float32"),
        ("off", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
    ],
)
def test_models_run_under_the_configs_autocast(bench: Make, amp: str, dtype: str) -> None:
    made = bench(DTYPES, ["half"], ["dtype"], amp=amp, postprocess_features=["feature"])
    outputs = made.run([1, 2])
    assert outputs.columns["dtype"] == [f"torch.{dtype}"] * 2
    assert outputs.features["feature"].dtype == np.float32


def test_auto_is_float16_on_cuda() -> None:
    assert amp_dtype("auto", torch.device("cuda", 0)) is torch.float16
    assert amp_dtype("auto", CPU) is None


SHARED = """
class A(Model):
    raw_inputs = ['text', 'image']
    preprocessors = ['number', 'clip-aug']
    def forward(self, x, image):
        return image
class B(A):
    to_device = False
model_lookup = {'a': A, 'b': B}
postprocess_feature_lookup = {
    'a': partial(identity, model='a'), 'b': partial(identity, model='b'),
}
"""


def test_a_distinct_input_is_finished_once_and_reaches_every_model_finished(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the models that keep their inputs off the device: pixels travel as bytes to all."""
    made = PREPROCESSORS["clip-aug"]
    finished: list[Any] = []

    def finish(pixels: Any) -> Any:
        finished.append(pixels)
        return made.finish(pixels)

    monkeypatch.setitem(PREPROCESSORS, "clip-aug", Preprocessor(made.prepare, finish))
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    graph = bench(SHARED, ["a", "b"], [], postprocess_features=["a", "b"])
    outputs = graph.run([1, 2], {inputs.as_prepared(("image", inputs.NAMED["clip-aug"])): pixels})
    expected = made.finish(pixels).numpy()
    np.testing.assert_array_equal(outputs.features["a"], expected)
    np.testing.assert_array_equal(outputs.features["b"], expected)
    assert len(finished) == 1


def test_gradients_are_never_recorded(bench: Make) -> None:
    made = bench(DTYPES.replace("str(y.dtype)", "y.requires_grad"), ["half"], ["dtype"])
    assert made.run([1]).columns["dtype"] == [False]


@pytest.mark.parametrize(
    ("fields", "mistake"),
    [
        ("dependencies = [n for n in ('other',)]", "'other'"),
        ("preprocessors = [n for n in ('number', 'number')]", "1 raw_inputs and 2 preprocessors"),
        ("preprocessors = [n for n in ('nowhere',)]", "unknown preprocessor 'nowhere'"),
        ("raw_inputs = [n for n in ('texts',)]", "raw input 'texts'; did you mean 'text'"),
        ("dependencies = [n for n in ('a',)]", "circle of dependencies, a -> a"),
    ],
)
def test_mistakes_that_only_running_the_file_can_tell_are_the_configs(
    bench: Make, fields: str, mistake: str
) -> None:
    text = f"class A(Model):\n    {fields}\nmodel_lookup = {{'a': A}}\n"
    with pytest.raises(ConfigError, match=mistake):
        bench(text, ["a"], [])


NAMED = """
from transformers.modeling_outputs import ModelOutput
from dataclasses import dataclass
@dataclass
class Found(ModelOutput):
    double: torch.Tensor = None
    words: list = None
class Named(Model):
    def forward(self, x):
        if len(x) > LIMIT:
            raise torch.OutOfMemoryError('CUDA out of memory')
        y = 2 * x[:, 0]
        if torch.is_autocast_enabled('cpu'):
            y = y.clone()
            y[x[:, 0] == 5] = torch.nan
        y[x[:, 0] == 7] = torch.nan
        return KIND({'double': y, 'words': [f'w{int(n)}' for n in x[:, 0]]})
class After(Model):
    raw_inputs = []
    preprocessors = []
    dependencies = ['named']
    def forward(self, found):
        if len(found['words']) > LIMIT:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return found['double'] + len(found['words'][0])
model_lookup = {'named': Named, 'after': After}
postprocess_parquet_lookup = {
    'double': lambda cache: cache['named']['double'],
    'words': lambda cache: READ(cache['named']),
    'after': partial(identity, model='after'),
}
"""
KINDS = {
    "dict": "KIND, READ = dict, lambda found: found['words']\n",
    "ModelOutput": "KIND, READ = (lambda parts: Found(**parts)), lambda found: found.words\n",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [2, 100])
def test_named_outputs_are_split_mended_and_checked_row_by_row(
    bench: Make, kind: str, limit: int
) -> None:
    text = f"LIMIT = {limit}\n" + KINDS[kind] + NAMED
    made = bench(text, ["named", "after"], ["double", "words", "after"], amp="bfloat16")
    outputs = made.run([1, 5, 3, 7, 4])
    assert outputs.columns["double"].tolist() == [2, 10, 6, 8]
    assert outputs.columns["words"] == ["w1", "w5", "w3", "w4"]
    assert outputs.columns["after"].tolist() == [4, 12, 8, 10]
    assert outputs.recomputed == 2
    assert outputs.rejections == [("k3", "named gives a value that is not finite")]


READ = """
class Some(Model):
    def forward(self, x):
        return x
class Found(Model):
    def forward(self, x):
        return x, x + 1
    def on_host(self, output):
        CALLS.append(('read', len(output[0])))
        return [[a, b] for a, b in zip(output[0][:, 0].tolist(), output[1][:, 0].tolist())]
class Longest(Model):
    raw_inputs = []
    preprocessors = []
    dependencies = ['found']
    def forward(self, found):
        return torch.tensor([max(pair) for pair in found])
def post(cache):
    CALLS.append(('post', len(cache['some'])))
    return cache['some'][:, 0]
model_lookup = {'some': Some, 'found': Found, 'longest': Longest}
postprocess_parquet_lookup = {
    'post': post, 'found': partial(identity, model='found', to_cpu=False),
    'longest': partial(identity, model='longest'),
}
"""


def test_the_next_batch_is_launched_before_the_outputs_of_one_are_read(bench: Make) -> None:
    made = bench(READ, ["some", "found"], ["post", "found"])
    batches = [made.batch([float(i)] * size) for i, size in enumerate((1, 2, 3))]
    with made.graph as graph:
        ran = [outputs.columns for outputs in graph.run(iter(batches))]
    assert [c["post"].tolist() for c in ran] == [[0], [1, 1], [2, 2, 2]]
    assert [c["found"] for c in ran] == [[[0, 1]], [[1, 2]] * 2, [[2, 3]] * 3]
    launch = [[("Some", n), ("Found", n)] for n in (1, 2, 3)]
    read = [[("read", n), ("post", n)] for n in (1, 2, 3)]
    calls: list[tuple[str, int]] = made.module.CALLS
    assert calls == [*launch[0], *launch[1], *read[0], *launch[2], *read[1], *read[2]]


def test_no_batch_is_launched_after_one_that_failed(bench: Make) -> None:
    made = bench(FAILING, ["some"], ["column"])
    asked: list[int] = []

    def batches() -> Iterator[Batch]:
        for i, number in enumerate((1, 9, 2)):
            asked.append(i)
            yield made.batch([float(number)])

    with pytest.raises(ShardError, match="too large"):
        list(made.graph.run(batches()))
    assert asked == [0, 1]


class Shards:
    """Shards of batches, as a loader gives them, of which none or all are ready."""

    def __init__(self, shards: list[list[Batch]], ready: Iterable[bool] = repeat(True)) -> None:
        self.left, self.clock = [iter(batches) for batches in shards], Clock()
        self._ready = iter(ready)
        self.polls = 0

    def __iter__(self) -> Iterator[Iterator[Batch]]:
        while self.left:
            yield self.left.pop(0)

    def poll(self) -> tuple[Clock, Batch] | None:
        self.polls += 1
        return (self.clock, next(self.left[0])) if next(self._ready) and self.left else None


class Stop(Stopped):
    def __init__(self) -> None:
        super().__init__(signal.SIGTERM)


AHEAD = (
    READ
    + """
ERRORS = {}
class Failing(Some):
    def forward(self, x):
        if error := ERRORS.get(float(x[0, 0])):
            raise error
        return x
def late(cache):
    if error := ERRORS.get(-float(cache['some'][0, 0])):
        raise error
    return post(cache)
model_lookup['some'] = Failing
postprocess_parquet_lookup['post'] = late
"""
)


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs pass for a GPU's, which launch ahead."""
    monkeypatch.setattr(Graph, "returns_early", True)


def ahead(bench: Make, *sizes: list[int], ready: Iterable[bool] = repeat(True)) -> Any:
    """A graph, and shards of batches of these sizes for it."""
    made = bench(AHEAD, ["some"], ["post"])
    shards = Shards([[made.batch([float(n)] * n) for n in shard] for shard in sizes], ready)
    return made, shards, in_turn(made.graph, shards, shards.poll)


def told(made: Any, shards: Iterable[tuple[Any, Iterator[Outputs]]]) -> list[Any]:
    """The sizes of each shard's outputs, or its error; the end of each shard is in `CALLS`."""
    found: list[Any] = []
    for _, outputs in shards:
        try:
            found.append([len(o.keys) for o in guarded(outputs)])
        except Exception as error:
            found.append(str(error))
        made.module.CALLS.append(("end", len(found)))
    return found


def events(made: Any) -> list[int | str]:
    """Launches of batches, by size; -n where the outputs of n samples are read; shards' ends."""
    kinds = {"Failing": 1, "post": -1}
    return [kinds[name] * n if name in kinds else f"{name} {n}" for name, n in made.module.CALLS]


@pytest.mark.usefixtures("early")
def test_the_next_shard_is_launched_before_the_last_outputs_of_one_are_read(bench: Make) -> None:
    made, shards, turns = ahead(bench, [1, 2], [3], [4, 5])
    assert told(made, turns) == [[1, 2], [3], [4, 5]]
    assert events(made) == [1, 2, -1, 3, -2, "end 1", 4, -3, "end 2", 5, -4, -5, "end 3"]
    assert shards.clock.seconds["compute"] > 0


@pytest.mark.usefixtures("early")
def test_a_shard_that_is_not_ready_is_not_waited_for(bench: Make) -> None:
    """It may be when the outputs have been read."""
    made, _, turns = ahead(bench, [1, 2], [3], [4], ready=iter([False, True] + 9 * [False]))
    assert told(made, turns) == [[1, 2], [3], [4]]
    assert events(made) == [1, 2, -1, -2, 3, "end 1", -3, "end 2", 4, -4, "end 3"]


def test_a_cpu_does_not_compute_the_next_shard_before_one_is_done(bench: Make) -> None:
    made, shards, turns = ahead(bench, [1, 2], [3])
    assert told(made, turns) == [[1, 2], [3]]
    assert events(made) == [1, 2, -1, -2, "end 1", 3, -3, "end 2"]
    assert shards.polls == 0


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("error", [ValueError("no"), SystemExit("no"), KeyboardInterrupt("no")])
def test_an_error_of_the_next_shards_launch_is_its_own(bench: Make, error: BaseException) -> None:
    made, _, turns = ahead(bench, [1, 2], [3, 4], [5])
    made.module.ERRORS[3.0] = error
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # so that nobody else interrupts
    try:
        first, second, third = told(made, turns)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (first, third) == ([1, 2], [5])
    assert f"{type(error).__name__}: no" in second
    assert events(made) == [1, 2, -1, 3, -2, "end 1", "end 2", 5, -5, "end 3"]


@pytest.mark.usefixtures("early")
def test_an_error_of_reading_a_shards_last_outputs_is_its_own(bench: Make) -> None:
    made, _, turns = ahead(bench, [1, 2], [3], [4])
    made.module.ERRORS[-2.0] = ValueError("unread")
    first, *others = told(made, turns)
    assert "unread" in first
    assert others == [[3], [4]]
    assert events(made) == [1, 2, -1, 3, "end 1", 4, -3, "end 2", -4, "end 3"]


@pytest.mark.usefixtures("early")
def test_who_asks_a_task_to_end_is_heard_at_once(bench: Make) -> None:
    made, _, turns = ahead(bench, [1], [2])
    made.module.ERRORS[2.0] = Stop()
    with pytest.raises(Stopped):
        told(made, turns)
    assert events(made) == [1, 2]


@pytest.mark.usefixtures("early")
def test_what_is_given_up_is_waited_for_first(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU may still read and write the memory."""
    made, _, turns = ahead(bench, [1], [2, 3], [4], [5], [6])
    waits: list[int] = []
    monkeypatch.setattr(made.graph, "wait", lambda: waits.append(len(made.module.CALLS)))
    assert [len(o.keys) for o in next(turns)[1]] == [1]
    assert waits == []
    next(turns)  # whose outputs nobody asks for
    next(turns)
    assert waits == [3]
    _, outputs = next(turns)
    assert waits == [3]
    assert len(next(outputs).keys) == 5
    turns.close()  # with the batch of the last shard launched
    assert events(made) == [1, 2, -1, 5, 6, -5]
    assert waits == [3, 6, 6]


def test_a_model_that_is_read_on_the_host_is_read_before_its_dependents(bench: Make) -> None:
    made = bench(READ, ["found", "longest"], ["found", "longest"])
    outputs = made.run([1, 5])
    assert outputs.columns["found"] == [[1, 2], [5, 6]]
    assert outputs.columns["longest"].tolist() == [2, 6]
    assert made.module.CALLS == [("Found", 2), ("read", 2), ("Longest", 2)]


class _Casts(TorchDispatchMode):
    """Counts the parameters that are cast to half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            self.count += 1
        return function(*args, **(kwargs or {}))


def _casts(graph: Graph, batch: Batch) -> int:
    with _Casts() as casts:
        graph(batch)
    return casts.count


def test_weights_are_cast_once_while_the_graph_is_held(bench: Make) -> None:
    made = bench(DTYPES, ["half"], ["dtype"], amp="bfloat16")
    batch = made.batch([1, 2])
    with made.graph as graph:
        assert [_casts(graph, batch) for _ in range(3)] == [2, 0, 0]
        assert not torch.is_autocast_enabled("cpu")
    assert [_casts(made.graph, batch) for _ in range(2)] == [2, 2]


def test_float32_is_not_rounded_to_ten_bits(bench: Make) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    bench(DTYPES, ["half"], ["dtype"])
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


PICTURES = """
class Pictures(Model):
    raw_inputs = ['image', 'text']
    preprocessors = ['clip-aug', 'number']
    def __init__(self, device):
        self.image_net = nn.Conv2d(3, 2, 4)
    def forward(self, images, numbers):
        return self.image_net(images)[:, :, 0, 0]
model_lookup = {'pictures': Pictures}
postprocess_feature_lookup = {'made': partial(identity, model='pictures')}
"""


def test_image_nets_are_compiled_for_full_batches(
    bench: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[int, nn.Module]] = []
    monkeypatch.setattr(
        "d2m_hpc.worker.compute.graph.compile_for", lambda *given, **more: asked.append(given)
    )
    caplog.set_level("INFO")
    made = bench(
        PICTURES, ["pictures"], [], postprocess_features=["made"], compile=True, batch_size=3
    )
    assert asked == [(3, made.graph.models["pictures"].image_net)]
    assert "compiling pictures; the first batches of 3 take minutes" in caplog.text


FAST = """
class Fast(nn.Module):
    raw_inputs, preprocessors, dependencies = ['text'], ['number'], []
    def __init__(self, device):
        super().__init__()
        self.net = nn.Linear(1, 1).requires_grad_(False)
        self.own = nn.Parameter(torch.ones(1), requires_grad=False)
        SET
        self.seen = []
    def forward(self, x):
        self.seen.append(torch.backends.cudnn.SWITCH)
        return self.net(x) + float(self.own.numpy()[0])
model_lookup = {'fast': Fast}
postprocess_parquet_lookup = {'fast': partial(identity, model='fast')}
"""
NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@pytest.mark.parametrize(
    ("set_it", "switch", "ours", "theirs"),
    [
        ("torch.backends.cudnn.allow_tf32 = True", "allow_tf32", False, True),
        pytest.param(
            "torch.backends.fp32_precision = torch.backends.cudnn.conv.fp32_precision = 'tf32'",
            *("conv.fp32_precision", "ieee", "tf32"),
            marks=pytest.mark.skipif(not NEWER, reason="needs torch 2.9"),
        ),
    ],
)
def test_the_precision_that_a_custom_file_sets_is_for_its_own_models(
    bench: Make, set_it: str, switch: str, ours: object, theirs: object
) -> None:
    text = FAST.replace("SET", set_it).replace("SWITCH", switch)
    with precision.restored():
        made = bench(text, ["fast", "image-stats"], ["fast"])
        stats, seen = made.graph.models["image-stats"], []

        def look(*_: object) -> None:
            seen.append(attrgetter(switch)(torch.backends.cudnn))
            torch.get_float32_matmul_precision()  # in error where torch's switches differ

        stats.register_forward_pre_hook(look)
        [pixels] = [i for i in made.toolbox.inputs if i[0] == "image"]
        made.run([1.0, 2.0], {pixels: torch.zeros(2, 64, 64, 3, dtype=torch.uint8)})
        assert (seen, made.graph.models["fast"].seen) == ([ours], [theirs])
        if NEWER:
            torch.backends.fp32_precision = "none"


class _Casts(TorchDispatchMode):
    """Counts casts of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        cast = function is torch.ops.aten._to_copy.default
        self.count += cast and isinstance(arguments[0], nn.Parameter)
        return function(*arguments, **(options or {}))


def test_frozen_weights_of_custom_models_are_cast_once(bench: Make) -> None:
    made = bench(
        FAST.replace("SET", "").replace("SWITCH", "benchmark"), ["fast"], ["fast"], amp="bfloat16"
    )
    counts = []
    with made.graph:
        for _ in range(3):
            with _Casts() as casts:
                made.run([1.0, 2.0])
            counts.append(casts.count)
    assert counts == [2, 0, 0]


OWN_POST = """
class Reader(Model):
    raw_inputs = []
    preprocessors = []
    dependencies = ['oai-clip-vit-b32']
    def forward(self, clip):
        return clip[1][:, 0]
model_lookup = {'reader': Reader}
postprocess_parquet_lookup = {
    'first': lambda cache: cache['oai-clip-vit-b32'][1][:, 0],
    'read': partial(identity, model='reader'),
}
"""


@pytest.mark.parametrize(
    ("columns", "models", "runs"),
    [
        ([], [], 0),
        (["first"], [], 1),
        (["read"], ["reader"], 1),
        (["oai-clip-vit-b32-score"], [], 1),
    ],
)
def test_texts_are_encoded_where_somebody_reads_them(
    bench: Make, checkpoints: Path, columns: list[str], models: list[str], runs: int
) -> None:
    name, weights = "oai-clip-vit-b32", {"weights_dir": str(checkpoints)}
    features = {"postprocess_features": [f"{name}-image"]}
    made = bench(OWN_POST, [name, *models], columns, **weights, **features)
    net, seen = made.graph.models[name].clip, list[int]()
    net.transformer.register_forward_hook(lambda *_: seen.append(1))
    pixels = torch.randint(0, 255, (2, 224, 224, 3), dtype=torch.uint8)
    values = {"image": pixels, "text": collate([clip_tokens("a"), clip_tokens("b c")])}
    outputs = made.graph(Batch(["k0", "k1"], {i: values[i[0]] for i in made.toolbox.inputs}, {}))
    assert len(seen) == runs
    found = outputs.features[f"{name}-image"]
    finished = PREPROCESSORS["clip-aug"].finish(pixels)
    with torch.no_grad():
        assert np.array_equal(found, made.graph.models[name].encode_image(finished).numpy())


@pytest.mark.parametrize(("amp", "told"), [("auto", 1), ("off", 0), ("bfloat16", 0)])
def test_a_cpu_that_computes_bfloat16_is_told_of_once(
    bench: Make, amp: str, told: int, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """Values would change, so that nothing but advice follows."""
    monkeypatch.setattr("d2m_hpc.worker.compute.graph._knows_bfloat16", lambda: True)
    with caplog.at_level("INFO"):
        made = bench(CHAIN, ["sum", "square", "double"], ["total"], amp=amp)
    assert sum("amp: bfloat16" in line for line in caplog.messages) == told
    assert made.graph.dtype == (torch.bfloat16 if amp == "bfloat16" else None)


@pytest.mark.parametrize(
    ("amp", "knows", "form"),
    [
        ("bfloat16", True, torch.channels_last),
        ("bfloat16", False, torch.contiguous_format),
        ("off", True, torch.contiguous_format),
    ],
)
def test_convolutions_in_bfloat16_have_channels_last_where_the_cpu_computes_it(
    bench: Make,
    checkpoints: Path,
    amp: str,
    knows: bool,
    form: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("d2m_hpc.worker.compute.graph._knows_bfloat16", lambda: knows)
    models = ["faces-scrfd10g", "dedup-isc-ft-v107"]
    weights = {"weights_dir": str(checkpoints)}
    features = {"postprocess_features": ["dedup-isc-ft-v107-image"]}
    made = bench(OWN_POST, models, ["face-boxes"], amp=amp, **weights, **features)
    for name, side in zip(models, (224, 512), strict=True):
        seen: list[bool] = []
        net = made.graph.models[name].image_net
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
                assert module.weight.is_contiguous(memory_format=form)
        net.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0].is_contiguous(memory_format=form))
        )
        images = torch.zeros(2, 3, side, side)
        given = (images, torch.zeros(2, 4)) if name == models[0] else images
        with torch.no_grad():
            made.graph.models[name](given)
        assert seen == [True]
