from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.key_parts.clauses import MOST_CLAUSES, clauses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Name the city, and answer in one word.", ["Name the city", "answer in one word"]),
        ("Answer briefly. Use JSON!", ["Answer briefly", "Use JSON"]),
        ("List the main causes, e.g. blood sugar levels, without any numbers.",
         ["List the main causes", "e.g. blood sugar levels", "without any numbers"]),
        ("Choose one of the six: 'joy', 'love', 'anger', or 'fear'.",
         ["Choose one of the six", "'joy', 'love', 'anger', or 'fear'"]),
        ("Write the date (day, month, year) in plain words", ["Write the date", "day, month, year", "in plain words"]),
        ("First line of it\nsecond line of it\n", ["First line of it", "second line of it"]),
        ("Antworte in einem Satz, und nenne nur die Zahl.", ["Antworte in einem Satz", "nenne nur die Zahl"]),
        ("请把下面的句子翻译成法语，只输出译文，不要解释。", ["请把下面的句子翻译成法语", "只输出译文，不要解释"]),
        ("要約してください。一文で書いてください。", ["要約してください", "一文で書いてください"]),
        ("Translate this sentence into good French", ["Translate this sentence", "into good French"]),
        ("Translate to French.", ["Translate", "to", "French"]),
        ("翻译成法语", ["翻译", "成法", "语"]),
        ("Go!", ["Go"]),
        ("?! ...", []),
        ("", []),
    ],
)  # fmt: skip
def test_clauses_of(text, expected):
    assert [text[start:end] for start, end in clauses(text)] == expected


def test_a_long_instruction_has_not_more_clauses_than_are_worth_trying():
    text = " ".join(f"This is sentence number {k}." for k in range(100))
    spans = clauses(text)
    assert len(spans) <= MOST_CLAUSES
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text) - 1


@given(st.text(alphabet=st.sampled_from("ab A.,;:!?()\n\"'-和、。 if and")))
def test_spans_ascend_and_are_trimmed_and_say_something(text):
    end_of_previous = 0
    for start, end in clauses(text):
        assert end_of_previous <= start < end <= len(text)
        piece = text[start:end]
        assert piece == piece.strip()
        assert any(map(str.isalnum, piece))
        end_of_previous = end
