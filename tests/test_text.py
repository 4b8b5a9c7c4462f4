from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.text import composed, first_line, normalise_label, word_count, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Foo_bar a-b 3.5", ["foo", "bar", "a", "b", "3", "5"]),
        ("ราคา ๑๒", ["ร", "า", "ค", "า", "๑๒"]),
        ("ラーメン", ["ラ", "ー", "メ", "ン"]),
        ("我爱你ok", ["我", "爱", "你", "ok"]),
        ("한국어", ["한", "국", "어"]),
        ("Ⅻ ² +", ["ⅻ", "²"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_word_count_goes_by_white_space():
    assert word_count("a-b, c") == 2
    assert word_count("我爱你 ok") == 4


@given(st.text())
def test_both_forms_of_a_text_are_the_same(text):
    import unicodedata

    apart = unicodedata.normalize("NFD", text)
    assert words(composed(text)) == words(apart)
    assert normalise_label(composed(text)) == normalise_label(apart)
    assert word_count(composed(text)) == word_count(apart)


@given(st.text())
def test_no_letter_is_lost(text):
    folded = composed(text.casefold())
    letters = [c for c in folded if c.isalnum()]
    assert [c for word in words(text) for c in word if c.isalnum()] == letters


def test_errors_in_one_line():
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
