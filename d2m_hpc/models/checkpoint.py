"""Read checkpoint files without running what is in them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.published import HubRepo
from d2m_hpc.storage.texts import safe

LONGEST = 600
"""Characters of an error that are told: a net may lack thousands of tensors."""
WRAPPERS = ("_orig_mod.", "module.")
"""What torch.compile and DistributedDataParallel put before the names of a net's tensors."""


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
            raise WeightsError(f"{path} cannot be read as a checkpoint: {error}") from error

    @contextmanager
    def used(self, name: str) -> Iterator[None]:
        """Build a net of a checkpoint's content.

        Raises:
            WeightsError: the content is not what the net needs.
        """
        try:
            yield
        except (WeightsError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a net trips over in a file of another kind
            what = safe(" ".join(f"{type(error).__name__}: {error}".split()), LONGEST)
            raise WeightsError(f"{self.path(name)} cannot be used: {what}") from error


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
