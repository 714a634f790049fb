"""Small nets on the features of other models: aesthetic scores, probes of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from zipfile import is_zipfile

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.chain import activated, layers_of, require_scale
from d2m_hpc.models.family import (
    Between,
    Family,
    Output,
    ParameterError,
    Sha256,
    Use,
    located,
    published,
)
from d2m_hpc.models.headers import Axes, shapes
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
    sha256: Sha256 = ""
    """of the file"""
    normalize: bool = False
    """divide a feature by its length first, which those of CLIP-like models have done"""
    activation: Literal["none", "relu", "gelu", "tanh"] = "none"
    """between two linear layers; where a batch norm is there too, in the place that the numbers of
    an `nn.Sequential` leave out"""
    final: Literal["none", "sigmoid", "softmax"] = "none"
    """of the last layer's values"""
    epsilon: Annotated[float, Between(0, 1)] = 1e-5
    """of batch norm layers"""
    classes: tuple[str, ...] = ()
    """names of the columns, one a value of the last layer; without, the only one is `score`"""
    width: Annotated[int, Between(0, 1 << 24)] = 0
    """values of the last layer, where they are to be one feature, `vector`, and no columns"""

    def reads(self) -> list[str]:
        return [self.on]

    def outputs(self, use: Use) -> list[Output]:
        self._file()
        if self.width and self.classes:
            what = "is for one feature, and `classes` for columns; give one of them"
            raise ParameterError("width", what)
        if self.final == "softmax" and (self.width or len(self._names)) == 1:
            raise ParameterError("final", "softmax of one value is 1 for every sample; use sigmoid")
        if self.width:
            return [Output("vector", shape=(self.width,))]
        return [Output(name, "float32") for name in self._names]

    def checkpoints(self, use: Use) -> list[Checkpoint | Path]:
        return [self._file()]

    def check(self, use: Use, reads: Sequence[tuple[int, ...]]) -> None:
        path = located(self._file(), use.folder)
        if not path.is_file():
            return
        try:
            found = shapes(path)
            if not found and path.suffix != ".safetensors" and not is_zipfile(path):
                return  # of torch, from before it saved zips: the task tells what is in the file
            takes, gives = self._sizes(path, found)
        except ValueError as error:
            raise ParameterError("checkpoint", f"{path}: {error}") from None
        wrong = []
        if reads[0] and reads[0][-1] != takes:
            what = f"{self.on} has {reads[0][-1]} values, and the head in {path} takes {takes}"
            wrong.append(("on", f"{what}; give the feature that it was trained on"))
        if self.width and gives != self.width:
            wrong.append(("width", f"found {self.width}; valid is {gives}, as {path} gives"))
        elif not self.width and gives != len(self._names):
            what = f"{path} gives {gives} values for {len(self._names)} classes"
            wrong.append(("classes", f"{what}; name each in `classes`, or give `width: {gives}`"))
        if wrong:
            raise ParameterError(*wrong)

    def _sizes(self, path: Path, found: Mapping[str, Axes]) -> tuple[int, int]:
        """How many values the head takes and gives.

        Raises:
            ValueError: the file holds no head, or one whose values cannot be told.
        """
        if not found and path.suffix not in (".npz", ".safetensors"):
            raise ValueError("it holds no tensors by name; save the net's `state_dict()`")
        layers = layers_of(found, path.suffix)
        if self.activation != "none":
            activated(layers)
        if path.suffix == ".npz" and "scale_" in found:
            from numpy import load

            with load(path) as arrays:
                require_scale(arrays["scale_"])
        return layers[0].takes, layers[-1].gives

    def licence(self) -> str:
        return {_V1: "MIT", _V2: "Apache-2.0"}.get(self.checkpoint.rpartition("/")[0], "")

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.layers import Layers

        path = located(self._file(), use.folder)
        net = Layers(path, self.activation, self.final, self.normalize, self.epsilon).to(device)
        names = () if self.width else self._names
        if net.values != (self.width or len(names)):
            asked = f"a width of {self.width}" if self.width else f"{len(names)} classes"
            raise WeightsError(f"{path} gives {net.values} values for {asked}")

        def model(feature: torch.Tensor) -> dict[str, torch.Tensor]:
            values = net(feature)
            if not names:
                return {"vector": values}
            return dict(zip(names, values.unbind(1), strict=True))

        return model

    @property
    def _names(self) -> tuple[str, ...]:
        """The columns."""
        return self.classes or ("score",)

    def _file(self) -> Checkpoint | Path:
        return published("checkpoint", self.checkpoint, self.sha256)
