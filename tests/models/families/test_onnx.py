from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bench import run
from kit import photographs
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torchvision import transforms

from d2m_hpc.errors import ConfigError, D2MError, ShardError
from d2m_hpc.models.onnx_session import ROWS, OnnxNet, providers

SIDE, VALUES = 32, 6
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def export(
    path: Path, rows: int | str = "n", shape: tuple[int, ...] = (3, SIDE, SIDE), kind: str = "float"
) -> Path:
    """A net `values = flattened pixels @ w` and `total`, one value an image."""
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(int(np.prod(shape)), VALUES)).astype(np.float32) / 300
    code = {"float": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "half": TensorProto.FLOAT16}
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["values"]),
        helper.make_node("ReduceSum", ["values", "axes"], ["total"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("pixels", code[kind], [rows, *shape])],
        [
            helper.make_tensor_value_info("values", TensorProto.FLOAT, [rows, VALUES]),
            helper.make_tensor_value_info("total", TensorProto.FLOAT, [rows, 1]),
        ],
        [
            numpy_helper.from_array(weights, "w"),
            numpy_helper.from_array(np.array([1]), "axes"),
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    return path


def _theirs(path: Path, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values, total = session.run(["values", "total"], {"pixels": pixels})
    return values, total


OUTPUTS = {
    "image": {"output": "values", "shape": [VALUES]},
    "score": {"output": "values", "index": 2, "activation": "softmax"},
    "all": {"activation": "sigmoid", "type": "list<float32>"},
    "total": {"output": "total"},
}
COLUMNS = ["own-score", "own-all", "own-total"]


def _ours(path: Path, pictures: list[Image.Image], **given: Any) -> Any:
    entry = {"kind": "onnx", "checkpoint": str(path), "size": SIDE, "gives": OUTPUTS, **given}
    columns = [c for c in COLUMNS if c.removeprefix("own-") in entry["gives"]]
    features = ["own-image"] if "image" in entry["gives"] else []
    keys = {"models": [{"own": entry}], "postprocess_columns": columns}
    return run({**keys, "postprocess_features": features}, pictures)


def test_outputs_are_onnxruntimes_own(tmp_path: Path) -> None:
    path, pictures = export(tmp_path / "net.onnx"), photographs(7)
    ours = _ours(path, pictures, mean=MEAN, std=STD, interpolation="bilinear", short=40)
    prepare = transforms.Compose(
        [
            transforms.Resize(40),
            transforms.CenterCrop(SIDE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    values, total = _theirs(path, torch.stack([prepare(p) for p in pictures]).numpy())
    assert values.std(axis=0).max() > 1e-2
    np.testing.assert_allclose(ours.features["own-image"], values, atol=1e-5)
    softmax = torch.from_numpy(values).softmax(dim=1)[:, 2]
    np.testing.assert_allclose(np.asarray(ours.columns["own-score"]), softmax, atol=1e-5)
    every = torch.from_numpy(values).sigmoid()
    np.testing.assert_allclose(np.array(ours.columns["own-all"]), every, atol=1e-5)
    np.testing.assert_allclose(np.asarray(ours.columns["own-total"]), total[:, 0], atol=1e-4)


@pytest.mark.parametrize("kind", ["uint8", "float", "half"])
@pytest.mark.parametrize("rows", [1, 4, "n"])
def test_bytes_bgr_and_channels_last_in_parts_of_a_fixed_size(
    tmp_path: Path, kind: str, rows: int | str
) -> None:
    path, pictures = export(tmp_path / "net.onnx", rows, (SIDE, SIDE, 3), kind), photographs(7)
    ours = _ours(path, pictures, layout="NHWC", channels="BGR", resize="squash")
    small = [p.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for p in pictures]
    pixels = np.stack([np.asarray(p)[..., ::-1] for p in small])
    pixels = pixels.astype({"uint8": np.uint8, "float": np.float32, "half": np.float16}[kind])
    size = rows if isinstance(rows, int) else len(pixels)
    padded = np.concatenate([pixels, pixels[-1:], pixels[-1:]])[: 8 if size == 4 else 7]
    parts = [_theirs(path, padded[i : i + size])[0] for i in range(0, len(padded), size)]
    values = np.concatenate(parts)[:7]
    np.testing.assert_allclose(ours.features["own-image"], values, rtol=1e-5, atol=1e-4)


def test_threads_are_bounded_and_batches_split(tmp_path: Path) -> None:
    net = OnnxNet(export(tmp_path / "net.onnx"), torch.device("cpu"))
    threads = net.session.get_session_options().intra_op_num_threads
    assert threads == torch.get_num_threads()
    pixels = torch.rand(ROWS + 3, 3, SIDE, SIDE)
    assert net(pixels, ["total"])["total"].shape == (ROWS + 3, 1)
    cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    assert (len(providers(torch.device("cuda:1"))) == 2) == cuda


def test_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    path, pictures = export(tmp_path / "net.onnx"), photographs(1)
    (broken := tmp_path / "broken.onnx").write_bytes(b"no net")
    one = {"output": "values", "index": 0}
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, r"found 'net.onx', which is not there", {"checkpoint": "net.onx"}),
        (ConfigError, r"score: unknown type 'real'", {"gives": {"score": {"type": "real"}}}),
        (ConfigError, r"`size`, which is required", {"size": ...}),
        (D2MError, r"broken\.onnx cannot be used", {"checkpoint": str(broken)}),
        (D2MError, r"it has no input 'image', but pixels", {"input": "image"}),
        (
            D2MError,
            r"it has no output 'logits', but values, total",
            {"gives": {"score": {"output": "logits"}}},
        ),
        (ShardError, r"score: the net gives 6 values an image", {"gives": {"score": {}}}),
        (
            ShardError,
            r"score: `index` is 6, of 6 values",
            {"gives": {"score": {**one, "index": 6}}},
        ),
    ]
    for kind, told, given in wrong:
        entry = {"kind": "onnx", "checkpoint": str(path), "size": SIDE, **given}
        entry = {"gives": {"score": one}} | {k: v for k, v in entry.items() if v is not ...}
        keys = {"models": [{"own": entry}], "postprocess_columns": ["own-score"]}
        with pytest.raises(kind, match=told):
            run(keys, pictures)
