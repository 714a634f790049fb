"""What a checkpoint's file tells without torch: whether it is whole, and its tensors' shapes."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

Axes = tuple[int, ...]
WEIGHTS = frozenset(
    (".bin", ".ckpt", ".ftz", ".npz", ".onnx", ".pt", ".pth", ".safetensors", ".tar", ".zip")
)
"""How files end that are never empty."""
PICKLE = b"\x80"
"""The first byte of what torch saved before it saved zips."""
LARGEST = 64 << 20
"""Bytes of a pickle that is read; it names the tensors, which lie beside it."""
_OTHERS: Mapping[bytes, str] = {
    b"version https://git-lfs": "it is a pointer of Git LFS; `git lfs pull` gets the file",
    b"<!DOCTYPE html": "it is a web page; download the file itself",
    b"<html": "it is a web page; download the file itself",
}
"""How files begin that came in place of a checkpoint."""


def fault(path: Path) -> str:
    """Why a file can be no checkpoint; nothing where that cannot be told without torch.

    Example:
        >>> fault(Path("/dev/null").with_name("none.pt"))
        ''
    """
    try:
        with path.open("rb") as file:
            start = file.read(32)
        if not start:
            return "it is empty; copy or fetch it again" if path.suffix in WEIGHTS else ""
        for begins, what in _OTHERS.items():
            if start.lower().startswith(begins.lower()) and path.suffix in WEIGHTS:
                return what
        if path.suffix == ".safetensors":
            _of_safetensors(path)
        elif start.startswith(b"PK\3\4"):
            zipfile.ZipFile(path).close()
    except OSError:
        return ""  # whoever reads the file tells that
    except ValueError as error:
        return str(error)
    except zipfile.BadZipFile:
        return "it is cut: a zip's directory is at its end, and is missing; copy or fetch it again"
    return ""


def shapes(path: Path) -> dict[str, Axes]:
    """The shapes of a checkpoint's tensors by name; none where only torch can read the file.

    They are in the order in which they were saved, or of their names where the format keeps none.

    Raises:
        ValueError: the file is damaged; says what it is.
        OSError: it cannot be read.
    """
    if why := fault(path):
        raise ValueError(why)
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    if path.suffix == ".npz":
        return dict(sorted(_of_arrays(path), key=lambda found: natural(found[0])))
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(1) != PICKLE:
                raise ValueError("it is damaged, or no file of torch's")
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            return dict(_of_torch(archive))
    except Exception:  # whatever a pickle of another kind trips over: torch will tell
        return {}


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive that `torch.jit.save` wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(n.split("/")[-1] == "constants.pkl" for n in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def natural(name: str) -> list[str | int]:
    """Sorts `layers.2` before `layers.10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _of_safetensors(path: Path) -> dict[str, Axes]:
    import numpy  # noqa: F401  # safetensors wants it
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            names = sorted(file.keys(), key=natural)
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        what = "it is cut, or no file of safetensors"
        raise ValueError(f"{what} ({error}); copy or fetch it again") from None


def _of_arrays(path: Path) -> Iterator[tuple[str, Axes]]:
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name == "classes_.npy":  # sklearn's names of them; `classes` gives ours
                    continue
                with archive.open(name) as file:
                    shape, _, kind = readers[npy.read_magic(file)](file)
                if kind.kind not in "biuf":
                    raise ValueError(f"{name} in it holds no numbers, but {kind}")
                yield name.removesuffix(".npy"), shape
    except (zipfile.BadZipFile, LookupError):
        raise ValueError("it is damaged, or no file of numpy.savez") from None


def _of_torch(archive: zipfile.ZipFile) -> Iterator[tuple[str, Axes]]:
    [entry] = (i for i in archive.infolist() if i.filename.split("/")[1:] == ["data.pkl"])
    if entry.file_size > LARGEST:
        return
    with archive.open(entry) as file:
        content = _Named(file).load()
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    for name, value in content.items():
        if isinstance(value, _Tensor):
            yield str(name), value.shape


class _Tensor(NamedTuple):
    shape: Axes


class _Other:
    """Stands for an object of any class, whose code is neither run nor imported."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class _Named(pickle._Unpickler):
    """Reads a pickle of torch's: tensors by their shapes, all else by what stands for it.

    The one in C takes memory for as many objects as a pickle says that it has.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def persistent_load(self, pid: Any) -> None:
        """Leave out the tensors' values."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict  # a dict, and what torch notes beside the names is put on it
        if module == "torch._utils" and name.startswith("_rebuild_tensor"):
            return lambda storage, offset, size, *rest: _Tensor(tuple(size))
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        return _Other
