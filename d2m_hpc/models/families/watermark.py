"""LAION's watermark detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

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
from d2m_hpc.models.headers import shapes
from d2m_hpc.models.inputs import ImageInput
from d2m_hpc.models.published import Checkpoint

if TYPE_CHECKING:
    import torch

_FILE = (
    "https://github.com/LAION-AI/LAION-5B-WatermarkDetection/raw/"
    "d8786e32b8a46bd1c254826dae51f54ab5b1e9e4/models/watermark_model_v1.pt"
)
_WIDTHS = (1536, 625, 256, 2)
"""Values between the layers of the classifier; the last two are of watermark and clear."""
_LAST = "classifier.5.weight"


class Watermark(Family):
    """Probability that the image bears a watermark, by LAION's EfficientNet-B3."""

    kind: ClassVar = "watermark"
    presets: ClassVar = {"watermark-laion": {}}
    paths: ClassVar = ("checkpoint",)

    checkpoint: str = _FILE
    """path or URL of a state dict, LAION's own or one of the same net"""
    sha256: Sha256 = ""
    """of the file"""
    size: Annotated[int, Between(32, 4096)] = 256
    """side of the square to which images are resized"""

    def inputs(self, use: Use) -> list[Any]:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        return [ImageInput(self.size, "squash", "bilinear", mean=mean, std=std)]

    def outputs(self, use: Use) -> list[Output]:
        self._file()
        return [Output("score", "float32")]

    def checkpoints(self, use: Use) -> list[Checkpoint | Path]:
        return [self._file()]

    def check(self, use: Use, reads: Sequence[tuple[int, ...]]) -> None:
        path = located(self._file(), use.folder)
        try:
            found = shapes(path) if path.is_file() else {}
        except ValueError as error:
            raise ParameterError("checkpoint", f"{path}: {error}") from None
        if found and found.get(_LAST) != (shape := (_WIDTHS[3], _WIDTHS[2])):
            what = f"{path} is of another net: it has no {_LAST} of the shape {[*shape]}"
            raise ParameterError("checkpoint", what)

    def licence(self) -> str:
        return "MIT" if self.checkpoint == _FILE else ""

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        import timm
        from torch import nn

        from d2m_hpc.models.checkpoint import Weights, state_of
        from d2m_hpc.models.transfer import conv_layout

        weights, path = Weights(use.folder), located(self._file(), use.folder)
        net: Any = timm.create_model("efficientnet_b3", num_classes=0)
        first, second, third, last = _WIDTHS
        net.classifier = nn.Sequential(
            *(nn.Linear(first, second), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(second, third), nn.ReLU(), nn.Linear(third, last)),
        )
        with weights.used(str(path)):
            net.load_state_dict(state_of(weights.load(str(path))))
        net = net.to(device, memory_format=conv_layout(device)).eval()
        return lambda pixels: {"score": net(pixels).float().softmax(dim=1)[:, 0]}

    def _file(self) -> Checkpoint | Path:
        return published("checkpoint", self.checkpoint, self.sha256)
