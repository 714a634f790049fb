"""Any ONNX net that takes images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from d2m_hpc.models.family import (
    Between,
    Colour,
    Family,
    Output,
    ParameterError,
    Sha256,
    Side,
    Use,
    located,
    published,
)
from d2m_hpc.models.headers import fault
from d2m_hpc.models.inputs import LARGEST_SIDE, ImageInput, Interpolation
from d2m_hpc.models.onnx_header import FLOATS, GIVEN, TYPES, Header, read
from d2m_hpc.models.published import Checkpoint
from d2m_hpc.models.types import COLUMN_TYPES, parts

if TYPE_CHECKING:
    import torch

NUMBERS = tuple(kind for kind in COLUMN_TYPES if kind not in ("bool", "string"))
"""Types of what a net gives."""
LARGEST_ROW = 1 << 24
"""Values of a feature's row."""
Length = Annotated[int, Between(1, LARGEST_ROW)]


class OnnxOutput(BaseModel):
    """How a column or feature is read from an ONNX net."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    output: str = ""
    """of the net; without, its first"""
    activation: Literal["none", "sigmoid", "softmax"] = "none"
    """of the values of an image, before `index` is taken"""
    index: Annotated[int, Between(0, LARGEST_ROW)] | None = None
    """which of the values of an image"""
    type: str = "float32"
    """of a column"""
    shape: Annotated[tuple[Length, ...], Field(max_length=8)] = ()
    """of a feature's row; without, it is a column"""

    def misfit(self, values: int) -> str:
        """What is wrong where the net gives so many values an image; nothing where that fits."""
        if self.index is not None:
            return f"`index` is {self.index}, of {values} values" if self.index >= values else ""
        if self.shape:
            told = f"`shape` is {[*self.shape]}, and the net gives {values} values an image"
            return told if prod(self.shape) != values else ""
        if values != 1 and not self.type.startswith("list<"):
            return f"the net gives {values} values an image; choose one by `index`"
        return ""


