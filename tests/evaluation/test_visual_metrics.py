from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.errors import DataError
from cit_fast.evaluation.metrics import score
from cit_fast.evaluation.visual_metrics import overlap, parse_box, vqa_answer

EDGES = st.floats(0, 100, allow_nan=False).map(lambda edge: round(edge, 3))
BOXES = st.tuples(EDGES, EDGES, EDGES, EDGES).map(lambda b: (min(b[::2]), min(b[1::2]), max(b[::2]), max(b[1::2])))


def value(metric: str, prediction: str, *references: str) -> float:
    return score(metric, [prediction], [list(references)]).value


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Red", "red", 100.0),
        (" red\n", "RED", 100.0),
        ("red.", "red", 0.0),
        ("a red", "red", 0.0),
        ("B", "b", 100.0),
        ("", "red", 0.0),
    ],
)
def test_truth_alignment_is_equality_but_for_case(prediction, reference, expected):
    assert value("truth_alignment", prediction, reference) == expected
    assert value("truth_alignment", prediction, "something else", reference) == expected


# Boxes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,2,3,4", (1, 2, 3, 4)),
        ("[0.1, 0.25, .5, 1.]", (0.1, 0.25, 0.5, 1.0)),
        (" [ 1 ,2, 3,4 ]\n", (1, 2, 3, 4)),
        ("-1,-2,+3,4", (-1, -2, 3, 4)),
        ("1,1,1,1", (1, 1, 1, 1)),
    ],
)
def test_what_is_a_box(text, expected):
    assert parse_box(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "1,2,3", "1,2,3,4,5", "[1,2,3,4", "1,2,3,4]", "1 2 3 4", "the box 1,2,3,4", "3,2,1,4", "1,4,3,2",
        "nan,1,2,3", "1e3,2,3,4", "1,2,3,inf", f"0,0,{'9' * 400},1", "١,٢,٣,٤", "a,b,c,d",
    ],
)  # fmt: skip
def test_what_is_no_box(text):
    assert parse_box(text) is None
    assert value("iou", text, "1,2,3,4") == 0.0


def test_a_box_counts_above_half():
    assert value("iou", "[0, 0, 10, 10]", "0,0,10,10") == 100.0
    assert value("iou", "0,0,10,5", "0,0,10,10") == 0.0  # a half is not more than a half
    assert value("iou", "0,0,10,5.1", "0,0,10,10") == 100.0
    assert value("iou", "0,0,10,4.9", "0,0,10,10") == 0.0
    assert value("iou", "20,20,30,30", "0,0,10,10", "20,20,30,30") == 100.0
    with pytest.raises(DataError, match="metric iou: example 1: the reference 'left' is no box"):
        score("iou", ["1,2,3,4", "1,2,3,4"], [["1,2,3,4"], ["left"]])


@given(BOXES, BOXES, st.floats(0.25, 4))
def test_overlap_is_symmetric_bounded_and_keeps_with_scale(one, other, factor):
    found = overlap(one, other)
    assert 0.0 <= found <= 1.0
    assert found == pytest.approx(overlap(other, one))
    assert overlap(one, one) == 1.0
    if found < 1.0 and min(one[2] - one[0], one[3] - one[1]) > 0.01:
        scaled = [tuple(edge * factor for edge in box) for box in (one, other)]
        assert overlap(*scaled) == pytest.approx(found, abs=1e-6)


@given(BOXES)
def test_a_box_written_either_way_is_itself(box):
    plain = ",".join(map(str, box))
    assert value("iou", f"[{plain.replace(',', ', ')}]", plain) == 100.0


@given(st.text(max_size=30))
def test_any_text_is_a_box_or_wrong(text):
    assert value("iou", text, "1,2,3,4") in {0.0, 100.0}


# VQA


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("two", "2"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("red, blue", "red blue"),
        ("red/blue", "red blue"),
        ("t-shirt!", "t shirt"),
        ("a  an the", ""),
        ("well its hers", "well its hers"),
        ("line\nbreak\ttab", "line break tab"),
    ],
)
def test_the_official_form_of_an_answer(text, expected):
    assert vqa_answer(text) == expected


def by_leaving_out(prediction: str, references: list[str]) -> float:
    """The definition, word for word."""
    given = vqa_answer(prediction)
    worth = []
    for left_out in range(len(references)):
        others = [vqa_answer(answer) for index, answer in enumerate(references) if index != left_out]
        worth.append(min(1.0, others.count(given) / 3))
    return 100.0 * sum(worth) / len(worth)


@given(st.lists(st.sampled_from(["red", "a red", "Blue", "two", "2"]), min_size=4, max_size=12))
def test_vqa_accuracy_is_the_mean_over_those_who_are_left_out(references):
    for prediction in ("Red", "blue.", "2", "green"):
        assert value("vqa_accuracy", prediction, *references) == pytest.approx(by_leaving_out(prediction, references))


def test_vqa_accuracy_of_ten_persons():
    expected = [0.0, 30.0, 60.0, 90.0, 100.0, 100.0]
    for same, worth in enumerate(expected):
        assert value("vqa_accuracy", "cat", *["Cat"] * same, *["dog"] * (10 - same)) == pytest.approx(worth)


@given(st.lists(st.text(string.ascii_letters, min_size=1), min_size=1, max_size=3))
def test_vqa_accuracy_of_few_references_asks_for_one_of_them(references):
    assert value("vqa_accuracy", references[-1].upper(), *references) == 100.0
    assert value("vqa_accuracy", "neither of them", *references) == 0.0
