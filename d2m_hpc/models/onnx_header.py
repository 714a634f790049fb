"""The inputs, outputs and data files that an ONNX file declares, read without onnxruntime.

The file is a message of protobuf, in which each field says how long it is: weights are passed over.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TYPES = {1: "float", 2: "uint8", 10: "float16"}
"""ONNX's numbers of the types that pixels may have."""
GIVEN = {**TYPES, 3: "int8", 5: "int16", 6: "int32", 7: "int64", 11: "double"}
"""The same of what torch takes from a net."""
FLOATS = (1, 10, 11)
"""The numbers of types with fractions."""
_GRAPH, _INITIALIZER, _INPUT, _OUTPUT = 7, 5, 11, 12
_NAME_OF_INITIALIZER, _EXTERNAL = 8, 13


class Declared(NamedTuple):
    """An input or output.

    Attributes:
        type: ONNX's number of it.
        shape: None where even the number of axes is not declared; an axis of any length is None.
    """

    type: int
    shape: tuple[int | None, ...] | None


class Header(NamedTuple):
    """What an ONNX file declares.

    Attributes:
        inputs: by name, without those that have weights.
        data: names of the files beside it in which its weights lie.
    """

    inputs: dict[str, Declared]
    outputs: dict[str, Declared]
    data: tuple[str, ...]


def read(path: Path) -> Header:
    """
    Raises:
        ValueError: it is no ONNX file, or is cut.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _of(_Message(data, 0, len(data)))
        except (ValueError, IndexError, LookupError):
            raise ValueError("it is cut, or no ONNX file; copy or export it again") from None


class _Message(NamedTuple):
    """A part of the file that holds the fields of one message."""

    data: mmap.mmap
    start: int
    end: int

    def fields(self) -> Iterator[tuple[int, int | _Message]]:
        """Each field's number, and its value where that is a number or a part of the file."""
        at = self.start
        while at < self.end:
            tag, at = self._number(at)
            kind, value = tag & 7, 0
            if kind == 0:
                value, at = self._number(at)
                yield tag >> 3, value
            elif kind == 2:
                size, at = self._number(at)
                at += size
                if at <= self.end:
                    yield tag >> 3, _Message(self.data, at - size, at)
            else:
                at += {1: 8, 5: 4}[kind]
            if at > self.end:
                raise ValueError("a field ends behind its message")

    def _number(self, at: int) -> tuple[int, int]:
        """A number, of seven bits a byte, and where the next field begins."""
        value = 0
        for i in range(10):
            byte = self.data[at + i]
            value |= (byte & 127) << 7 * i
            if byte < 128:
                return value, at + i + 1
        raise ValueError("a number of too many bytes")

    def parts(self, number: int) -> Iterator[_Message]:
        for found, value in self.fields():
            if found == number and isinstance(value, _Message):
                yield value

    def text(self, number: int) -> str:
        return next((p.data[p.start : p.end].decode() for p in self.parts(number)), "")


def _of(model: _Message) -> Header:
    inputs: dict[str, Declared] = {}
    outputs: dict[str, Declared] = {}
    weights: dict[str, list[str]] = {}
    for graph in model.parts(_GRAPH):
        for number, value in graph.fields():
            if number == _INITIALIZER and isinstance(value, _Message):
                named = ((e.text(1), e.text(2)) for e in value.parts(_EXTERNAL))
                places = [place for key, place in named if key == "location"]
                weights[value.text(_NAME_OF_INITIALIZER)] = places
            elif number in (_INPUT, _OUTPUT) and isinstance(value, _Message):
                found = inputs if number == _INPUT else outputs
                found[value.text(1)] = _declared(value)
    if not inputs or not outputs:
        raise ValueError("it has no graph")
    data = dict.fromkeys(place for places in weights.values() for place in places)
    return Header({n: d for n, d in inputs.items() if n not in weights}, outputs, tuple(data))


def _declared(value: _Message) -> Declared:
    kind, shape = 0, None
    for tensor in (t for whole in value.parts(2) for t in whole.parts(1)):
        kind = next((v for n, v in tensor.fields() if n == 1 and isinstance(v, int)), 0)
        for axes in tensor.parts(2):
            shape = tuple(_length(axis) for axis in axes.parts(1))
    return Declared(kind, shape)


def _length(axis: _Message) -> int | None:
    return next(
        (v for n, v in axis.fields() if n == 1 and isinstance(v, int) and 0 < v < 1 << 63), None
    )
