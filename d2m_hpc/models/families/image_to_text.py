"""Captions of images, by checkpoints of transformers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from d2m_hpc.models.family import Between, Output, ParameterError, Use
from d2m_hpc.models.hub_family import HubFamily

if TYPE_CHECKING:
    import torch


class ImageToText(HubFamily):
    """A text about the image, such as a caption, by BLIP, BLIP-2, GIT and their like."""

    kind: ClassVar = "image-to-text"
    further: ClassVar = ("text",)
    presets: ClassVar = {"blip2-opt-2.7b": {"checkpoint": "Salesforce/blip2-opt-2.7b"}}

    prompt: str = ""
    """what the text begins with (BLIP), or the question that it answers (BLIP-2)"""
    num_beams: Annotated[int, Between(1, 64)] = 1
    """beams of the search; with 1, the likeliest token is taken each time"""
    max_new_tokens: Annotated[int, Between(1, 4096)] = 40
    """tokens of a text, at most"""

    def inputs(self, use: Use) -> list[Any]:
        return [self.image(use)]

    def outputs(self, use: Use) -> list[Output]:
        config, within = self.document(use), ("image_token_id", "image_token_index")
        answers = str(config.get("model_type")) in ("blip-2", "instructblip")
        if not (self.prompt or answers) and any(config.get(name) is not None for name in within):
            what = "is missing: the net reads the picture within its prompt; give one, with the"
            raise ParameterError(
                "prompt", f"{what} of pictures where it wants one, as '<image>\\n'"
            )
        length, unit = self._length(use)
        start = 1 + length
        if (places := self.places(use)) and start > places:
            what = f"found {length} {unit}; the net's texts have {places} tokens in all"
            raise ParameterError("prompt", f"{what}, the new ones included")
        if places and self.max_new_tokens > (most := places + 1 - start):
            what = f"found {self.max_new_tokens}; valid are up to {most}, as the net's texts have"
            raise ParameterError("max_new_tokens", f"{what} {places} tokens, the prompt included")
        return [Output("text", "string", options={"to_cpu": False})]

    def _length(self, use: Use) -> tuple[int, str]:
        """How long the prompt is: in words where the tokenizer is another library's."""
        path = self.home(use) / "tokenizer.json"
        if self.prompt and path.is_file():
            from tokenizers import Tokenizer

            with suppress(Exception):  # of a file that is damaged
                made = Tokenizer.from_file(str(path))
                return len(made.encode(self.prompt, add_special_tokens=False).ids), "tokens"
        return len(self.prompt.split()), "words or more"

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        from d2m_hpc.models.hub_nets import Captioner

        options = {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}
        return Captioner(device, self.home(use), self.prompt, options)
