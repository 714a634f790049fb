"""Embeddings of captions, by checkpoints of transformers and of sentence-transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from d2m_hpc.models.family import Output, ParameterError, Tokens, Use
from d2m_hpc.models.hub_family import HubFamily

if TYPE_CHECKING:
    import torch

KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")
"""The modules of sentence-transformers that are computed here; a checkpoint may have others."""
Pooling = Literal["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"]
ACTIVATIONS = {"Identity": "none", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu"}
"""Of a `Dense`, by the names of torch's classes: as `layers` has them."""
PROMPTS = "config_sentence_transformers.json"


class TextEmbedding(HubFamily):
    """A feature of the caption: the mean of its tokens, its first one or another pooling.

    Of a checkpoint of sentence-transformers, its own pooling, length, prompt, lower case and
    number of values are taken.
    """

    kind: ClassVar = "text-embedding"
    presets: ClassVar = {"minilm-l6": {"checkpoint": "sentence-transformers/all-MiniLM-L6-v2"}}
    on_host: ClassVar = ("text",)

    pooling: Pooling | None = None
    """what is taken of the tokens, as sentence-transformers names it; by default as the checkpoint
    says, or `mean`"""
    normalise: bool | None = None
    """bring each feature to length 1; by default as the checkpoint says, or true"""
    prefix: str | None = None
    """what every caption begins with, such as `query: `; by default the checkpoint's default
    prompt, or nothing"""
    max_tokens: Tokens | None = None
    """tokens of a caption that are read; by default as many as the checkpoint takes"""

    def inputs(self, use: Use) -> list[Any]:
        told = self.document(use, "sentence_bert_config.json", required=False)
        most = told.get("max_seq_length")
        if most is not None and (type(most) is not int or most < 3):
            what = f"{self.home(use)}/sentence_bert_config.json: max_seq_length is {most!r}"
            raise ParameterError("checkpoint", f"{what}; valid is 3 or more")
        options = {"prefix": self._prefix(use), "lower": bool(told.get("do_lower_case"))}
        return [self.text(use, most=self.max_tokens or most, **options)]

    def outputs(self, use: Use) -> list[Output]:
        self._pooling(use)
        width = self.document(use).get("hidden_size")
        for kind, folder in self._modules(use):
            if kind == "Dense":
                width = self._dense(use, folder)[1]
        if width is not None and (type(width) is not int or width < 1):
            what = f"{self.home(use)}: hidden_size in its config.json is no number of values"
            raise ParameterError("checkpoint", what)
        cut = self._cut(use)
        return [Output("feature", shape=(min(width, cut or width),) if width else ())]

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.hub_nets import Embedder

        steps: list[tuple[Path, str] | None] = []
        for kind, folder in self._modules(use) or [("Normalize", "")]:
            if kind == "Dense":
                steps.append((self.home(use) / folder, self._dense(use, folder)[0]))
            elif kind == "Normalize" and self.normalise is None:
                steps.append(None)
        pooling, last = self._pooling(use), bool(self.normalise)
        return Embedder(device, self.home(use), pooling, steps, self._cut(use), last)

    def _dense(self, use: Use, folder: str) -> tuple[str, int | None]:
        """The activation of a linear layer behind the pooling, and how many values it gives.

        Raises:
            ParameterError: it is none that is computed here.
        """
        told = self.document(use, f"{folder}/config.json")
        if not told:
            return "", None
        activation = ACTIVATIONS.get(str(told.get("activation_function")).rpartition(".")[2])
        names = {told.get(f"module_{n}_name", "sentence_embedding") for n in ("input", "output")}
        width = told.get("out_features")
        if activation is None or names != {"sentence_embedding"} or type(width) is not int:
            what = f"{self.home(use)}/{folder}/config.json is of no linear layer of the feature"
            raise ParameterError("checkpoint", f"{what} with one of {', '.join(ACTIVATIONS)}")
        return activation, width

    def _cut(self, use: Use) -> int | None:
        """How many values of a feature the checkpoint keeps; None for all.

        Raises:
            ParameterError: it tells no number.
        """
        cut = self.document(use, PROMPTS, required=False).get("truncate_dim")
        if cut is not None and (type(cut) is not int or cut < 1):
            what = f"{self.home(use)}/{PROMPTS}: truncate_dim is {cut!r}"
            raise ParameterError("checkpoint", f"{what}; valid is 1 or more")
        return cut

    def _prefix(self, use: Use) -> str:
        """
        Raises:
            ParameterError: the checkpoint's default prompt is none of its prompts.
        """
        told = self.document(use, PROMPTS, required=False)
        if self.prefix is not None or (name := told.get("default_prompt_name")) is None:
            return self.prefix or ""
        prompts = told.get("prompts")
        prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
        if not isinstance(prompt, str):
            what = (
                f"{self.home(use)}/{PROMPTS}: default_prompt_name is {name!r}, and `prompts` has no"
            )
            raise ParameterError("checkpoint", f"{what} such text; give `prefix`, which may be ''")
        return prompt

    def _modules(self, use: Use) -> list[tuple[str, str]]:
        """The checkpoint's modules of sentence-transformers, with the folders of their configs.

        Raises:
            ParameterError: one of them is not known here.
        """
        told = self.document(use, "modules.json", required=False, kind=list)
        try:
            modules = [(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in told]
        except (LookupError, TypeError):
            what = f"{self.home(use)}/modules.json has no `type` and `path` of each module"
            raise ParameterError("checkpoint", what) from None
        kinds = [kind for kind, _ in modules]
        if "Dense" in kinds[: kinds.index("Pooling") if "Pooling" in kinds else None]:
            raise ParameterError(
                "checkpoint", "has a Dense of sentence-transformers before Pooling"
            )
        if others := {*kinds} - {*KNOWN}:
            what = f"has a module {min(others)} of sentence-transformers; valid: {', '.join(KNOWN)}"
            raise ParameterError("checkpoint", what)
        return modules

    def _pooling(self, use: Use) -> str:
        """
        Raises:
            ParameterError: the checkpoint's own way is none of ours.
        """
        folder = dict(self._modules(use)).get("Pooling")
        if folder is None:
            return self.pooling or "mean"
        told = self.document(use, f"{folder}/config.json")
        if self._prefix(use) and not told.get("include_prompt", True):
            raise ParameterError("prefix", f"{folder}/config.json leaves it out; valid is ''")
        if self.pooling or not told:
            return self.pooling or "mean"
        modes = [key for key, value in told.items() if key.startswith("pooling_mode_") and value]
        named = [re.sub("^pooling_mode_|_tokens?$", "", key) for key in modes]
        named = named or [re.sub("_tokens?$", "", str(told.get("pooling_mode")))]
        known: dict[str, str] = {name.removesuffix("_tokens"): name for name in get_args(Pooling)}
        if len(named) > 1 or named[0] not in known:
            what = f"{folder}/config.json pools by {', '.join(modes) or told.get('pooling_mode')}"
            valid = f"for another feature than its own, give one of {', '.join(known.values())}"
            raise ParameterError("pooling", f"{what}, which is not computed here; {valid}")
        return known[named[0]]
