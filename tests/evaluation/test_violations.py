"""WFR, OOS and WR by hand, and what must hold of any answers."""

from __future__ import annotations

import dataclasses
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.data import Example, Task
from cit_fast.data.builtin import builtin_stream
from cit_fast.data.constraints import ANSWER_FORMATS, KINDS, Constraints
from cit_fast.data.inferred_labels import inferred_labels
from cit_fast.errors import DataError
from cit_fast.evaluation.violations import FORMATS, task_set_scores, violation_rates


def rates(constraints, predictions, references=None, inputs=None):
    references = references or [["a reference"]] * len(predictions)
    return violation_rates(constraints, predictions, references, inputs)


def test_a_kind_applies_only_where_it_is_declared():
    assert rates(Constraints(), ["anything"]) == {}
    assert list(rates(Constraints(answer_pattern="x"), ["x"])) == ["WFR"]
    assert list(rates(Constraints(answer_format="json"), ["1"])) == ["WFR"]
    assert list(rates(Constraints(labels=("x",)), ["x"])) == ["OOS"]
    assert list(rates(Constraints(extractive=True), ["x"], inputs=["x"])) == ["OOS"]
    assert list(rates(Constraints(wordy_above=1), ["x"])) == ["WR"]
    all_three = Constraints(answer_pattern="x", answer_format="json", labels=("x",), wordy_above=1)
    assert list(rates(all_three, ["x"])) == list(all_three.kinds) == list(KINDS)


def test_wrong_format_by_pattern_is_about_the_whole_answer():
    dates = Constraints(answer_pattern=r"\d{4}-\d{2}-\d{2}")
    answers = ["2024-05-06", " 2024-05-06\n", "On 2024-05-06", "2024-05-06.", ""]
    assert [rates(dates, [answer])["WFR"] for answer in answers] == [0, 0, 100, 100, 100]
    assert rates(dates, answers) == {"WFR": 60}
    alternatives = Constraints(answer_pattern="now|later")
    assert rates(alternatives, ["now", "later", "nowlater", "later on"]) == {"WFR": 50}


def test_a_pattern_may_write_an_accent_as_a_character_of_its_own():
    for form in ("NFC", "NFD"):
        drinks = Constraints(answer_pattern=unicodedata.normalize(form, "café|thé"))
        answers = [unicodedata.normalize(other, text) for other in ("NFC", "NFD") for text in ("café", "thé", "cafe")]
        assert [rates(drinks, [answer])["WFR"] for answer in answers] == [0, 0, 100] * 2


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("json", ['{"a": [1, null]}', "3", '"text"'], ["text", "{'a': 1}", '{"a": 1', "NaN", "", "[" * 100_000]),
        ("json_object", ['{"a": 1}', "{}"], ["[1]", "1", 'Here: {"a": 1}', '{"a": Infinity}']),
        ("json_list", ["[]", '["x", 2]'], ['{"a": 1}', "x, 2"]),
        ("number", ["42", "-3.5", "+1", ".5", "1,234,567.8", "\u22127"], ["forty", "4 2", "12 km", "", ".", "1,23"]),
        ("list", ["- one\n- two", "1. one\n2) two", "* one\n\n  * nested"], ["one, two", "- one\ntwo", "", "-", "1."]),
    ],
)
def test_formats_by_name(name, good, bad):
    declared = Constraints(answer_format=name)
    assert rates(declared, good) == {"WFR": 0}
    assert rates(declared, bad) == {"WFR": 100}


def test_every_format_a_task_may_name_has_a_judge():
    assert tuple(FORMATS) == ANSWER_FORMATS


def test_pattern_and_format_must_both_hold():
    both = Constraints(answer_pattern=r"\{.*\}", answer_format="json")
    assert rates(both, ['{"a": 1}', "[1]", "{a}", "no"]) == {"WFR": 75}


def test_out_of_a_closed_set_compares_as_accuracy_does():
    labels = Constraints(labels=("Positive", "negative"))
    assert rates(labels, ["positive.", ' "NEGATIVE" ', "neutral", "positive negative"]) == {"OOS": 50}


@pytest.mark.parametrize(
    ("answer", "outside"),
    [
        ("George Street", 0),
        ("george street.", 0),
        ("George  Street,\nin 1990", 0),
        ("John", 0),  # of "John's"
        ("北京大学", 0),
        ("→", 0),
        ("George in 1990", 1),  # words of the text, but not in a row
        ("Georg", 1),  # no part of a word
        ("Strasse", 1),
        ("", 1),
        ("+", 1),
        ("St. George", 0),  # the reference, though the text writes it otherwise
    ],
)
def test_extractive_answers_are_spans_of_the_input(answer, outside):
    text = "John's house is in George Street, in 1990 → 他在北京大学学习."
    declared = Constraints(extractive=True)
    assert rates(declared, [answer], [["St. George", "x"]], [text]) == {"OOS": 100 * outside}


def test_wordy_against_the_longest_reference():
    references = [["one two three", "one"]] * 4
    answers = ["a b c d e f", "a b c d e f g", "", "a-b-c-d-e-f-g"]
    assert rates(Constraints(wordy_above=2), answers, references) == {"WR": 25}
    assert rates(Constraints(wordy_above=2.5), answers, references) == {"WR": 0}
    # Each CJK character is a word: without white space such an answer would never be wordy.
    assert rates(Constraints(wordy_above=2), ["北京大学在"], [["北京"]]) == {"WR": 100}
    assert rates(Constraints(wordy_above=2), ["北京大学"], [["北京"]]) == {"WR": 0}