class OnnxImages(Family):
    """Columns and features of an ONNX net that takes images, run by onnxruntime."""

    kind: ClassVar = "onnx"
    paths: ClassVar = ("checkpoint",)
    packages: ClassVar = {"onnxruntime": "d2m_hpc[onnx]"}

    checkpoint: str
    """path or URL of an `.onnx` file"""
    gives: Annotated[dict[str, OnnxOutput], Field(min_length=1)]
    """columns and features by name, as `score: {output: logits, index: 1, activation: softmax}` or
    `image: {output: embedding, shape: [512]}`"""
    size: Side | tuple[Side, Side]
    """side of the square that the net is given, or height and width"""
    sha256: Sha256 = ""
    """of the file"""
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    """bring the short side to the size and cut the middle out; bring the long side to the size and
    put `fill` around; or ignore the aspect"""
    short: Annotated[int, Between(0, LARGEST_SIDE)] = 0
    """pixels of the short side before the middle is cut out; `size` where it is not given"""
    interpolation: Interpolation = "bicubic"
    """how images are resized"""
    fill: Annotated[int, Between(0, 255)] = 0
    """grey value around an image"""
    mean: Colour | None = None
    """of pixels in [0, 1]; without `mean` and `std` the net is given the values 0 to 255"""
    std: Colour | None = None
    """of pixels in [0, 1]"""
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    """order of the axes"""
    channels: Literal["RGB", "BGR"] = "RGB"
    """their order; `mean` and `std` are in the order of RGB"""
    input: str = ""
    """name of the net's input, which need not be given"""

    def inputs(self, use: Use) -> list[Any]:
        given = (self.size, self.resize, self.interpolation, self.short, self.fill)
        try:
            return [ImageInput(*given, mean=self.mean, std=self.std)]
        except ValueError as error:
            raise ParameterError("", str(error)) from None

    def outputs(self, use: Use) -> list[Output]:
        self._file()
        for name, given in self.gives.items():
            _, each = parts(given.type)
            if (each or given.type) not in NUMBERS:
                what = f"{name}: unknown type {given.type!r}; valid: {', '.join(NUMBERS)}"
                raise ParameterError("gives", f"{what}, and list<...> of these")
            if given.shape and given.index is not None:
                what = f"{name}: found `index` and `shape`"
                raise ParameterError("gives", f"{what}; give `index` for a column alone")
            if prod(given.shape) > LARGEST_ROW:
                what = f"{name}: found a `shape` of {prod(given.shape):,} values"
                raise ParameterError("gives", f"{what}; valid is {LARGEST_ROW:,} in all")
        return [
            Output(name, "" if given.shape else given.type, shape=given.shape)
            for name, given in self.gives.items()
        ]

    def checkpoints(self, use: Use) -> list[Checkpoint | Path]:
        file = self._file()
        if isinstance(file, Checkpoint):
            return [file]
        with suppress(OSError, ValueError):  # `check` tells what is wrong with it
            return [file, *(file.parent / name for name in read(file).data)]
        return [file]

    def check(self, use: Use, reads: Sequence[tuple[int, ...]]) -> None:
        path = located(self._file(), use.folder)
        if not path.is_file():
            return
        try:
            if why := fault(path):
                raise ValueError(why)
            net = read(path)
        except (OSError, ValueError) as error:
            raise ParameterError("checkpoint", f"{path}: {error}") from None
        wrong = [*self._wrong_input(net), *self._wrong_outputs(net)]
        if net.data and isinstance(self._file(), Checkpoint):
            wrong.append(("checkpoint", f"its weights lie in {net.data[0]}; give the path of both"))
        if wrong:
            raise ParameterError(*((p, f"{path.name}: {what}") for p, what in wrong))

    def _wrong_input(self, net: Header) -> Iterator[tuple[str, str]]:
        names = ", ".join(net.inputs)
        if len(net.inputs) != 1:
            yield "", f"it takes {names}; valid is a net that takes images alone"
            return
        if self.input and self.input not in net.inputs:
            yield "input", f"it has no input {self.input!r}; valid: {names}"
        [found] = net.inputs.values()
        if found.type not in TYPES:
            yield "input", f"its input is of none of the types {', '.join(TYPES.values())}"
        height, width = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        layouts = {"NCHW": (None, 3, height, width), "NHWC": (None, height, width, 3)}
        if found.shape is None or _fits(found.shape, layouts[self.layout]):
            return
        other = next((n for n, shape in layouts.items() if _fits(found.shape, shape)), "")
        told = f"its input is {shown(found.shape)}, and images are {shown(layouts[self.layout])}"
        if other:
            yield "layout", f"{told}; valid is {other}"
        else:
            yield "size", f"{told}, by `size` and `layout`"

    def _wrong_outputs(self, net: Header) -> Iterator[tuple[str, str]]:
        for name, given in self.gives.items():
            found = (
                net.outputs.get(given.output) if given.output else next(iter(net.outputs.values()))
            )
            if found is None:
                names = ", ".join(net.outputs)
                yield "gives", f"{name}: it has no output {given.output!r}; valid: {names}"
            elif found.type not in (0, *GIVEN):
                yield "gives", f"{name}: the output holds no numbers of {', '.join(GIVEN.values())}"
            elif "int" in given.type and (found.type in FLOATS or given.activation != "none"):
                what = f"{name}: found the type {given.type!r}, and the net gives fractions"
                yield "gives", f"{what}; valid is float32"
            elif found.shape == ():
                yield "gives", f"{name}: the output is one number, and not one a picture"
            elif found.shape and all(found.shape[1:]):
                values = prod(side or 0 for side in found.shape[1:])
                if what := given.misfit(values):
                    yield "gives", f"{name}: {what}"

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.checkpoint import Weights
        from d2m_hpc.models.onnx_session import OnnxNet

        path = located(self._file(), use.folder)
        with Weights(use.folder).used(str(path)):
            net = OnnxNet(path, device, self.input)
            wanted = {n: given for n, given in self.gives.items() if n in use.wanted}
            read = {n: given.output or net.outputs[0] for n, given in wanted.items()}
            if missing := sorted(set(read.values()) - set(net.outputs)):
                raise ValueError(f"it has no output {missing[0]!r}, but {', '.join(net.outputs)}")

        def model(pixels: torch.Tensor) -> dict[str, Any]:
            pixels = pixels.flip(1) if self.channels == "BGR" else pixels
            pixels = pixels.permute(0, 2, 3, 1) if self.layout == "NHWC" else pixels
            # In the model's step, whole batches at a time: on the device, or on all cores.
            found = net(pixels, [*dict.fromkeys(read.values())])
            return {n: _read(found[read[n]], n, given) for n, given in wanted.items()}

        return model

    def _file(self) -> Checkpoint | Path:
        return published("checkpoint", self.checkpoint, self.sha256)


def _read(value: torch.Tensor, name: str, given: OnnxOutput) -> Any:
    """
    Raises:
        ValueError: the net gives something else than what the config says.
    """
    rows = value.reshape(len(value), -1)
    if what := given.misfit(rows.shape[1]):
        raise ValueError(f"{name}: {what}")
    if given.activation == "sigmoid":
        rows = rows.sigmoid()
    elif given.activation == "softmax":
        rows = rows.softmax(dim=1)
    if given.index is not None:
        return rows[:, given.index]
    if given.shape:
        return rows.reshape(len(rows), *given.shape)
    return rows.tolist() if given.type.startswith("list<") else rows[:, 0]


def _fits(found: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    """Whether each side that both know is the same."""
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(a == b or a is None or b is None for a, b in pairs)


def shown(shape: tuple[int | None, ...]) -> str:
    """
    Example:
        >>> shown((None, 3, 224, 224))
        '[n, 3, 224, 224]'
    """
    return f"[{', '.join('n' if side is None else str(side) for side in shape)}]"
