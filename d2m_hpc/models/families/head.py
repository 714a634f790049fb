"""Small nets on the features of other models: aesthetic scores, probes of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from d2m_hpc.models.family import Family, Output, Use, located, published
from d2m_hpc.models.published import Checkpoint

if TYPE_CHECKING:
    import torch

_GITHUB = "https://github.com"
_V1 = f"{_GITHUB}/LAION-AI/aesthetic-predictor/raw/6d122adad522ab246644d9dc1c6d7a3810ee255f"
_V2 = (
    f"{_GITHUB}/christophschuhmann/improved-aesthetic-predictor/raw/"
    "6934dd81792f086e613a121dbce43082cb8be85e"
)


class LinearHead(Family):
    """Scores by a linear layer, or by several, on another model's feature."""

    kind: ClassVar = "head"
    presets: ClassVar = {
        "aesthetic-laion-v1": {
            "on": "oai-clip-vit-l14-image",
            "checkpoint": f"{_V1}/sa_0_4_vit_l_14_linear.pth",
            "sha256": "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
        },
        "aesthetic-laion-v2": {
            "on": "oai-clip-vit-l14-image",
            "checkpoint": f"{_V2}/sac+logos+ava1-l14-linearMSE.pth",
            "sha256": "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        },
    }
    paths: ClassVar = ("checkpoint",)

    on: str
    """a feature of a model of the config, by its full name: `siglip-image`"""
    checkpoint: str
    """path or URL of a state dict of linear and batch norm layers, in their order (`.pth`, `.pt`,
    `.safetensors`), or of an `.npz` with sklearn's `coef_` and `intercept_`, or with `coefs_0`,
    `intercepts_0`, `coefs_1` and so on; and with a StandardScaler's `mean_` and `scale_`, if any"""
    sha256: str = ""
    """of the file that a URL gives"""
    normalize: bool = False
    """divide a feature by its length first, which those of CLIP-like models have done"""
    activation: Literal["none", "relu", "gelu", "tanh"] = "none"
    """between the linear layers"""
    final: Literal["none", "sigmoid", "softmax"] = "none"
    """of the last layer's values"""
    epsilon: Annotated[float, Field(ge=0)] = 1e-5
    """of batch norm layers"""
    classes: tuple[str, ...] = ()
    """names of the columns, one a value of the last layer; without, the only one is `score`"""
    width: Annotated[int, Field(ge=0)] = 0
    """values of the last layer, where they are to be one feature, `vector`, and no columns"""

    def reads(self) -> list[str]:
        return [self.on]

    def outputs(self, use: Use) -> list[Output]:
        self._file()
        if self.width:
            return [Output("vector", shape=(self.width,))]
        return [Output(name, "float32") for name in self.classes or ("score",)]

    def checkpoints(self, use: Use) -> list[Checkpoint | Path]:
        return [self._file()]

    def licence(self) -> str:
        return {_V1: "MIT", _V2: "Apache-2.0"}.get(self.checkpoint.rpartition("/")[0], "")

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.layers import Layers

        path = located(self._file(), use.folder)
        net = Layers(path, self.activation, self.final, self.normalize, self.epsilon).to(device)
        names = () if self.width else self.classes or ("score",)

        def model(feature: torch.Tensor) -> dict[str, torch.Tensor]:
            values = net(feature)
            if not names:
                return {"vector": values}
            if values.shape[1] != len(names):
                raise ValueError(f"{path} gives {values.shape[1]} values for {len(names)} classes")
            return {name: values[:, i] for i, name in enumerate(names)}

        return model

    def _file(self) -> Checkpoint | Path:
        return published("checkpoint", self.checkpoint, self.sha256)
