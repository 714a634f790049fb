"""Descriptors for copies of images, by SSCD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from d2m_hpc.models.family import (
    Between,
    Family,
    Output,
    ParameterError,
    Use,
    file_at_hand,
    located,
)
from d2m_hpc.models.headers import fault, is_torchscript
from d2m_hpc.models.inputs import ImageInput
from d2m_hpc.models.published import Checkpoint
from d2m_hpc.storage.texts import nearest

if TYPE_CHECKING:
    import torch

_URL = "https://dl.fbaipublicfiles.com/sscd-copy-detection"
_TRAINED = {
    **{f"disc_{how}": 512 for how in ("blur", "advanced", "mixup")},
    **{f"imagenet_{how}": 512 for how in ("blur", "advanced", "mixup")},
    "disc_large": 1024,
}
"""Length of the descriptors of each published net."""
_NOTED = {"disc_mixup": "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"}
"""sha256 of files whose authors publish none, as many who fetched them have noted."""


class Sscd(Family):
    """SSCD's descriptor of the image, of length 1; the cosine of copies is above 0.75."""

    kind: ClassVar = "sscd"
    presets: ClassVar = {"sscd-disc-mixup": {}}
    paths: ClassVar = ("checkpoint",)

    checkpoint: str = "disc_mixup"
    """a published net (`disc_mixup`, `disc_large`, `disc_advanced`, `disc_blur`, `imagenet_mixup`,
    `imagenet_advanced`, `imagenet_blur`), or the path of a TorchScript file"""
    size: Annotated[int, Between(32, 4096)] = 320
    """side of the square that the net is given"""
    resize: Literal["squash", "shortest"] = "squash"
    """`squash` to the square, as SSCD's authors advise for batches; or bring the short side to
    `size` and cut the middle out"""

    def inputs(self, use: Use) -> list[Any]:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        return [ImageInput(self.size, self.resize, "bilinear", mean=mean, std=std)]

    def outputs(self, use: Use) -> list[Output]:
        self._file()
        width = _TRAINED.get(self.checkpoint)
        return [Output("image", shape=(width,) if width else ())]

    def checkpoints(self, use: Use) -> list[Checkpoint | Path]:
        return [self._file()]

    def check(self, use: Use, reads: Sequence[tuple[int, ...]]) -> None:
        path = located(self._file(), use.folder)
        if path.is_file() and not is_torchscript(path):
            what = f"{path} is no TorchScript archive, as `torch.jit.save` writes it"
            raise ParameterError("checkpoint", fault(path) or what)

    def licence(self) -> str:
        return "CC-BY-NC-4.0" if self.checkpoint in _TRAINED else ""

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        import warnings

        import torch

        from d2m_hpc.models.checkpoint import Weights

        path = located(self._file(), use.folder)
        # torch calls all of TorchScript deprecated.
        with Weights(use.folder).used(str(path)), warnings.catch_warnings(action="ignore"):
            net = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]

        def model(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            # The optimiser would compute the first batches in another way than those that follow.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                return {"image": net(pixels).float()}

        return model

    def _file(self) -> Checkpoint | Path:
        """
        Raises:
            ParameterError: there is no such net.
        """
        if self.checkpoint in _TRAINED:
            name = f"sscd_{self.checkpoint}.torchscript.pt"
            return Checkpoint(name, f"{_URL}/{name}", _NOTED.get(self.checkpoint, ""))
        if path := file_at_hand("checkpoint", self.checkpoint):
            return path
        what = f"unknown net {self.checkpoint!r}{nearest(self.checkpoint, _TRAINED)}"
        raise ParameterError("checkpoint", f"{what}, or the path of a TorchScript file")
