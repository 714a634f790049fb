"""Words to tokens without square time: the tokens that open_clip's own loop finds."""

from __future__ import annotations

import random
import string
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import open_clip
import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from d2m_hpc.models import bpe, tokens
from d2m_hpc.models.bpe import END, Bpe, merged
from d2m_hpc.models.tokens import CONTEXT, clip_tokens

CLEAN = SimpleTokenizer().clean_fn

ALPHABETS = [string.ascii_lowercase, "etaoin", "ab", "a", "ñü", "日本語の", "😂😍", "!?.", "_-"]
RANKS = st.lists(st.tuples(*[st.text("ab", min_size=1, max_size=3)] * 2), unique=True, max_size=25)
"""Tables of merges that no training would make: tokens come from several pairs, in any order."""


@cache
def _open_clips() -> Any:
    return open_clip.SimpleTokenizer(context_length=CONTEXT)


def _square(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """openai/CLIP's loop, which looks through all symbols for each merge."""
    while pairs := [p for p in pairwise(symbols) if p in ranks]:
        first, second = min(pairs, key=ranks.__getitem__)
        made, i = [], 0
        while i < len(symbols):
            both = symbols[i : i + 2] == [first, second]
            made.append(first + second if both else symbols[i])
            i += 1 + both
        symbols = made
    return symbols


@given(st.text("ab", min_size=1, max_size=60), RANKS)
def test_merging_is_the_loops_for_any_table(word: str, pairs: list[tuple[str, str]]) -> None:
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    assert merged([*word], ranks) == _square([*word], ranks)


@given(st.text("ab", min_size=30, max_size=90), RANKS, st.integers(1, 12))
def test_the_first_tokens_of_a_long_word_are_the_loops_for_any_table(
    word: str, pairs: list[tuple[str, str]], most: int
) -> None:
    """The beginning is looked at again and again, and longer, until its tokens are settled."""
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    ranks |= {(a, b + END): len(ranks) + i for i, (a, b) in enumerate(pairs)}
    vocabulary = {"a", "b", *(a + b for a, b in ranks)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "WHOLE", 0)
        patch.setattr(bpe, "BEGINNING", 8)
        found = Bpe(ranks, vocabulary).first(word, most)
    assert found == _square([*word[:-1], word[-1] + END], ranks)[:most]


@given(st.sampled_from(ALPHABETS).flatmap(lambda letters: st.text(letters, max_size=400)))
def test_long_words_have_open_clips_tokens(text: str) -> None:
    assert np.array_equal(clip_tokens(text), _open_clips()([text])[0])


@pytest.mark.parametrize("letters", ALPHABETS)
def test_words_of_which_the_beginning_is_looked_at_have_open_clips_tokens(
    letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bpe, "WHOLE", 600)
    drawn = random.Random(letters)
    for length in (601, 2500):
        word = "".join(drawn.choices(letters, k=length))
        assert np.array_equal(clip_tokens(word), _open_clips()([word])[0])


@pytest.mark.parametrize("letters", ["etaoinshrdlu", "x", "日本語の文字", "=~", "é"])
def test_a_caption_of_one_endless_word_costs_about_what_a_long_one_does(
    letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in symbols that are merged, whatever the machine."""
    seen = 0
    real = merged

    def counted(symbols: list[str], ranks: Any) -> list[str]:
        nonlocal seen
        seen += len(symbols)
        return real(symbols, ranks)

    monkeypatch.setattr(bpe, "merged", counted)
    clip_tokens("".join(random.Random(1).choices(letters, k=1_000_000)))
    assert 0 < seen < 40 * 4 * bpe.WHOLE


@given(
    st.lists(
        st.sampled_from(["<|endoftext|>", "<|startoftext|>", "a" * 90, "b", " ", "é", "<|", "7"]),
        max_size=30,
    )
)
def test_special_tokens_stand_in_and_between_words(parts: list[str]) -> None:
    """Words apart have the tokens that they have alone, up to the cut."""
    text = "".join(parts)
    words = [m[0] for m in tokens._openai()._words.finditer(tokens.clean(text))]
    alone = [token for word in words for token in clip_tokens(word).tolist()[1:] if token]
    ends = [49407] * len(words)
    kept = clip_tokens(text).tolist()
    assert kept[0] == 49406
    joined: list[int] = []
    for word in words:
        own = [token for token in clip_tokens(word).tolist()[1:] if token]
        joined += own[:-1]  # the end that each has alone
    assert [t for t in kept[1:] if t] == [*joined[: CONTEXT - 2], 49407]
    assert len(alone) == len(joined) + len(ends)


@given(st.text("ae\u0301\u0300\u0315\u0323\u05b0", min_size=33, max_size=120))
def test_marks_in_any_order_are_normalised_as_ever(text: str) -> None:
    for marked in (text, "o" + text.replace("a", "").replace("e", "") * 3):
        assert tokens.clean(marked) == CLEAN(marked)


def test_a_letter_with_endless_marks_is_normalised_in_no_square_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[str] = []
    monkeypatch.setattr("ftfy.fix_text", lambda text: given.append(text) or text)
    tokens.clean("a" + "\u0315\u0300" * 50_000)
    assert given == ["a" + "\u0300" * 50_000 + "\u0315" * 50_000]


def test_long_words_are_not_remembered() -> None:
    before = tokens._openai()._of_word.cache_info().currsize
    clip_tokens("unheardofunheardof" * 10)
    assert tokens._openai()._of_word.cache_info().currsize == before