@given(
    st.lists(st.tuples(st.text(), st.lists(st.text(), min_size=1), st.text("abc 北.", min_size=1)), min_size=1),
    st.builds(
        Constraints,
        answer_pattern=st.sampled_from([None, r"\w+", "a.*"]),
        answer_format=st.sampled_from([None, *FORMATS]),
        labels=st.sampled_from([(), ("a", "b c")]),
        wordy_above=st.sampled_from([None, 1.0, 2.5]),
    ),
    st.booleans(),
)
def test_rates_lie_between_0_and_100_for_any_answers(rows, constraints, extractive):
    rows = [(a, r, text if text.strip() else "a") for a, r, text in rows]
    constraints = dataclasses.replace(constraints, extractive=extractive)
    found = rates(constraints, *(list(column) for column in zip(*rows, strict=True)))
    assert tuple(found) == constraints.kinds
    assert all(0.0 <= rate <= 100.0 for rate in found.values())
    scores = task_set_scores(["t"], {"t": 50.0}, {"t": found})
    assert scores.v is None or 0.0 <= scores.v <= 100.0
    assert (scores.v is None) == (not found)
    assert Constraints.from_record(json.loads(json.dumps(constraints.to_record()))) == constraints


def test_right_answers_of_the_built_in_tasks_violate_nothing():
    for task in builtin_stream(train=0, dev=0, test=32):
        declared = Constraints.of(task)
        assert {"WFR", "WR"} <= set(declared.kinds), task.name
        references = [example.references for example in task.test]
        found = violation_rates(declared, [answers[0] for answers in references], references)
        assert set(found.values()) == {0.0}, task.name
        babble = violation_rates(declared, ["I do not know what to say. " * 4] * 32, references)
        assert set(babble.values()) == {100.0}, task.name


def test_p_and_v_by_hand():
    violations = {
        "dates": {"WFR": 50.0, "WR": 25.0},
        "mail": {"WFR": 0.0, "OOS": 50.0, "WR": 25.0},
        "quotes": {"OOS": 100.0},
        "chat": {},
    }
    scores = {"dates": 10.0, "mail": 20.0, "quotes": 60.0, "chat": 30.0}
    found = task_set_scores(violations, scores, violations)
    assert (found.tasks, found.constrained, found.p) == (4, 3, 30.0)
    assert found.v == pytest.approx((37.5 + 25.0 + 100.0) / 3)
    assert found.rates == pytest.approx({"WFR": 25.0, "OOS": 75.0, "WR": 25.0})
    assert found.v_by_kind == pytest.approx((25.0 + 75.0 + 25.0) / 3)
    assert task_set_scores(["dates"], scores, violations).v == pytest.approx(37.5)


def test_p_and_v_are_none_rather_than_over_fewer_tasks():
    judged = {"a": {"WFR": 0.5}, "b": {"WFR": 0.0}}
    assert task_set_scores("ab", {"a": 1.0}, judged).p is None
    lacking = task_set_scores("ab", {"a": 1.0, "b": 3.0}, {"a": {"WFR": 0.5}})
    assert (lacking.p, lacking.v, lacking.v_by_kind, lacking.rates) == (2.0, None, None, {})
    unconstrained = task_set_scores("ab", {"a": 1.0, "b": 3.0}, {"a": {}, "b": {}})
    assert (unconstrained.v, unconstrained.constrained, unconstrained.tasks) == (None, 0, 2)
    nothing = task_set_scores([], {}, {})
    assert (nothing.p, nothing.v, nothing.tasks) == (None, None, 0)


def test_bad_input_is_named():
    with pytest.raises(DataError, match="no answers to judge"):
        violation_rates(Constraints(), [], [])
    with pytest.raises(DataError, match="1 answers, 2 lists of references and 1 inputs"):
        violation_rates(Constraints(), ["x"], [["x"], ["y"]])
    with pytest.raises(DataError, match="without the input its answer is a span of"):
        violation_rates(Constraints(extractive=True), ["x"], [["x"]])
    with pytest.raises(DataError, match="answer_pattern is no regular expression"):
        Constraints(answer_pattern="(")
    for record in ({"answer_format": "yaml"}, {"wordy_above": "2"}, {"labels": "ab"}, {"colour": 1}):
        with pytest.raises(DataError, match=next(iter(record))):
            Constraints.from_record(record)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"answer_pattern": "("}, "task 't': answer_pattern is no regular expression"),
        ({"answer_format": "yaml"}, "task 't': answer_format 'yaml' is unknown; known: json, "),
        ({"wordy_above": 0.5}, "task 't': wordy_above is 0.5; it is a multiple"),
        ({"wordy_above": float("nan")}, "wordy_above is nan"),
        ({"extractive": True}, "file:7: no input, but the task is extractive"),
    ],
)
def test_a_task_cannot_declare_nonsense(declared, message):
    with pytest.raises(DataError, match=message):
        Task("t", test=(Example("Do it.", " ", ("x",), source="file:7"),), train=(), **declared)


def test_labels_are_inferred_from_few_answers_that_come_again():
    assert inferred_labels([["POS"]] * 15 + [["NEG"]] * 20 + [["neg."]] * 5) == ("NEG", "POS")
    assert inferred_labels([["yes", "true"]] * 15 + [["no", "false"]] * 25) == ("false", "no", "true", "yes")
    assert inferred_labels([["yes"], ["no"]] * 9) == ()  # too few to tell
    assert inferred_labels([["yes"]] * 100) == ()  # one answer is no choice
    assert inferred_labels([[f"{k}"] for k in range(300)]) == ()
    assert inferred_labels([[f"{k % 21}"] for k in range(300)]) == ()
    assert len(inferred_labels([[f"{k % 20}"] for k in range(300)])) == 20
    assert inferred_labels([]) == ()
