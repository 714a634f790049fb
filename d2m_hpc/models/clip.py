"""OpenAI's CLIP, by open_clip (Radford et al., 2021, arXiv:2103.00020)."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m_hpc.errors import WeightsError
from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.models.buckets import run_by_length, run_in_shapes
from d2m_hpc.models.checkpoint import Weights, fill, state_of
from d2m_hpc.models.half import in_half, is_openai
from d2m_hpc.models.headers import is_torchscript
from d2m_hpc.models.recorded import Runner, as_it_is
from d2m_hpc.models.transfer import conv_layout, to_device

log = logging.getLogger(__name__)


TOWERS = {
    "image": ("visual",),
    "text": ("text", "text_decoder", "transformer", "token_embedding"),
}
"""What of a net encodes nothing else."""


class Clip(nn.Module):
    """A net of open_clip, and how its texts are encoded.

    Attributes:
        trained_in_half: its values fit into float16 between the blocks, too.
        recorded: how its texts' tower is run.
    """

    trained_in_half = False
    recorded: Runner = staticmethod(as_it_is)

    def __init__(self, net: Any, device: torch.device) -> None:
        super().__init__()
        self.clip = net.to(device).eval()
        if hasattr(self.clip.visual, "conv1"):
            self.clip.visual.conv1.to(memory_format=conv_layout(device))
        self.device = device
        self._half: Any = None

    def to_half(self) -> None:
        """Run in float16 outright wherever autocast to float16 is on, if it was trained so."""
        if self.trained_in_half and is_openai(self.clip):
            self._half = in_half(self.clip)

    @contextmanager
    def _net(self) -> Iterator[Any]:
        """The net to run, at the precision that it is run in."""
        kind = self.device.type
        if self._half is None or not _casts_to_half(kind):
            yield self.clip
        else:
            with torch.autocast(kind, enabled=False):
                yield self._half

    @property
    def image_net(self) -> nn.Module:
        """What may be compiled: its shapes are fixed.

        Raises:
            AttributeError: images are not encoded.
        """
        net: nn.Module | None = (self._half or self.clip).visual
        if net is None:
            raise AttributeError("image_net")
        return net

    def encode_image(self, images: Tensor) -> Tensor:
        """float32 [B, D], each row of length 1."""
        with self._net() as net:
            features = net.encode_image(images if net is self.clip else images.half())
        return F.normalize(features.float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """float32 [B, D], each row of length 1.

        Args:
            tokens: int64 [B, L], on the CPU: their lengths are looked at before they are sent.
        """
        with self._net() as net:
            if getattr(net, "text_pool_type", "") == "argmax" and net.attn_mask is not None:
                features = self._encode_by_length(net, tokens)
            else:
                features = net.encode_text(to_device(tokens, self.device))
        return F.normalize(features.float(), dim=-1)

    def _encode_by_length(self, net: Any, tokens: Tensor) -> Tensor:
        """A causal tower that pools at the end token: nothing after that is computed."""
        ends = tokens.argmax(dim=1)
        if self.device.type == "cuda":
            return self._encode_in_shapes(net, tokens, ends)

        def run(rows: Tensor, length: int) -> Tensor:
            return _encode_cut(net, tokens[rows, :length], ends[rows])

        return run_by_length(ends + 1, run, self.device)

    def _encode_in_shapes(self, net: Any, tokens: Tensor, ends: Tensor) -> Tensor:
        def encode(chosen: Tensor, lengths: Tensor) -> Tensor:
            return _encode_cut(net, chosen, lengths - 1)

        run = partial(self.recorded, (id(net), "text"), encode)
        return run_in_shapes(tokens, ends + 1, tokens.shape[1], 0, run, self.device)


def _casts_to_half(kind: str) -> bool:
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.half


def _encode_cut(clip: Any, tokens: Tensor, ends: Tensor) -> Tensor:
    length = tokens.shape[1]
    x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
    pooled: Tensor = clip.ln_final(x)[torch.arange(len(x), device=x.device), ends]
    projection = clip.text_projection
    if projection is None:
        return pooled
    features: Tensor = (
        projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
    )
    return features


class OpenAIClip(Clip):
    """Image and text features of one batch, L2-normalised.

    Attributes:
        encodes_text: somebody reads the texts' features; without them, images alone are encoded.
    """

    checkpoint: str
    trained_in_half = True
    encodes_text = True

    def __init__(self, device: torch.device, weights: Weights) -> None:
        super().__init__(load(weights, self.checkpoint), device)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            images: float32 [B, 3, 224, 224], normalised.
            tokens: int64 [B, 77], on the CPU: their lengths are looked at before they are sent.

        Returns:
            float32 [B, D] of the images and of the texts, each row of length 1.
        """
        return self.of_images(images)(tokens)

    def of_images(self, images: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
        seen = self.encode_image(images)
        return lambda tokens: (seen, self.encode_text(tokens)) if self.encodes_text else (seen,)


class ClipB32(OpenAIClip):
    checkpoint = "ViT-B-32.pt"


class ClipL14(OpenAIClip):
    checkpoint = "ViT-L-14.pt"


class OpenClipNet(Clip):
    """A model of open_clip, which computes what is wanted of it.

    Args:
        name: of the checkpoint below the weights folder, or its path.
        config: the architecture, as open_clip's JSON files have it; None for a checkpoint of
            OpenAI's, which tells its own.
        wanted: of `image`, `text` and `score`, which needs both.
    """

    def __init__(
        self,
        device: torch.device,
        weights: Weights,
        name: str,
        config: Mapping[str, Any] | None,
        wanted: Collection[str],
    ) -> None:
        self.encoders = [kind for kind in ("image", "text") if {kind, "score"} & {*wanted}]
        self.trained_in_half = config is None
        net = load(weights, name) if config is None else create(weights, name, config)
        for kind, parts in TOWERS.items():
            for part in parts if kind not in self.encoders else ():
                if hasattr(net, part):
                    setattr(net, part, None)  # a tower of billions of parameters, maybe
        super().__init__(net, device)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """
        Args:
            inputs: images float32 [B, 3, H, W], and tokens int64 [B, L] on the CPU; or what is
                wanted of them.

        Returns:
            `image` and `text`, float32 [B, D], as far as they are wanted.
        """
        encode = {"image": self.encode_image, "text": self.encode_text}
        return {k: encode[k](given) for k, given in zip(self.encoders, inputs, strict=True)}

    def of_images(self, *images: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
        seen = dict(zip(("image",), map(self.encode_image, images), strict=False))
        return lambda tokens: {**seen, "text": self.encode_text(tokens)}


def create(weights: Weights, name: str, config: Mapping[str, Any]) -> Any:
    """Build the net of an architecture and load a checkpoint, without asking the hub."""
    import open_clip

    with weights.used(name), tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / f"d2m-{sha256(json.dumps(config).encode()).hexdigest()[:16]}.json"
        kept.write_text(json.dumps(config))
        open_clip.add_model_config(kept)
        try:
            return open_clip.create_model(kept.stem, pretrained=str(weights.path(name)))
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            what = f"open_clip does not take the config of the net of {weights.path(name)}"
            raise WeightsError(f"{what}: {error}") from error


def load(weights: Weights, name: str) -> Any:
    """Build the net from a published TorchScript archive, a plain state dict or a training
    checkpoint, in float32."""
    with gc_paused():
        from open_clip.model import build_model_from_openai_state_dict

    with weights.used(name):
        state = _state_dict(weights, name)
        # open_clip casts a net to float16 and copies the values there, which would be float32 again
        # then. On the meta device that costs nothing, and fails as ever where tensors are wrong.
        bare = {key: tensor.to("meta") for key, tensor in state.items()}
        with torch.device("meta"):
            net = build_model_from_openai_state_dict(bare, cast_dtype=torch.float32).float()
        fill(net, {key: state[key] for key in bare})
        net.attn_mask = torch.full(net.attn_mask.shape, -torch.inf).triu_(1)
        return net


def _state_dict(weights: Weights, name: str) -> dict[str, Tensor]:
    # The published files are TorchScript archives, which only torch.jit reads.
    if is_torchscript(weights.path(name)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            archive = torch.jit.load(str(weights.path(name)), map_location="cpu")  # type: ignore[no-untyped-call]
        return dict(archive.state_dict())
    content = weights.load(name)
    if isinstance(content, dict) and "state_dict" in content:
        log.warning(
            "%s is a training checkpoint: its state_dict is taken for a net like OpenAI's, "
            "which has QuickGELU",
            weights.path(name),
        )
    return state_of(content)
