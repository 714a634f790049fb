"""Texts on record hold nothing that a terminal, a line or UTF-8 stumbles over."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2m_hpc.storage.texts import GAP, counted, json_escaped, safe


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain döner ☃ 日本 \\n", "plain döner ☃ 日本 \\n"),
        ("na\udcefve", "na\\xefve"),
        ("\ud83d", "\\ud83d"),
        ("a\x1b]0;title\x07", "a\\x1b]0;title\\x07"),
        ("a\nb\rc\td\x00", "a\\nb\\rc\\td\\x00"),
        ("a\u2028b\u2029c\x85d\x9b", "a\\u2028b\\u2029c\\x85d\\x9b"),
        ("gpj\u202egnp", "gpj\\u202egnp"),
        ("\x7f", "\\x7f"),
    ],
)
def test_what_is_odd_is_escaped_visibly(raw: str, shown: str) -> None:
    assert safe(raw) == shown
    assert safe(shown) == shown


def test_a_long_text_keeps_its_start_and_its_end() -> None:
    cut = safe("start" + "x" * 1_000_000 + "what to do", limit=60)
    assert len(cut) == 60
    assert cut.startswith("start")
    assert cut.endswith("what to do")
    assert GAP in cut


@pytest.mark.parametrize(
    ("number", "told"), [(0, "0 tasks"), (1, "1 task"), (2, "2 tasks"), (1200, "1,200 tasks")]
)
def test_counts_have_their_plurals(number: int, told: str) -> None:
    assert counted(number, "task") == told
    assert counted(number, "task is", "tasks are") == told + (" is" if number == 1 else " are")


def test_lines_are_kept_where_that_is_asked_for() -> None:
    assert safe("a\n\tb\x1b\r\n", lines=True) == "a\n\tb\\x1b\\r\n"


@given(st.text(st.characters()), st.integers(0, 40))
def test_any_text_becomes_one_line_of_utf8_within_the_bound(text: str, limit: int) -> None:
    made = safe(text, limit)
    made.encode()
    assert len(made) <= limit
    assert len(made.splitlines()) <= 1
    assert not {"Cc", "Cs", "Zl", "Zp"} & {unicodedata.category(c) for c in made}
    assert safe(made, limit) == made


def test_json_is_escaped_in_json() -> None:
    assert json_escaped('{"a":"x\u2028\udcff\x9bö"}') == '{"a":"x\\u2028\\udcff\\u009bö"}'
