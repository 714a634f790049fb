"""Embeddings of captions, by checkpoints of transformers and of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from d2m_hpc.models.family import Output, ParameterError, Tokens, Use
from d2m_hpc.models.hub_family import HubFamily

if TYPE_CHECKING:
    import torch

KNOWN = ("Transformer", "Pooling", "Normalize")
"""The modules of sentence-transformers that are computed here; a checkpoint may have others."""
POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


class TextEmbedding(HubFamily):
    """A feature of the caption: the mean of its tokens, or its first one.

    Of a checkpoint of sentence-transformers, its own pooling, length, prompt and lower case are
    taken.
    """

    kind: ClassVar = "text-embedding"
    presets: ClassVar = {"minilm-l6": {"checkpoint": "sentence-transformers/all-MiniLM-L6-v2"}}
    on_host: ClassVar = ("text",)

    pooling: Literal["mean", "cls"] | None = None
    """what is taken of the tokens; by default as the checkpoint says, or the mean"""
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
        self._modules(use)
        self._pooling(use)
        width = self.document(use).get("hidden_size")
        if width is not None and (type(width) is not int or width < 1):
            what = f"{self.home(use)}: hidden_size in its config.json is no number of values"
            raise ParameterError("checkpoint", what)
        return [Output("feature", shape=(width,) if width else ())]

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.hub_nets import Embedder

        modules, normalise = self._modules(use), self.normalise
        if normalise is None:
            normalise = not modules or "Normalize" in modules
        return Embedder(device, self.home(use), self._pooling(use), normalise)

    def _prefix(self, use: Use) -> str:
        """
        Raises:
            ParameterError: the checkpoint's default prompt is none of its prompts.
        """
        file = "config_sentence_transformers.json"
        told = self.document(use, file, required=False)
        if self.prefix is not None or (name := told.get("default_prompt_name")) is None:
            return self.prefix or ""
        prompts = told.get("prompts")
        prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
        if not isinstance(prompt, str):
            what = f"{self.home(use)}/{file}: default_prompt_name is {name!r}, and `prompts` has no"
            raise ParameterError("checkpoint", f"{what} such text; give `prefix`, which may be ''")
        return prompt

    def _modules(self, use: Use) -> Mapping[str, str]:
        """The checkpoint's modules of sentence-transformers, with the folders of their configs.

        Raises:
            ParameterError: one of them is not known here.
        """
        told = self.document(use, "modules.json", required=False, kind=list)
        try:
            modules = {str(m["type"]).rpartition(".")[2]: str(m["path"]) for m in told}
        except (LookupError, TypeError):
            what = f"{self.home(use)}/modules.json has no `type` and `path` of each module"
            raise ParameterError("checkpoint", what) from None
        if others := modules.keys() - {*KNOWN}:
            what = f"has a module {min(others)} of sentence-transformers; valid: {', '.join(KNOWN)}"
            raise ParameterError("checkpoint", what)
        return modules

    def _pooling(self, use: Use) -> str:
        """
        Raises:
            ParameterError: the checkpoint's own way is none of ours.
        """
        folder = self._modules(use).get("Pooling")
        if folder is None:
            return self.pooling or "mean"
        told = self.document(use, f"{folder}/config.json")
        if self._prefix(use) and not told.get("include_prompt", True):
            raise ParameterError("prefix", f"{folder}/config.json leaves it out; valid is ''")
        if self.pooling or not told:
            return self.pooling or "mean"
        modes = [key for key, value in told.items() if key.startswith("pooling_mode_") and value]
        mode = POOLING.get(modes[0]) if len(modes) == 1 else told.get("pooling_mode")
        if mode not in POOLING.values():
            what = f"{folder}/config.json pools by {', '.join(modes) or mode}"
            raise ParameterError("pooling", f"{what}; give one of {', '.join(POOLING.values())}")
        return str(mode)
