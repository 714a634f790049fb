"""Toxicity of captions: Detoxify's multilingual model (Hanu and Unitary, 2020)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.buckets import padded_to_longest, run_in_shapes, run_tokens
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.hub_nets import quiet
from d2m_hpc.models.recorded import Runner, as_it_is

CHECKPOINT = "multilingual_debiased-0b549669.ckpt"
HUB_FILES = "xlm-roberta-base"
MAX_TOKENS = 512


class Detoxify(nn.Module):
    """The largest of all class probabilities of each text.

    Detoxify's own class asks the hub while it loads, pads all texts to the longest, and waits for
    the device at every batch: its net and tokenizer are used, its `predict` is not.

    Attributes:
        recorded: how the net is run.
    """

    recorded: Runner = staticmethod(as_it_is)

    def __init__(self, device: torch.device, weights: Weights) -> None:
        super().__init__()
        net, self.tokenizer = load(weights)
        self.net: Any = net.to(device).eval()
        self.device = device

    def forward(self, texts: list[str]) -> Tensor:
        """
        Args:
            texts: B captions.

        Returns:
            float32 [B], in [0, 1].
        """
        encoded = self.tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        if self.device.type == "cuda":
            return self._in_shapes(encoded)

        def run(ids: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
            return self._scores(ids, lengths)

        return run_tokens(encoded, self.tokenizer.pad_token_id, run, self.device)

    def _in_shapes(self, encoded: list[list[int]]) -> Tensor:
        lengths, padding = torch.tensor([*map(len, encoded)]), self.tokenizer.pad_token_id
        padded = padded_to_longest(encoded, lengths, padding)
        run = partial(self.recorded, id(self), self._scores)
        return run_in_shapes(padded, lengths, MAX_TOKENS, padding, run, self.device)

    def _scores(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """float32 [b] of tokens [b, L].

        The net's own forward would look at the mask on the device, to see whether it needs it, and
        hold up the host for that; layer by layer it is given as attention takes it.
        """
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        embedded = self.net.roberta.embeddings(input_ids=ids)
        encoded = self.net.roberta.encoder(embedded, attention_mask=real[:, None, None, :])
        logits: Tensor = self.net.classifier(encoded.last_hidden_state)
        return logits.float().sigmoid().amax(dim=1)


def load(weights: Weights) -> tuple[nn.Module, Any]:
    """Detoxify's net and tokenizer, without asking the hub.

    detoxify asks the hub for the model named in the checkpoint, even when it is given local files;
    naming the local folder as the model makes it read that.
    """
    from detoxify.detoxify import get_model_and_tokenizer

    with weights.used(CHECKPOINT), quiet():
        content = weights.load(CHECKPOINT)
        args = {**content["config"]["arch"]["args"], "model_type": str(weights.path(HUB_FILES))}
        net, tokenizer = get_model_and_tokenizer(**args, state_dict=content["state_dict"])
        _complete(net, content["state_dict"], weights)
    return net, tokenizer


def _complete(net: nn.Module, state: dict[str, Tensor], weights: Weights) -> None:
    """Refuse what transformers makes up: random tensors, an empty vocabulary."""
    if missing := sorted(net.state_dict().keys() - state.keys()):
        raise KeyError(", ".join(missing))
    vocabulary = weights.path(HUB_FILES) / "tokenizer.json"
    if not vocabulary.is_file():
        raise WeightsError(f"{vocabulary} is missing; run `d2m weights check`")
