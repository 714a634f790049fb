"""Captions to CLIP's tokens."""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache
from typing import Any

import ftfy
import regex
import torch
from torch import Tensor

from d2m_hpc.models.bpe import Bpe

CONTEXT = 77
WORDS = 1 << 16
"""Distinct words whose tokens are remembered."""
LETTERS = 64
"""Of such a word, at most."""
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_PLAIN = re.compile("[ -%'-~]*")
"""Printable ASCII but for `&`: in such a text there is nothing to mend and nothing to unescape."""

_NUMBER = re.compile("&#0*([0-9]{1,8})[0-9]*")
"""A character by its number; one of eight digits is none, and nor is one of more."""

_MARKS = regex.compile(r"\P{ccc=0}{32,}")
"""More marks on one letter than any script has."""


def clip_tokens(text: str) -> Tensor:
    """int64 [77]: CLIP's BPE tokens, cut with the end token kept, padded with 0."""
    tokenizer = _tokenizer()
    tokens = [tokenizer.sot_token_id]
    for word in tokenizer.pat.finditer(clean(text)):
        tokens += _of_word(word[0]) if word.end() - word.start() <= LETTERS else _encoded(word[0])
        if len(tokens) >= CONTEXT:
            break
    tokens = [*tokens[: CONTEXT - 1], tokenizer.eot_token_id]
    return torch.tensor(tokens + [0] * (CONTEXT - len(tokens)))


def clean(text: str) -> str:
    """As open_clip does: encoding mended, HTML unescaped, white space collapsed, lower case."""
    if _PLAIN.fullmatch(text):
        return " ".join(text.split()).lower()
    # Normalising puts a letter's marks in order, in square time where they come in none.
    mended = ftfy.fix_text(_MARKS.sub(_in_order, text))
    for _ in range(2):
        # Python refuses to read numbers of more than 4,300 digits.
        mended = html.unescape(_NUMBER.sub(r"&#\1", mended))
    return " ".join(mended.split()).lower()


def _in_order(marks: regex.Match[str]) -> str:
    return "".join(sorted(marks[0], key=unicodedata.combining))


@lru_cache(maxsize=WORDS)
def _of_word(word: str) -> tuple[int, ...]:
    return _encoded(word)


def _encoded(word: str) -> tuple[int, ...]:
    """A word's tokens, or the first of them where they are more than are kept."""
    tokenizer = _tokenizer()
    if word in SPECIAL:
        return (tokenizer.encoder[word],)
    letters = "".join(map(tokenizer.byte_encoder.__getitem__, word.encode()))
    return tuple(tokenizer.encoder[part] for part in _bpe().first(letters, CONTEXT))


@lru_cache(maxsize=1)
def _bpe() -> Bpe:
    tokenizer = _tokenizer()
    return Bpe(tokenizer.bpe_ranks, set(tokenizer.encoder) - set(SPECIAL))


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    """open_clip's tokenizer with OpenAI's special tokens.

    OpenAI's reads `<|endoftext|>` inside a caption as that token (openai/CLIP,
    simple_tokenizer.py); DataComp's published features were made so.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=CONTEXT)
    for name, token in zip(SPECIAL, tokenizer.all_special_ids, strict=True):
        del tokenizer.encoder[tokenizer.decoder[token]]
        tokenizer.encoder[name] = token
        tokenizer.decoder[token] = name
    special = "|".join(map(regex.escape, SPECIAL))
    rest = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pat = regex.compile(f"{special}|{rest}", regex.IGNORECASE)
    return tokenizer
