from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.errors import ConfigError, DataError
from cit_fast.methods.replay.allocation import Budget, allocate

PLENTY = 10**6


@pytest.mark.parametrize(
    ("distances", "total", "shares"),
    [
        # The released rule: floor of W_j / sum W * total, then one more to the largest remainders.
        ([0.5, 0.3, 0.2], 10, (5, 3, 2)),
        ([3.0, 2.0, 1.0], 200, (100, 67, 33)),  # 100, 66.67, 33.33
        ([7.0, 2.0, 1.0, 1.0], 600, (382, 109, 55, 54)),  # 381.82, 109.09, 54.55, 54.55: a tie for the last place
        ([0.25], 200, (200,)),
        ([0.0, 0.75, 0.25], 4, (0, 3, 1)),
        # What the released code gets wrong (68, 66, 66): a tie goes to the earlier tasks, once each.
        ([1.0, 1.0, 1.0], 200, (67, 67, 66)),
        ([0.1, 0.1, 0.1], 200, (67, 67, 66)),
        ([1.0, 1.0, 1.0, 1.0], 6, (2, 2, 1, 1)),
    ],
)
def test_cases_worked_out_by_hand(distances, total, shares):
    assert allocate(distances, total, [PLENTY] * len(distances)) == type(allocate([], 0, []))(shares)


def test_nothing_to_share():
    assert allocate([], 0, []).shares == ()
    assert allocate([1.0, 2.0], 0, [5, 5]).shares == (0, 0)


def test_all_distances_zero_is_an_equal_split_and_said():
    found = allocate([0.0, 0.0, 0.0], 8, [9, 9, 9])
    assert found.shares == (3, 3, 2)
    assert found.notes == ("All distances are zero, so that every earlier task got an equal share.",)


def test_a_budget_larger_than_the_history_brings_back_all_of_it_and_says_so():
    found = allocate([0.9, 0.1], 100, [30, 20])
    assert found.shares == (30, 20)
    assert found.notes == ("The budget of 100 is larger than the history of 50: all of it came back.",)


def test_what_a_small_task_cannot_give_goes_to_the_others():
    found = allocate([8.0, 1.0, 1.0], 100, [20, 500, 500], ["small", "b", "c"])
    assert found.shares == (20, 40, 40)
    assert found.notes[0].startswith("small has only 20 examples, less than its share")
    assert allocate([1.0, 0.0, 0.0], 10, [4, 50, 50]).shares == (4, 3, 3)  # the others are at distance zero
    assert allocate([8.0, 4.0, 1.0], 130, [20, 50, 500]).shares == (20, 50, 60)  # the second fills up in its turn


@given(
    st.lists(st.tuples(st.floats(0, 1e6, allow_subnormal=False), st.integers(0, 500)), min_size=1, max_size=12),
    st.integers(0, 4000),
)
def test_shares_are_whole_possible_and_sum_up(tasks, total):
    distances, available = zip(*tasks, strict=True)
    shares = allocate(distances, total, available).shares
    assert sum(shares) == min(total, sum(available))
    assert all(0 <= share <= most for share, most in zip(shares, available, strict=True))


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=10), st.integers(0, 4000))
def test_a_share_is_its_quota_rounded_down_or_up(distances, total):
    shares = allocate(distances, total, [PLENTY] * len(distances)).shares
    whole = sum(map(Fraction, distances))
    for share, distance in zip(shares, distances, strict=True):
        assert abs(share - total * Fraction(distance) / whole) < 1
    order = sorted(range(len(shares)), key=lambda k: -distances[k])
    assert all(shares[a] >= shares[b] for a, b in itertools.pairwise(order) if distances[a] > distances[b])


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_a_distance_that_is_none(wrong):
    with pytest.raises(DataError, match=f"the distance of task 1 is {wrong}"):
        allocate([0.5, wrong], 10, [5, 5])


def test_lists_of_different_lengths():
    with pytest.raises(DataError, match="2 distances for 1 tasks"):
        allocate([0.5, 0.5], 10, [5])


def test_budgets():
    assert [Budget(0.1).wanted(size) for size in (1, 14, 15, 25, 1000)] == [1, 1, 2, 2, 100]
    assert Budget(per_task=200).wanted(126) == 200
    for options in ({"fraction": 0}, {"fraction": 1.5}, {"per_task": 0}):
        with pytest.raises(ConfigError):
            Budget(**options)
