from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.errors import DataError
from cit_fast.methods.replay.insinfo import draw_by_insinfo, insinfo, tag_frequencies


def test_insinfo_by_hand():
    tags = [["a", "b"], ["a"], ["a", "c", "d"], []]
    assert tag_frequencies(tags) == {"a": 3, "b": 1, "c": 1, "d": 1}
    shared, rare = math.log(4 / 3), math.log(4)
    assert insinfo(tags) == pytest.approx([shared + rare, shared, shared + 2 * rare, 0.0], rel=1e-15)


def test_a_tag_counts_once_for_an_instruction():
    assert insinfo([["a", "a", "b"], ["b"]]) == [math.log(2), 0.0]


def test_no_instructions():
    assert insinfo([]) == []


def pool(*sizes: int) -> list[list[int]]:
    """Instances by instruction; those of instruction k are 1000 k, 1000 k + 1, ..."""
    return [[1000 * k + i for i in range(size)] for k, size in enumerate(sizes)]


def counts(drawn) -> list[int]:
    found = Counter(instance // 1000 for instance in drawn)
    return [found[k] for k in range(max(found, default=-1) + 1)]


def draw(instances, scores, budget, seed=0):
    return draw_by_insinfo(instances, scores, budget, random.Random(seed))


def test_fewer_draws_than_instructions_take_the_top_ones_once():
    for seed in range(5):
        drawn = draw(pool(5, 5, 5, 5), [0.1, 3.0, 2.0, 0.5], 2, seed)
        assert [instance // 1000 for instance in drawn] == [1, 2]
    assert [instance // 1000 for instance in draw(pool(3, 3, 3), [1.0, 1.0, 1.0], 2)] == [0, 1]  # ties: the earlier


def test_floors_that_sum_up_leave_nothing_to_chance_but_the_instances():
    for seed in range(5):
        assert counts(draw(pool(50, 50, 50), [5.0, 3.0, 2.0], 10, seed)) == [5, 3, 2]


def test_what_floors_leave_is_topped_up_at_random():
    found = [counts(draw(pool(50, 50, 50), [1.0, 1.0, 1.0], 10, seed)) for seed in range(40)]
    assert all(sum(each) == 10 and min(each) >= 3 for each in found)
    assert len({tuple(each) for each in found}) == 3  # the tenth is of any instruction


def test_at_least_one_of_each_and_trimmed_where_that_is_too_many():
    # floor(0.97 * 10) = 9 and three times max(1, 0): 12, of which two of the first go.
    for seed in range(20):
        assert counts(draw(pool(50, 50, 50, 50), [97.0, 1.0, 1.0, 1.0], 10, seed)) == [7, 1, 1, 1]


def test_an_instruction_gives_at_most_what_it_has():
    for seed in range(20):
        assert counts(draw(pool(2, 50), [9.0, 1.0], 10, seed)) == [2, 8]


def test_scores_that_are_all_zero_share_equally():
    assert counts(draw(pool(9, 9), [0.0, 0.0], 6)) == [3, 3]


def test_the_draw_follows_the_generator_alone():
    arguments = pool(20, 20), [1.0, 2.0], 9
    assert draw(*arguments, seed=1) == draw(*arguments, seed=1)
    assert draw(*arguments, seed=1) != draw(*arguments, seed=2)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1e3)), min_size=1, max_size=10),
    st.integers(0, 150),
    st.integers(0, 3),
)
def test_the_number_is_exact_and_instances_are_different(instructions, budget, seed):
    sizes, scores = zip(*instructions, strict=True)
    instances = pool(*sizes)
    drawn = draw(instances, scores, budget, seed)
    assert len(drawn) == len(set(drawn)) == min(budget, sum(sizes))
    assert set(drawn) <= {each for own in instances for each in own}
    if budget >= len(sizes):
        assert len({each // 1000 for each in drawn}) == len(sizes)  # no instruction loses its last instance


def test_bad_input():
    for instances, scores, message in (
        ([[1]], [1.0, 2.0], "2 scores for 1 instructions"),
        ([[1], []], [1.0, 1.0], "instruction 1 has no instances"),
        ([[1]], [math.nan], "the score of instruction 0 is nan"),
    ):
        with pytest.raises(DataError, match=message):
            draw(instances, scores, 1)
