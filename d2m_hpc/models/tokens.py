"""Captions to CLIP's tokens."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import regex
import torch
from torch import Tensor

CONTEXT = 77
WORDS = 1 << 16
"""Distinct words whose tokens are remembered."""
_PLAIN = re.compile("[ -%'-~]*")
"""Printable ASCII but for `&`: in such a text there is nothing to mend and nothing to unescape."""


def clip_tokens(text: str) -> Tensor:
    """int64 [77]: CLIP's BPE tokens, cut with the end token kept, padded with 0."""
    tokenizer = _tokenizer()
    tokens = [tokenizer.sot_token_id]
    for word in tokenizer.pat.finditer(clean(text)):
        tokens += _of_word(word[0])
        if len(tokens) >= CONTEXT:
            break
    tokens = [*tokens[: CONTEXT - 1], tokenizer.eot_token_id]
    return torch.tensor(tokens + [0] * (CONTEXT - len(tokens)))


def clean(text: str) -> str:
    """As open_clip does: encoding mended, HTML unescaped, white space collapsed, lower case."""
    if _PLAIN.fullmatch(text):
        return " ".join(text.split()).lower()
    cleaned: str = _tokenizer().clean_fn(text)
    return cleaned


@lru_cache(maxsize=WORDS)
def _of_word(word: str) -> tuple[int, ...]:
    tokenizer = _tokenizer()
    letters = "".join(tokenizer.byte_encoder[b] for b in word.encode())
    return tuple(tokenizer.encoder[part] for part in tokenizer.bpe(letters).split(" "))


class _Fixed(dict[str, str]):
    """Holds what it was made with and nothing more."""

    def __setitem__(self, key: str, value: str) -> None:
        """Words are remembered by `_of_word`, which forgets."""


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    """open_clip's tokenizer with OpenAI's special tokens.

    OpenAI's reads `<|endoftext|>` inside a caption as that token (openai/CLIP,
    simple_tokenizer.py); DataComp's published features were made so.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=CONTEXT)
    names = ("<|startoftext|>", "<|endoftext|>")
    for name, token in zip(names, tokenizer.all_special_ids, strict=True):
        del tokenizer.encoder[tokenizer.decoder[token]]
        tokenizer.encoder[name] = token
        tokenizer.decoder[token] = name
    tokenizer.cache = _Fixed((name, name) for name in names)
    special = "|".join(map(regex.escape, names))
    rest = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pat = regex.compile(f"{special}|{rest}", regex.IGNORECASE)
    return tokenizer
