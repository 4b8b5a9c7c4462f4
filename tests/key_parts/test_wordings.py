"""Pools of wordings from the data, and the draw from them; by a chat model: tests/replay/test_rewording.py."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from cit_fast.data import Example
from cit_fast.data.builtin import builtin_task
from cit_fast.key_parts.wordings import Wording, data_pools, draw_wordings

ONE = Example("Write the number in words.", "42", ("forty-two",), "numbers", ((17, 25),))
TWO = replace(ONE, instruction="Give words for the number.", input="7", key_parts=((5, 10),))


def test_the_data_has_the_wordings_of_a_task():
    task = builtin_task("dates", train=200, dev=0, test=0)
    pool = data_pools(task.train)["dates"]
    assert len(pool) == 12
    assert {wording.instruction for wording in pool} == set(task.instructions)
    assert all(wording.key_parts for wording in pool)


def test_key_parts_are_taken_from_where_they_are_given():
    assert data_pools([replace(ONE, key_parts=()), ONE])["numbers"] == (Wording(ONE.instruction, ONE.key_parts),)


@pytest.mark.parametrize(
    "examples",
    [
        pytest.param([ONE, replace(TWO, input=" ")], id="instruction-with-its-input"),
        pytest.param([replace(ONE, messages=(("user", "a"), ("assistant", "b")))], id="conversation"),
        pytest.param([replace(ONE, instruction=f"Write the number {k} as words.") for k in range(32)], id="too-many"),
    ],
)
def test_instructions_that_cannot_stand_for_one_another_get_no_pool(examples):
    assert data_pools(examples) == {}


def test_one_wording_is_drawn_for_each_example():
    examples = [replace(ONE, input=str(k), source=f"n:{k}") for k in range(300)]
    other = replace(ONE, task="other")
    pools = data_pools([ONE, TWO])
    drawn = draw_wordings([*examples, other], pools, random.Random(3))
    assert drawn == draw_wordings([*examples, other], pools, random.Random(3))
    assert drawn != draw_wordings([*examples, other], pools, random.Random(4))
    assert drawn[-1] is other
    counts = Counter(example.instruction for example in drawn[:-1])
    assert set(counts) == {ONE.instruction, TWO.instruction}
    assert min(counts.values()) > 110
    assert [(e.input, e.source, e.references) for e in drawn] == [
        (e.input, e.source, e.references) for e in [*examples, other]
    ]
    assert {e.key_part_texts for e in drawn if e.instruction == TWO.instruction} == {("words",)}


def test_a_conversation_keeps_its_own_wording():
    """Its instruction stands in its turns, where another one would not be found."""
    messages = (("user", "Name it."), ("assistant", "Paris"))
    talk = Example("Name it.", references=("Paris",), task="towns", messages=messages)
    pools = {"towns": (Wording("Say which town.", ((10, 14),)),)}
    plain = replace(talk, messages=())
    assert draw_wordings([talk, plain], pools, random.Random(0)) == [
        talk,
        replace(plain, instruction="Say which town.", key_parts=((10, 14),)),
    ]
