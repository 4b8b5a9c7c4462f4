"""An answer's text as it grows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.data import Example
from cit_fast.inference.questions import Question, Said


@pytest.mark.parametrize(
    ("answer", "stop", "expected"),
    [
        ("one two three", ("three", "two"), ("one ", True)),
        ("one two three", ("four",), ("one two three", False)),
        ("one two three", (), ("one two three", False)),
        ("  one \n", ("",), ("one", False)),
        ("\n one\ntwo", (), ("one\ntwo", False)),  # white space before an answer is no part of it,
        ("\none\ntwo", ("\n",), ("", True)),  # but stops it where it is asked to
        ("\n\n one", ("\n\n",), ("", True)),
        (" one two", (" two",), ("one", True)),
    ],
)
def test_an_answer_ends_before_what_stops_it(answer, stop, expected):
    said = Said(stop)
    said.grow(answer, last=True)
    assert (said.text, said.stopped) == expected


@given(
    st.text(st.sampled_from("ab \n\N{REPLACEMENT CHARACTER}"), max_size=12),
    st.lists(st.text(st.sampled_from("ab \n"), max_size=3), max_size=2),
    st.sets(st.integers(0, 12)),
)
def test_the_pieces_are_the_answer(answer, stop, places):
    """However it grows: nothing is told that is not in the answer, and nothing is left out."""
    whole = Said(stop)
    whole.grow(answer, last=True)
    told: list[str] = []
    said = Said(stop, told.append)
    for place in sorted(places):
        # What ends in half a character ends otherwise when the rest of it has come.
        said.grow(answer[:place] + ("\N{REPLACEMENT CHARACTER}" if place < len(answer) else ""))
        assert whole.text.startswith("".join(told))
        if said.stopped:
            break
    if not said.stopped:
        said.grow(answer, last=True)
    assert "".join(told) == said.text == whole.text
    assert said.stopped == whole.stopped
    assert said.told == whole.text


def test_no_half_of_a_stop_text_is_told():
    told: list[str] = []
    said = Said(("</end>",), told.append)
    for text in ("a <", "a </e", "a </eX", "a </eX </", "a </eX </end> b"):
        said.grow(text)
    assert told == ["a", " </eX", " "]
    assert said.text == "a </eX "


def test_an_answer_made_anew_goes_on_where_it_broke_off():
    told: list[str] = []
    said = Said(("!",), told.append)
    said.grow("one two th")
    assert said.told == "one two th"
    assert not said.go_on("one three")
    assert said.go_on(" one two three! four")
    assert ("".join(told), said.text, said.stopped) == ("one two three", "one two three", True)


def test_a_stop_text_that_begins_with_white_space_before_the_answer_is_not_half_told():
    told: list[str] = []
    said = Said(("\n a b",), told.append)
    for text in ("\n", "\n a", "\n a b c"):
        said.grow(text)
    assert (told, said.text, said.stopped) == ([], "", True)


@pytest.mark.parametrize(("asked", "left", "longest"), [(9, 5, 9), (None, 5, 5), (None, 1000, 256), (None, None, 256)])
def test_an_answer_may_have_what_is_left_where_nobody_says_how_much(asked, left, longest):
    assert Question(Example("Say it.", references=("-",)), max_new_tokens=asked).longest(left) == longest
