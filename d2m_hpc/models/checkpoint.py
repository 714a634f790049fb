"""Read checkpoint files without running what is in them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.headers import fault
from d2m_hpc.models.published import HubRepo
from d2m_hpc.storage.texts import safe

LONGEST = 600
"""Characters of an error that are told: a net may lack thousands of tensors."""
WRAPPERS = ("_orig_mod.", "module.")
"""What torch.compile and DistributedDataParallel put before the names of a net's tensors."""

_DAMAGED = re.compile("weights_only|EOF|PytorchStreamReader|UnpicklingError|unpack requires")
"""What torch's errors have in them where a file is none of its own."""


@dataclass(frozen=True)
class Weights:
    """The weights folder of a task; its files were checked against their hashes at submit.

    Example:
        >>> Weights(Path("/w")).path("ViT-B-32.pt")
        PosixPath('/w/ViT-B-32.pt')
    """

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name

    def repo(self, repo: HubRepo) -> Path:
        """The folder of a hub repository, for the loaders of transformers, timm and others.

        Raises:
            WeightsError: the folder is missing.
        """
        folder = self.path(repo.name)
        if not folder.is_dir():
            raise WeightsError(f"{folder} is missing; run `d2m weights check`")
        return folder

    def load(self, name: str) -> Any:
        """A checkpoint's content on the CPU, by the restricted unpickler.

        Raises:
            WeightsError: it is not readable so.
        """
        path = self.path(name)
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            # isc_ft_v107 stores its training arguments as a Namespace, which holds plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise WeightsError(f"{path} is missing; run `d2m weights check`") from None
        except Exception as error:
            raise WeightsError(
                f"{path} cannot be read as a checkpoint: {told(error, path)}"
            ) from error

    @contextmanager
    def used(self, name: str) -> Iterator[None]:
        """Build a net of a checkpoint's content, which has all of the net's values.

        Raises:
            WeightsError: the content is not what the net needs.
        """
        try:
            with _Unset():
                yield
        except (WeightsError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a net trips over in a file of another kind
            path = self.path(name)
            raise WeightsError(f"{path} cannot be used: {told(error, path)}") from error


def fill(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a net a checkpoint's tensors as its own, in the net's types.

    They are not copied into memory that the net has already, which takes as long as reading them.

    Raises:
        RuntimeError: the net has other tensors.
    """
    types = {name: own.dtype for name, own in net.state_dict().items()}
    given = {n: t.to(types.get(n, t.dtype)).contiguous() for n, t in state.items()}
    net.load_state_dict(given, assign=True)


class _Unset(TorchFunctionMode):
    """Leave out the random values that nets begin with: they take longer than loading."""

    _SETS = frozenset(
        getattr(owner, f"{name}_")
        for owner, names in (
            (Tensor, "normal uniform"),
            (nn.init, "normal uniform trunc_normal kaiming_uniform kaiming_normal xavier_uniform"),
        )
        for name in names.split()
    )

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in self._SETS:
            return args[0] if args else kwargs["tensor"]
        if function is torch.randn and "generator" not in kwargs:
            function = torch.empty
        return function(*args, **kwargs)


def told(error: BaseException, path: Path) -> str:
    """What is wrong with a checkpoint's file or folder, by what a library raised.

    What the library advises is left out where that is for people who program with it.
    """
    if path.is_file() and (why := fault(path)):
        return why
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it holds a {found[1]}, and only tensors are loaded; save the net's `state_dict()`"
    if "weights_only" in text and "TorchScript" in text:
        return "it is a TorchScript archive; save the net's `state_dict()`"
    if "constants.pkl" in text:  # which torch.jit alone looks for
        return "it is no TorchScript archive, as `torch.jit.save` writes it"
    is_code = isinstance(error, KeyError) and isinstance(error.args[0], int)  # of a pickle
    if is_code or _DAMAGED.search(text):
        return "it is damaged, or no file of torch's"
    return safe(text, LONGEST)


def state_of(content: Any) -> dict[str, Tensor]:
    """A net's tensors by name, out of a training checkpoint too, which has them in `state_dict`.

    Raises:
        ValueError: there are none.
    """
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError("it holds no state dict")
    if others := [str(n) for n, v in content.items() if not isinstance(v, Tensor)]:
        raise ValueError(f"it holds no state dict, but {', '.join(others[:4])}")
    state = dict(content)
    while wrapper := next((w for w in WRAPPERS if all(n.startswith(w) for n in state)), None):
        state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state
