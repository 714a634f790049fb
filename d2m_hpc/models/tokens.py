"""Captions to the tokens of CLIP-like models."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from threading import Lock
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray
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


def of_clip() -> Callable[[str], NDArray[np.int64]]:
    """OpenAI's tokens, for `inputs.OwnInput`."""
    return clip_tokens


def of_open_clip(
    context: int = CONTEXT, **options: Any
) -> Callable[[str], NDArray[np.int64] | Tensor]:
    """The tokens of open_clip's own tokenizer, for `inputs.OwnInput`."""
    if not options:
        return ClipTokens(context, openai=False)
    made = _tokenizers().SimpleTokenizer(context_length=context, **options)
    return lambda text: made(text)[0]


def of_transformers(source: str, context: int, **options: Any) -> Callable[[str], Tensor]:
    """The tokens of a tokenizer of transformers as open_clip uses it, for `inputs.OwnInput`.

    Args:
        source: the folder of the tokenizer's files.
    """
    made, one = _tokenizers().HFTokenizer(source, context_length=context, **options), Lock()

    def tokens(text: str) -> Tensor:
        with one:  # tokenizers keep padding and truncation as state, which threads would share
            found: Tensor = made(text)[0]
            return found

    return tokens


@cache
def _tokenizers() -> Any:
    """open_clip's module of tokenizers, without its nets, whose imports take 1.5 times torch's."""
    name = "open_clip.tokenizer"
    package = find_spec("open_clip")
    assert package
    assert package.submodule_search_locations
    found = PathFinder.find_spec(name, package.submodule_search_locations)
    assert found
    assert found.loader
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


class ClipTokens:
    """CLIP's BPE tokens: int64 [context], cut with the end token kept, padded with 0.

    As NumPy's array, and words are found without letting go of the interpreter's lock: to wait for
    it at each, beside many threads that decode, would take longer than the rest.

    Args:
        openai: read OpenAI's special tokens in a text, as openai/CLIP does (simple_tokenizer.py)
            and DataComp's published features were made; else open_clip's own.
    """

    def __init__(self, context: int = CONTEXT, openai: bool = True) -> None:
        made = _tokenizers().SimpleTokenizer(context_length=context)
        self._context, self._encoder, self._bytes = context, made.encoder, made.byte_encoder
        self._start, self._end = made.all_special_ids
        named = {made.decoder[token]: token for token in made.all_special_ids}
        for name in named:
            del self._encoder[name]
        self._bpe = Bpe(made.bpe_ranks, self._encoder)
        self._special = dict(zip(SPECIAL, named.values(), strict=True)) if openai else named
        special = "|".join(map(regex.escape, self._special))
        rest = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        self._words = regex.compile(f"{special}|{rest}", regex.IGNORECASE)
        self._of_word = lru_cache(maxsize=WORDS)(self._encoded)

    def __call__(self, text: str) -> NDArray[np.int64]:
        tokens = [self._start]
        for word in self._words.finditer(clean(text), concurrent=False):
            is_short = word.end() - word.start() <= LETTERS
            tokens += self._of_word(word[0]) if is_short else self._encoded(word[0])
            if len(tokens) >= self._context:
                break
        tokens = [*tokens[: self._context - 1], self._end]
        return np.array(tokens + [0] * (self._context - len(tokens)))

    def _encoded(self, word: str) -> tuple[int, ...]:
        """A word's tokens, or the first of them where they are more than are kept."""
        if word in self._special:
            return (self._special[word],)
        letters = "".join(map(self._bytes.__getitem__, word.encode()))
        return tuple(self._encoder[part] for part in self._bpe.first(letters, self._context))


@lru_cache(maxsize=1)
def _openai() -> ClipTokens:
    return ClipTokens()


def clip_tokens(text: str) -> NDArray[np.int64]:
    """int64 [77]: OpenAI's tokens, cut with the end token kept, padded with 0."""
    return _openai()(text)


def clean(text: str) -> str:
    """As open_clip does: encoding mended, HTML unescaped, white space collapsed, lower case."""
    if _PLAIN.fullmatch(text):
        return " ".join(text.split()).lower()
    import ftfy  # a tenth of what all else of a task without nets imports

    # Normalising puts a letter's marks in order, in square time where they come in none.
    mended = ftfy.fix_text(_MARKS.sub(_in_order, text))
    for _ in range(2):
        # Python refuses to read numbers of more than 4,300 digits.
        mended = html.unescape(_NUMBER.sub(r"&#\1", mended))
    return " ".join(mended.split()).lower()


def _in_order(marks: regex.Match[str]) -> str:
    return "".join(sorted(marks[0], key=unicodedata.combining))
