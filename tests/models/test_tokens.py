"""Captions to CLIP's tokens: those of open_clip, but for OpenAI's special ones."""

from __future__ import annotations

import string
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import captions
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from d2m_hpc.models import tokens
from d2m_hpc.models.tokens import clip_tokens

CLEAN = SimpleTokenizer().clean_fn

START, END = 49406, 49407


def _tokens(texts: list[str]) -> Tensor:
    return torch.from_numpy(np.stack([clip_tokens(text) for text in texts]))


@cache
def _open_clips() -> Any:
    return open_clip.SimpleTokenizer(context_length=77)


def _theirs(texts: list[str]) -> Tensor:
    found: Tensor = _open_clips()(texts)
    return found


def test_tokens_are_those_of_open_clip() -> None:
    texts = [t for t in captions() if "<|" not in t]
    texts += [
        "",
        "  ",
        "don't   STOP &amp; go",
        "日本語 naïve café",
        "a" * 300,
        "1234 <b>",
        "<|x|>",
    ]
    assert len(texts) > 50
    assert torch.equal(_tokens(texts), _theirs(texts))


@pytest.mark.parametrize(
    ("text", "special"),
    [
        ("<|endoftext|>", [END]),
        ("<|startoftext|>", [START]),
        ("<|EndOfText|> <|startoftext|>", [END, START]),
        ("&lt;|endoftext|&gt;", [END]),
    ],
)
def test_special_tokens_in_a_caption_are_read_as_openai_reads_them(
    text: str, special: list[int]
) -> None:
    found = clip_tokens(text).tolist()
    assert found[: len(special) + 2] == [START, *special, END]
    assert not torch.equal(_tokens([text]), _theirs([text]))


@pytest.mark.parametrize("text", ["<end_of_text>", "<start_of_text>", "a <end_of_text> b"])
def test_open_clips_own_special_tokens_are_spelled_out(text: str) -> None:
    found = clip_tokens(text).tolist()
    assert found.count(START) == found.count(END) == 1
    words = SimpleTokenizer().decode(found[1 : found.index(END)])
    assert words.replace(" ", "") == text.replace(" ", "")


@given(st.text(st.sampled_from(string.printable), max_size=60))
def test_plain_texts_need_no_mending(text: str) -> None:
    """The short cut for them gives what open_clip's cleaning gives, white space and all."""
    assert tokens.clean(text) == CLEAN(text)


@given(st.text(max_size=40))
def test_any_text_has_open_clips_tokens(text: str) -> None:
    if not any(f"<{mark}" in tokens.clean(text) for mark in ("|", "end_", "start_")):
        assert torch.equal(_tokens([text]), _theirs([text]))


def test_words_are_not_remembered_without_bound() -> None:
    _tokens([f"unheardof{i}" for i in range(50)])
    assert tokens._openai()._of_word.cache_info().maxsize == tokens.WORDS


def test_a_long_caption_is_cut_with_the_end_token_kept() -> None:
    [found] = _tokens(["word " * 200])
    assert found.shape == (77,)
    assert found[0] == START
    assert found[-1] == END
    assert (found == END).sum() == 1


def test_a_short_caption_is_padded_with_zeros() -> None:
    [found] = _tokens(["word"])
    assert found[2] == END
    assert not found[3:].any()


def test_many_threads_tokenize_as_one_does() -> None:
    texts = [f"{caption} number{i}" for i in range(20) for caption in captions()[:20]]
    expected = _theirs(texts)
    tokens._openai.cache_clear()  # the threads race for the first one
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(clip_tokens, texts))
    assert torch.equal(torch.from_numpy(np.stack(rows)), expected)


@pytest.mark.parametrize("zeros", [0, 1, 6000])
@pytest.mark.parametrize(
    "written", ["&#{};", "&amp;#{};", "&#38;#{};", "&amp;#{} ", "\uff06\uff03{};"]
)
def test_a_character_by_a_number_of_any_length_is_read(written: str, zeros: int) -> None:
    """Python reads no decimal number of more than 4,300 digits, and HTML has no such bound."""
    known = f"cat {written.format('0' * zeros + '233')} dog"
    meant = clip_tokens(f"cat é{' ' if '{} ' in written else ''} dog")
    assert np.array_equal(clip_tokens(known), meant)
    unknown = f"cat {written.format('0' * zeros + '7' * 5000)} dog"
    meant = clip_tokens("cat \N{REPLACEMENT CHARACTER} dog")
    assert np.array_equal(clip_tokens(unknown), meant)


@pytest.mark.parametrize(
    "number", ["0", "00", "9", "128", "1114111", "1114112", "99999999999", "x41"]
)
def test_characters_by_numbers_are_those_of_open_clip(number: str) -> None:
    for text in (f"a &#{number}; b", f"a &amp;#{number}b", f"&#00{number};"):
        assert tokens.clean(text) == CLEAN(text)
